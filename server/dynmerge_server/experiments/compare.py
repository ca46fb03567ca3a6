"""Compare: one prompt answered under two arms at once, without saying which is which.

Both are ordinary requests to the same application, whichever engine is behind it; the engine has
them in one batch. A vote on them is feedback on the comparison's id.
"""

import asyncio
import json
import random
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import anyio
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Scope

from dynmerge.errors import ExperimentError
from dynmerge_server.errors import INTERNAL
from dynmerge_server.errors import body as error_body
from dynmerge_server.experiments.declaration import Experiment
from dynmerge_server.experiments.entry import PAIR, Half
from dynmerge_server.experiments.records import POSITIONS
from dynmerge_server.preferences import EXPERIMENT_HEADER

OURS = ("arms", "reveal")  # of the body; the rest is the request
FAILED = 'one of the two answers failed; with "reveal": true the error says which, and why'
_DRAWN = random.SystemRandom()

Answered = tuple[int, dict[str, Any]]  # status and content


async def compare(request: Request, experiment: Experiment, body: Mapping[str, Any]) -> Response:
    """Two answers in random order. Raises ExperimentError on a body that cannot be compared."""
    arms = _arms(experiment, body.get("arms"))
    reveal = body.get("reveal", False)
    if not isinstance(reveal, bool):
        raise ExperimentError("reveal is true or false", "reveal")
    if body.get("stream"):
        raise ExperimentError("a comparison comes whole: leave stream out", "stream")
    if body.get("request_id") is not None:
        message = "a comparison gets an id of its own: leave request_id out"
        raise ExperimentError(message, "request_id")
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    asked = {name: value for name, value in body.items() if name not in OURS}
    pair = uuid.uuid4().hex
    answers = await _all_or_failed(
        [
            _answer(request, path, asked, Half(pair, position, experiment.name, arm))
            for position, arm in enumerate(arms)
        ]
    )
    for status, content in answers:
        if status != 200:
            return JSONResponse(content if reveal else _unsaid(status, content), status)
    told = [_told(content, place, reveal) for place, (_, content) in enumerate(answers)]
    return JSONResponse(
        {"id": pair, "object": "comparison", "experiment": experiment.name, "answers": told},
        headers={"Cache-Control": "no-store"},
    )


def _arms(experiment: Experiment, wanted: object) -> Sequence[str]:
    """Two arms in random order: those wanted, else any two."""
    known = list(experiment.arms)
    if wanted is None:
        return _DRAWN.sample(known, 2)
    if isinstance(wanted, list) and len(wanted) == 2 and wanted[0] != wanted[1]:
        named = [arm for arm in known if arm in wanted]
        if len(named) == 2:
            return _DRAWN.sample(named, 2)
    message = f"arms are two different ones of {experiment.name}: {', '.join(known)}"
    raise ExperimentError(message, "arms")


async def _all_or_failed(halves: Sequence[Coroutine[Any, Any, Answered]]) -> list[Answered]:
    """What all are answered; or the first that failed, alone, the others being cancelled."""
    tasks = [asyncio.ensure_future(half) for half in halves]
    try:
        for done in asyncio.as_completed(tasks):
            answered = await done
            if answered[0] != 200:
                return [answered]
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(request: Request, path: str, body: Mapping[str, Any], half: Half) -> Answered:
    """Ask the application. Raises ClientDisconnect where it answers nothing, as nobody reads it."""
    data = json.dumps(body).encode()
    sent: list[Message] = []
    unread = [{"type": "http.request", "body": data, "more_body": False}]

    async def receive() -> Message:
        return unread.pop() if unread else await request.receive()

    async def send(message: Message) -> None:
        sent.append(message)

    token = PAIR.set(half)
    try:
        await request.app(_inner(request.scope, path, len(data), half), receive, send)
    finally:
        PAIR.reset(token)
    content = json.loads(b"".join(message.get("body", b"") for message in sent) or b"null")
    if content is None:
        raise ClientDisconnect
    return sent[0]["status"], content


def _inner(outer: Scope, path: str, length: int, half: Half) -> Scope:
    """The scope of one half: the client's own headers, but for its body and its arm."""
    root = str(outer.get("root_path", ""))
    kept = ("type", "asgi", "http_version", "scheme", "client", "server", "root_path", "app")
    scope: Scope = {
        **{name: outer[name] for name in kept if name in outer},
        **{"method": "POST", "path": root + path, "raw_path": (root + path).encode()},
        **{"query_string": b"", "headers": list(outer["headers"])},
    }
    headers = MutableHeaders(scope=scope)
    for name in ("content-length", "transfer-encoding", "x-request-id"):
        del headers[name]
    headers["content-length"] = str(length)
    headers[EXPERIMENT_HEADER] = f"{half.experiment}={half.arm}"
    return scope


def _unsaid(status: int, content: Mapping[str, Any]) -> dict[str, Any]:
    """An error without what might say whose it is."""
    error = content.get("error")
    kind = str(error.get("type")) if isinstance(error, dict) else INTERNAL.type
    return error_body(status, FAILED, kind)


def _told(content: Mapping[str, Any], place: int, reveal: bool) -> dict[str, Any]:
    """One answer as it is shown: what would say which arm it is only where that is wanted."""
    hidden = () if reveal else ("dynmerge", "model", "system_fingerprint", "id")
    shown = {name: value for name, value in content.items() if name not in hidden}
    return {"position": POSITIONS[place], **shown}
