"""MergeMiddleware: pure ASGI around vLLM's handlers: a preference comes in, a merge goes on.

What the embedded server does before and after its engine is done here before and after vLLM's, by
the same code: the same fields, precedence, errors, headers and block.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynmerge.errors import DynmergeError, RequestError
from dynmerge_server.applied import Applied
from dynmerge_server.errors import SchemaError, answer, status_of
from dynmerge_server.experiments.entry import Resolved, resolve
from dynmerge_server.experiments.trial import Trial, begin
from dynmerge_server.openai.asked import REQUEST_ID_HEADER, request_id
from dynmerge_server.openai.replies import while_connected
from dynmerge_server.vllm.asked import Asked
from dynmerge_server.vllm.overheard import Overheard
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
# Whose streams count tokens where they are asked to.
COUNTED = ("/v1/chat/completions", "/v1/completions")
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


@dataclass(frozen=True, slots=True)
class Telling:
    """A request whose end the log of experiments may want to know."""

    exchange: Exchange
    trial: Trial | None = None
    request_id: str | None = None
    counted: bool = False  # its tokens, for us alone

    @classmethod
    def of(cls, exchange: Exchange, door: Door, resolved: Resolved) -> "Telling":
        """Begin the trial, if there is one. Raises RequestError on an id that is none."""
        if door.experiments is None or resolved.placed is None:
            return cls(exchange)
        named = exchange.asked.rest.get("request_id") if exchange.asked.rest else None
        name = request_id(exchange.headers, named if isinstance(named, str) else None)
        exchange = replace(exchange, scope=_with_header(exchange.scope, REQUEST_ID_HEADER, name))
        trial = begin(door.experiments.log, resolved, name, time.perf_counter())
        counting = exchange.asked.counting() if _path(exchange.scope) in COUNTED else None
        if counting is None:
            return cls(exchange, trial, name)
        return cls(replace(exchange, asked=counting), trial, name, True)

    def reply(self, turn: Turn, applied: Applied, timings: Mapping[str, float]) -> Reply:
        """The way out, which the trial reads along."""
        overheard = Overheard(self.trial, applied.outcome) if self.trial else None
        return Reply(
            self.exchange.send, turn, applied, timings, overheard, self.counted, self.request_id
        )

    def fail(self, error: BaseException, reply: Reply | None) -> None:
        """Tell that an error ended it; there is no `reply` where vLLM never had it."""
        if reply is not None:
            reply.end(error)
        elif self.trial is not None:
            self.trial.end(status_of(error))


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
        resolved = await resolve(
            door.experiments, served.preferences, exchange.headers, asked.wish, exchange.model
        )
        shown = exchange.model or served.models.base
        door.metrics.began(resolved.source)
        if asked.rest and asked.rest.get("background") and not resolved.recipe.is_base:
            raise RequestError(
                "background is not offered with a merge, which is kept while its client waits",
                "background",
            )
        serve = self._generate_base if resolved.recipe.is_base else self._generate_with
        await serve(exchange, door, resolved, shown)

    async def _generate_base(
        self, exchange: Exchange, door: Door, resolved: Resolved, shown: str
    ) -> None:
        told = Telling.of(exchange, door, resolved)
        applied, turn = Applied(resolved, "base"), Turn(shown)
        reply = told.reply(turn, applied, {"merge": 0.0})
        try:
            await self._forward(told.exchange, door.versions.served.models.base, turn, reply)
            reply.end()
        except BaseException as error:
            reply.end(error)
            raise

    async def _generate_with(
        self, exchange: Exchange, door: Door, resolved: Resolved, shown: str
    ) -> None:
        started = time.perf_counter()
        told, reply = Telling.of(exchange, door, resolved), None
        hold = door.hold(resolved.recipe)
        try:
            request = Request(exchange.scope, exchange.receive)
            resident = await while_connected(request, hold.take())
            applied = Applied(resolved, hold.outcome, resident.rank, resident.energy)
            turn = Turn(shown, resident)
            reply = told.reply(turn, applied, {"merge": time.perf_counter() - started})
            await self._forward(told.exchange, resolved.recipe.digest, turn, reply)
            reply.end()
        except BaseException as error:
            told.fail(error, reply)
            raise
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


def _with_header(scope: Scope, name: str, value: str) -> Scope:
    changed = {**scope, "headers": list(scope["headers"])}
    MutableHeaders(scope=changed)[name] = value
    return changed


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
