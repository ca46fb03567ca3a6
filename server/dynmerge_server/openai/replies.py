"""Replies: a run as one JSON object, or as server-sent events. And the client that leaves
meanwhile.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dynmerge_server.errors import describe, note
from dynmerge_server.json_body import validate
from dynmerge_server.openai.asked import Terms, ask
from dynmerge_server.openai.dialect import Answer, Dialect, envelope
from dynmerge_server.openai.fields import check_fields
from dynmerge_server.openai.logprobs import Pieces
from dynmerge_server.openai.requests import GenerationRequest
from dynmerge_server.openai.run import Run, Update
from dynmerge_server.sse import DONE, EVENT_STREAM, event
from dynmerge_server.state import Serving, serving

Result = TypeVar("Result")
Wanted = TypeVar("Wanted", bound=GenerationRequest)


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[Wanted]):
    """What one endpoint reads, how it understands that, and how it writes the answer."""

    schema: type[Wanted]
    terms: Callable[[Serving, Wanted], Terms]
    dialect: Callable[[Pieces], Dialect]


async def respond(
    request: Request, body: dict[str, Any], arrived: float, endpoint: Endpoint[Wanted]
) -> Response:
    """Answer a request whose body has been read. All that can go wrong before the first token
    raises.
    """
    parts = serving(request)
    wanted = validate(endpoint.schema, body)
    check_fields(body, endpoint.schema.model_fields)
    asked = await ask(parts, request.headers, wanted, endpoint.terms(parts, wanted), arrived)
    run, dialect = Run(parts, asked), endpoint.dialect(parts.pieces)
    if not asked.stream:
        return await while_connected(request, _whole(run, dialect))
    try:
        await while_connected(request, run.__aenter__())
        return EventStream(_events(run, dialect), run)
    except BaseException:  # no EventStream will close it
        await _close(run)
        raise


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, cancelled with ClientDisconnect when the client leaves."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for each in (task, gone):
            each.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(StreamingResponse):
    """Server-sent events of a run that has begun. However it ends, the run is closed with it."""

    media_type = EVENT_STREAM

    def __init__(self, events: AsyncGenerator[bytes, None], run: Run) -> None:
        headers = {**run.headers(), "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers)
        self._events = events
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the run ends or the client leaves."""
        try:
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)
        finally:
            await _close(self._run)


async def _close(run: Run) -> None:
    # Shielded: a second cancellation must not leave a sequence running or a merge held.
    with anyio.CancelScope(shield=True):
        await run.close()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(run: Run, dialect: Dialect) -> Response:
    asked = run.asked
    answers = [Answer(index, asked.echoed(index)) for index in range(asked.count)]
    async with run:
        async for update in run.updates():
            answers[update.index].add(update)
        content = {
            **envelope(asked, dialect.whole_object),
            "choices": [dialect.choice(asked, answer) for answer in answers],
            "usage": run.usage(),
            **dialect.extra(asked),
            "dynmerge": run.applied.block(),
        }
        return JSONResponse(content, headers=run.headers())


async def _events(run: Run, dialect: Dialect) -> AsyncGenerator[bytes, None]:
    """Chunks, then [DONE]. The `dynmerge` block is in the usage chunk, or else in the last one."""
    asked = run.asked
    try:
        async for choices, last in _choices(run, dialect):
            chunk = {**envelope(asked, dialect.chunk_object), "choices": choices}
            if asked.continuous_usage:
                chunk["usage"] = run.usage()
            if last and not asked.include_usage:
                chunk["dynmerge"] = run.applied.block()
            yield event(chunk)
        if asked.include_usage:
            chunk = {**envelope(asked, dialect.chunk_object), "choices": [], "usage": run.usage()}
            yield event({**chunk, "dynmerge": run.applied.block()})
    except Exception as error:  # the outermost handler of a stream: its status has been sent
        note(error)
        run.fail(error)
        yield event(describe(error))
    yield DONE


async def _choices(run: Run, dialect: Dialect) -> AsyncIterator[tuple[list[dict[str, Any]], bool]]:
    """The choices of each chunk, and whether it is the last."""
    asked = run.asked
    for index in range(asked.count):
        opening = dialect.opening(asked, index)
        if opening is not None:
            yield [opening], False
        if asked.echoed(index):
            yield [dialect.delta(asked, Update(index, asked.echoed(index), first=True))], False
    begun = {index for index in range(asked.count) if asked.echoed(index)}
    async for update in run.updates():
        last = update.finish_reason is not None
        shown = update.text or update.entries or (asked.return_token_ids and update.token_ids)
        if shown or last:
            told = replace(update, first=update.index not in begun)
            begun.add(update.index)
            yield [dialect.delta(asked, told)], last and not run.open_sequences
