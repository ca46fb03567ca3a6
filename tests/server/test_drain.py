"""The end of the drain: whoever still waits is told so in the form its client reads."""

import logging
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from urllib.parse import urlsplit

import httpx
import pytest

from dynmerge.runtime import Runtime
from dynmerge_server.app import create_app
from dynmerge_server.config import ServerConfig
from tests.server.asking import CHAT, CHAT_PATH, COMPLETION, COMPLETION_PATH, events
from tests.server.conftest import served
from tests.server.echo_engine import EchoEngine
from tests.server.test_leaving import asking, soon

SHORT = ServerConfig(port=0, drain_seconds=0)
STREAM = {"stream": True}


def at_the_end(
    runtime: Runtime, asks: list[tuple[str, dict[str, object]]], under_way: Callable[[], bool]
) -> list[httpx.Response]:
    """The replies to requests that are under way when the server must stop."""
    app = create_app(runtime, SHORT)
    with ThreadPoolExecutor(len(asks)) as pool:
        with served(app, SHORT) as url:
            asked = [pool.submit(httpx.post, url + path, json=body) for path, body in asks]
            assert soon(under_way, 5)
        replies = [each.result(10) for each in asked]
    app.state.serving.prompts.close()
    return replies


def test_a_request_that_waits_is_told_503_and_a_stream_its_error(
    runtime: Runtime,
    engine: EchoEngine,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine.pause_after = 2
    whole, chat, text = at_the_end(
        runtime,
        [
            (CHAT_PATH, CHAT),
            (CHAT_PATH, {**CHAT, **STREAM}),
            (COMPLETION_PATH, {**COMPLETION, **STREAM}),
        ],
        lambda: engine.running == 3,
    )
    assert whole.status_code == 503
    assert whole.headers["retry-after"] == "1"
    said = whole.json()["error"]
    assert (said["code"], said["type"]) == (503, "ServiceUnavailableError")
    for stream in (chat, text):
        assert stream.status_code == 200
        *pieces, last = events(stream)
        assert pieces
        assert last["error"] == said
    assert soon(lambda: engine.running == 0 and runtime.cache.stats().pinned == 0)
    (record,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert record.getMessage() == "the time to drain is over: ended 3 requests"
    assert capsys.readouterr().err == ""


def test_a_stream_that_has_no_token_yet_is_told_503(runtime: Runtime, engine: EchoEngine) -> None:
    engine.gate.clear()
    (reply,) = at_the_end(runtime, [(CHAT_PATH, {**CHAT, **STREAM})], lambda: engine.running == 1)
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == 503


def test_a_request_that_has_not_arrived_is_told_503(
    runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    app = create_app(runtime, SHORT)
    with served(app, SHORT) as url:
        where = urlsplit(url)
        sock = socket.create_connection((str(where.hostname), where.port or 80), 5)
        sock.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        sock.sendall(b"Content-Length: 100\r\n\r\n{")
        assert httpx.get(f"{url}/health").status_code == 200  # so the other has been read too
    with closing(sock):
        assert b" 503 " in sock.recv(65536)
    assert capsys.readouterr().err == ""
    app.state.serving.prompts.close()


def test_a_reader_that_takes_nothing_does_not_keep_the_server(
    runtime: Runtime, engine: EchoEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.chatter = 400_000  # bytes in each chunk: more than the sockets' buffers hold
    app = create_app(runtime, SHORT)
    with served(app, SHORT) as url, closing(asking(url, {**STREAM, "max_tokens": 60})):
        assert soon(lambda: bool(engine.seen), 5)
    assert capsys.readouterr().err == ""
    app.state.serving.prompts.close()
