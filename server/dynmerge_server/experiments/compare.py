"""Compare: one prompt answered under two arms at once, without saying which is which.

Both are ordinary requests to the same application, whichever engine is behind it; the engine has
them in one batch. A vote on them is feedback on the comparison's id.
"""

import asyncio
import json
import random
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Scope

from dynmerge.errors import ExperimentError
from dynmerge_server.experiments.declaration import Experiment
from dynmerge_server.experiments.entry import PAIR, Half
from dynmerge_server.preferences import EXPERIMENT_HEADER

POSITIONS = ("first", "second")
OURS = ("arms", "reveal")  # of the body; the rest is the request
_DRAWN = random.SystemRandom()


async def compare(request: Request, experiment: Experiment, body: Mapping[str, Any]) -> Response:
    """Two answers in random order. Raises ExperimentError on a body that cannot be compared."""
    arms = _arms(experiment, body.get("arms"))
    reveal = body.get("reveal", False)
    if not isinstance(reveal, bool):
        raise ExperimentError("reveal is true or false", "reveal")
    if body.get("stream"):
        raise ExperimentError("a comparison comes whole: leave stream out", "stream")
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    asked = {name: value for name, value in body.items() if name not in OURS}
    pair = uuid.uuid4().hex
    answers = await asyncio.gather(
        *(
            _answer(request, path, asked, Half(pair, position, experiment.name, arm))
            for position, arm in enumerate(arms)
        )
    )
    for status, content in answers:
        if status != 200:
            return JSONResponse(content, status)
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


async def _answer(
    request: Request, path: str, body: Mapping[str, Any], half: Half
) -> tuple[int, dict[str, Any]]:
    """Ask the application; the status and the content of its reply."""
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
    content = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], json.loads(content)


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


def _told(content: Mapping[str, Any], place: int, reveal: bool) -> dict[str, Any]:
    """One answer as it is shown: what would say which arm it is only where that is wanted."""
    hidden = () if reveal else ("dynmerge", "model", "system_fingerprint", "id")
    shown = {name: value for name, value in content.items() if name not in hidden}
    return {"position": POSITIONS[place], **shown}
