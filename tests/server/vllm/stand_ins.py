"""Stand-ins on the far side of vLLM's seams: workers that answer at once or when told, and an
application whose handlers look a merge up and name it as vLLM's do.
"""

import asyncio
import json
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dynmerge_server.vllm.middleware import PATHS


class Dead(Exception):
    """What vLLM's client raises once its engine is dead."""


class EchoClient:
    """vLLM's engine client, as far as `Workers` uses it."""

    def __init__(self) -> None:
        self.engine_core = object()
        self.vllm_config: Any = None
        self.asked: list[tuple[object, ...]] = []
        self.pending = 0  # answers before a merge or a bank is ready
        self.failing = ""
        self.dead = False

    async def collective_rpc(self, question: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if self.dead:
            raise Dead
        self.asked.append((question, *args))
        await asyncio.sleep(0)
        if question == "dynmerge_hold":
            return [None, None]
        if self.failing:
            return [{"state": "ready"}, {"state": "failed", "reason": self.failing}]
        if self.pending:
            self.pending -= 1
            return [{"state": "ready"}, {"state": "pending"}]
        return [{"state": "ready", "reason": ""}] * 2

    def count(self, question: str) -> int:
        return sum(asked[0] == question for asked in self.asked)


class EchoModels:
    """vLLM's OpenAIServingModels, as far as handlers use it."""

    def __init__(self) -> None:
        self.lora_requests: Any = {}

    def model_name(self, lora_request: Any = None) -> str:
        return lora_request["lora_name"] if lora_request else "random"


class EchoServer:
    """Tells what a handler saw. `gate` holds its replies back."""

    def __init__(self) -> None:
        self.models = EchoModels()
        self.seen: list[dict[str, Any]] = []
        self.merges: list[Any] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.status = 200
        self.careless = False  # serves the base model where it does not know the model
        self.broken = False  # its handlers raise, in the middle of a stream or before a reply
        self.content: Any = {"choices": []}  # of a whole reply; None as to a client that left
        self.text = "a"
        self.events: tuple[str, ...] = ()  # of a stream, after its first
        self.app = Starlette(
            routes=[Route(path, self.answer, methods=["POST"]) for path in PATHS],
        )

    async def answer(self, request: Request) -> Response:
        data = await request.body()
        try:
            body = json.loads(data)
        except ValueError:
            return JSONResponse({"error": "vLLM cannot read this"}, 400)
        if not isinstance(body, dict):
            return JSONResponse({"error": "vLLM wants an object"}, 400)
        self.seen.append(body)
        model = body.get("model")
        found = self.models.lora_requests.get(model)
        if found is None and model not in (None, "random") and not self.careless:
            return JSONResponse({"error": f"vLLM knows no {model}"}, 404)
        self.merges.append(found)
        name = self.models.model_name(found)
        if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return StreamingResponse(self.stream(name, usage), media_type="text/event-stream")
        await self.gate.wait()
        if self.broken:
            raise RuntimeError("vLLM is broken")
        content = {"model": name, **self.content} if self.content else self.content
        return JSONResponse(content, self.status)

    async def stream(self, name: str, usage: bool) -> Any:
        def event(**more: Any) -> str:
            text = json.dumps({"model": name, **more}, separators=(",", ":"))
            return f"data: {text}\n\n"

        for index in range(2):
            yield event(choices=[{"index": index, "finish_reason": None, "text": self.text}])
        await self.gate.wait()
        for said in self.events:
            yield said
        if self.broken:
            raise RuntimeError("vLLM is broken")
        for index in range(2):
            yield event(choices=[{"index": index, "finish_reason": "stop", "text": ""}])
        if usage:
            yield event(choices=[], usage={"total_tokens": 3, "completion_tokens": 2})
        yield "data: [DONE]\n\n"
