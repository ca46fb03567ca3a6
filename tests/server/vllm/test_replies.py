from typing import Any

import pytest

from dynmerge_server.applied import Applied
from dynmerge_server.experiments.entry import Resolved
from dynmerge_server.vllm.replies import Reply
from dynmerge_server.vllm.turn import Turn
from tests.server.vllm.test_residents import recipe

TOKEN = b'data: {"choices":[{"finish_reason":null}]}\n\n'
# A text may look like the end of one.
ENDING = b'data: {"text":"\\"finish_reason\\":\\"","choices":[{"finish_reason":"stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error":{}}\n\n'


async def told(*pieces: bytes) -> list[bytes]:
    """What a client gets, message by message."""
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    reply = Reply(send, Turn("m"), Applied(Resolved(recipe("ada"), "body"), "hit"))
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await reply.send({"type": "http.response.start", "status": 200, "headers": headers})
    for piece in pieces:
        await reply.send({"type": "http.response.body", "body": piece, "more_body": True})
    assert not reply.complete
    await reply.send({"type": "http.response.body", "body": b""})
    assert reply.complete
    return sent[1:]


async def test_tokens_pass_at_once_and_only_a_last_event_waits() -> None:
    sent = await told(TOKEN, ENDING, TOKEN, ENDING, DONE)
    assert sent[0] == TOKEN
    assert sent[1] == ENDING + TOKEN
    assert sent[2].startswith(ENDING.removesuffix(b"}\n\n") + b',"dynmerge":{"preference"')
    assert sent[2].endswith(b"}\n\n" + DONE)
    assert b"".join(sent).count(b'"dynmerge"') == 1


@pytest.mark.parametrize("size", [1, 2, 7, 40, 1000])
async def test_pieces_may_be_cut_anywhere(size: int) -> None:
    text = TOKEN + ENDING + ENDING + DONE
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert b"".join(await told(*pieces)) == b"".join(await told(TOKEN, ENDING, ENDING, DONE))


async def test_a_stream_that_fails_or_has_other_events_is_as_it_was() -> None:
    for pieces in (
        (TOKEN, ENDING, ERROR, DONE),
        (b"event: x\ndata: {}\n\n",),
        (TOKEN, ENDING),
        (b"a",),
    ):
        assert b"".join(await told(*pieces)) == b"".join(pieces)
