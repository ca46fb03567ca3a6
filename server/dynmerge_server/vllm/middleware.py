"""MergeMiddleware: pure ASGI around vLLM's handlers: a preference comes in, a merge goes on.

What the embedded server does before and after its engine is done here before and after vLLM's, by
the same code: the same fields, precedence, errors, headers and block.
"""

import time
from dataclasses import dataclass
from typing import Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynmerge.errors import DynmergeError, RequestError
from dynmerge.recipe import Recipe
from dynmerge_server.applied import Applied
from dynmerge_server.errors import SchemaError, answer
from dynmerge_server.openai.replies import while_connected
from dynmerge_server.vllm.asked import Asked
from dynmerge_server.vllm.replies import Reply
from dynmerge_server.vllm.state import Door, door
from dynmerge_server.vllm.turn import TURN, Turn

Use = Literal["generates", "names"]  # runs the model, or only says which it means
PATHS: dict[str, Use] = {
    "/v1/chat/completions": "generates",
    "/v1/chat/completions/batch": "generates",
    "/v1/completions": "generates",
    "/v1/responses": "generates",
    "/v1/messages": "generates",
    "/v1/systemone": "generates",
    "/cohere/v2/chat": "generates",
    "/invocations": "generates",
    "/inference/v1/generate": "generates",
    "/generative_scoring": "generates",
    "/tokenize": "names",
    "/detokenize": "names",
    "/v1/messages/count_tokens": "names",
    "/v1/chat/completions/render": "names",
    "/v1/completions/render": "names",
    "/v1/responses/render": "names",
    "/v1/messages/render": "names",
    "/cohere/v2/chat/render": "names",
    "/v1/chat/completions/derender": "names",
    "/v1/completions/derender": "names",
}
# Where vLLM takes the model's name from a header, and puts that in place of the body's.
SAGEMAKER = "/invocations"
SAGEMAKER_MODEL = "X-Amzn-SageMaker-Adapter-Identifier"
# What a client left, vLLM aborts in a task of its own, soon after its handler has returned.
ABORTED_AFTER = 0.5  # seconds


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request on its way in, and its way out."""

    scope: Scope
    receive: Receive
    send: Send
    asked: Asked

    @property
    def headers(self) -> Headers:
        """The request's."""
        return Headers(scope=self.scope)

    @property
    def model(self) -> str | None:
        """The client's name for the model."""
        in_header = self.headers.get(SAGEMAKER_MODEL) if self._is_sagemakers else None
        return in_header or self.asked.model

    @property
    def _is_sagemakers(self) -> bool:
        return _path(self.scope) == SAGEMAKER

    def instead(self, model: str) -> tuple[Scope, Receive]:
        """The same request with another name for the model; its body is there at once."""
        body = self.asked.body(model)
        scope = {**self.scope, "headers": list(self.scope["headers"])}
        headers = MutableHeaders(scope=scope)
        del headers["transfer-encoding"]
        headers["content-length"] = str(len(body))
        if self._is_sagemakers:
            headers[SAGEMAKER_MODEL] = model
        unread = True

        async def receive() -> Message:
            nonlocal unread
            if unread:
                unread = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await self.receive()

        return scope, receive


class MergeMiddleware:
    """Gives every request its merge and tells it back; the door is in the application's state."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its merge, or answer what is wrong with it."""
        use = _use(scope)
        if use is None:
            return await self.app(scope, receive, send)
        try:
            asked = Asked.of(await _read(receive))
            exchange = Exchange(scope, receive, send, asked)
            serve = self._generate if use == "generates" else self._name
            await serve(exchange, door(scope["app"]))
        except ClientDisconnect:
            return None
        except (DynmergeError, SchemaError) as error:
            await answer(error)(scope, receive, send)
        return None

    async def _name(self, exchange: Exchange, door: Door) -> None:
        """The model's name is all that counts: every merge has the base model's tokens."""
        models = door.versions.served.models
        models.preference(exchange.model)
        turn = Turn(exchange.model or models.base)
        await self._forward(exchange, models.base, turn, Reply(exchange.send, turn))

    async def _generate(self, exchange: Exchange, door: Door) -> None:
        served, asked = door.versions.served, exchange.asked
        recipe, source = served.preferences.resolve(exchange.headers, asked.wish, exchange.model)
        shown = exchange.model or served.models.base
        door.metrics.began(source)
        if recipe.is_base:
            turn = Turn(shown)
            reply = Reply(exchange.send, turn, Applied(recipe, source, "base"), {"merge": 0.0})
            return await self._forward(exchange, served.models.base, turn, reply)
        if asked.rest and asked.rest.get("background"):
            raise RequestError(
                "background is not offered with a merge, which is kept while its client waits",
                "background",
            )
        return await self._generate_with(exchange, door, recipe, source, shown)

    async def _generate_with(
        self, exchange: Exchange, door: Door, recipe: Recipe, source: str, shown: str
    ) -> None:
        started = time.perf_counter()
        reply = None
        hold = door.hold(recipe)
        try:
            request = Request(exchange.scope, exchange.receive)
            resident = await while_connected(request, hold.take())
            applied = Applied(recipe, source, hold.outcome, resident.rank, resident.energy)
            timings = {"merge": time.perf_counter() - started}
            turn = Turn(shown, resident)
            reply = Reply(exchange.send, turn, applied, timings)
            await self._forward(exchange, recipe.digest, turn, reply)
        finally:
            hold.release(after=ABORTED_AFTER if reply and not reply.complete else 0)
            door.metrics.tell(door.residents.stats())

    async def _forward(self, exchange: Exchange, model: str, turn: Turn, reply: Reply) -> None:
        scope, receive = exchange.instead(model)
        token = TURN.set(turn)
        try:
            await self.app(scope, receive, reply.send)
        finally:
            TURN.reset(token)


def _use(scope: Scope) -> Use | None:
    if scope["type"] != "http" or scope["method"] != "POST":
        return None
    return PATHS.get(_path(scope))


def _path(scope: Scope) -> str:
    """Where the application is asked, without what a proxy puts before it."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if path.startswith(f"{root}/") else path


async def _read(receive: Receive) -> bytes:
    """The request's body. Raises ClientDisconnect where it does not come to its end."""
    pieces, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(pieces)
