"""Clients that leave: while streaming, waiting or merging. Everything is given back within a
second.
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from starlette.applications import Starlette

from dynmerge.merging import cache as merge_cache
from dynmerge.runtime import Runtime
from dynmerge_server.app import create_app
from dynmerge_server.config import Limits, ServerConfig
from dynmerge_server.drain import Drain
from dynmerge_server.openai.run import Run
from tests.server.asking import CHAT, chat, stream
from tests.server.conftest import served
from tests.server.echo_engine import EchoEngine


def soon(condition: Callable[[], bool], seconds: float = 1.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def asking(url: str, more: dict[str, object]) -> socket.socket:
    """A connection on which a request has been sent."""
    where = urlsplit(url)
    assert where.hostname is not None
    body = json.dumps({**CHAT, "preference": {"ada": 1}, **more}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    sock = socket.create_connection((where.hostname, where.port or 80), 5)
    sock.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    return sock


def leave_after(url: str, more: dict[str, object], started: Callable[[], bool]) -> None:
    """Send a request, wait until it is under way, and close the socket."""
    with closing(asking(url, more)):
        assert soon(started, 5)


def idle(engine: EchoEngine, runtime: Runtime, url: str) -> Callable[[], bool]:
    def check() -> bool:
        busy = httpx.get(f"{url}/load").json()["server_load"]
        return engine.running == 0 and runtime.cache.stats().pinned == 0 and busy == 0

    return check


@pytest.mark.parametrize("more", [{}, {"n": 3}, {"stream": True}, {"stream": True, "n": 3}])
def test_a_client_that_leaves_while_it_waits(
    url: str, engine: EchoEngine, runtime: Runtime, more: dict[str, object]
) -> None:
    engine.gate.clear()
    leave_after(url, more, lambda: engine.running == more.get("n", 1))
    assert soon(idle(engine, runtime, url))


def test_a_client_that_leaves_in_the_middle_of_a_stream(
    url: str, engine: EchoEngine, runtime: Runtime
) -> None:
    engine.pause_after = 3
    with (
        httpx.Client(base_url=url) as client,
        client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as reply,
    ):
        lines = reply.iter_lines()  # kept: httpx closes the stream with its iterator
        next(lines)
        assert httpx.get(f"{url}/load").json() == {"server_load": 1}
    assert soon(idle(engine, runtime, url))


def test_a_client_that_leaves_while_its_merge_is_made(
    url: str, engine: EchoEngine, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()
    make = runtime.cache._make

    def slow(recipe: object, wanted: object) -> object:
        begun.set()
        assert go.wait(5)
        return make(recipe, wanted)  # type: ignore[arg-type]

    monkeypatch.setattr(runtime.cache, "_make", slow)
    leave_after(url, {}, begun.is_set)
    assert soon(lambda: runtime.cache.stats().pinned == 0)
    go.set()
    reply = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "preference": {"ada": 1}})
    assert reply.status_code == 200  # the merge was finished for whoever comes next
    assert not engine.running


def established(sock: socket.socket) -> bool:
    """Whether the server still holds its end of a connection."""
    ends = psutil.Process().net_connections("tcp4")
    here = sock.getsockname()
    return any(end.raddr == here and end.status == psutil.CONN_ESTABLISHED for end in ends)


@pytest.mark.parametrize("stream", [False, True])
def test_a_reader_that_stops_reading_is_given_up(
    stream: bool, runtime: Runtime, engine: EchoEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ServerConfig(port=0, limits=Limits(send_seconds=0.5))
    app = create_app(runtime, config)
    engine.chatter = 400_000  # bytes in each chunk: more than the sockets' buffers hold
    with (
        served(app, config) as url,
        closing(asking(url, {"stream": stream, "max_tokens": 60})) as sock,
    ):
        assert soon(lambda: bool(engine.seen), 5)
        assert established(sock)
        assert soon(idle(engine, runtime, url), 5)
        assert soon(lambda: not established(sock), 5)
    assert capsys.readouterr().err == ""
    app.state.serving.prompts.close()


async def test_a_hundred_identical_cold_requests_make_one_merge(
    client: httpx.AsyncClient, runtime: Runtime
) -> None:
    replies = await asyncio.gather(
        *(chat(client, preference={"ada": 0.123, "bob": 0.877}, max_tokens=1) for _ in range(100))
    )
    outcomes = [reply["dynmerge"]["cache"] for reply in replies]
    assert outcomes.count("stored") == 1
    assert set(outcomes) <= {"stored", "collapsed", "hit"}
    stats = runtime.cache.stats()
    assert (stats.misses, stats.pinned) == (1, 0)


async def test_a_merge_that_fails_is_one_error_and_the_next_request_is_fine(
    client: httpx.AsyncClient, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(recipe: object) -> merge_cache.Merge:
        raise MemoryError("no memory at 0x1234")

    with monkeypatch.context() as patched:
        patched.setattr(runtime.cache, "_make", broken)
        for more in ({}, {"stream": True}):
            body = {**CHAT, "preference": {"ada": 1}, **more}
            reply = await client.post("/v1/chat/completions", json=body)
            assert reply.status_code == 500
            assert "0x1234" not in reply.text
    await chat(client, preference={"ada": 1})
    assert runtime.cache.stats().pinned == 0


async def test_a_full_cache_is_busy_not_broken(client: httpx.AsyncClient, runtime: Runtime) -> None:
    runtime.cache._stats = merge_cache.CacheStats(capacity=10)
    reply = await client.post("/v1/chat/completions", json={**CHAT, "preference": {"ada": 1}})
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "1"
    await stream(client)


@pytest.mark.parametrize("passes", range(5))
async def test_an_end_that_comes_just_as_a_stream_has_begun(
    passes: int,
    app: Starlette,
    engine: EchoEngine,
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`passes` of the event loop after the first token: nobody's stream exists yet."""
    drain, begin = Drain(app), Run.__aenter__

    def end(left: int) -> None:
        if left:
            asyncio.get_running_loop().call_soon(end, left - 1)
        else:
            drain.end()

    async def begun(run: Run) -> Run:
        await begin(run)
        end(passes)
        return run

    monkeypatch.setattr(Run, "__aenter__", begun)
    engine.pause_after = 1
    transport = httpx.ASGITransport(drain)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        body = {**CHAT, "preference": {"ada": 1}, "stream": True}
        reply = await client.post("/v1/chat/completions", json=body)
        assert "shutting down" in reply.text
        assert (await client.get("/load")).json() == {"server_load": 0}
    assert runtime.cache.stats().pinned == 0
    assert engine.running == 0


async def test_a_handler_cancelled_just_as_a_stream_has_begun(
    app: Starlette, engine: EchoEngine, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Run.__aenter__

    async def begun(run: Run) -> Run:
        await begin(run)
        asked.cancel()
        return run

    monkeypatch.setattr(Run, "__aenter__", begun)
    engine.pause_after = 1
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        body = {**CHAT, "preference": {"ada": 1}, "stream": True}
        asked = asyncio.ensure_future(client.post("/v1/chat/completions", json=body))
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert (await client.get("/load")).json() == {"server_load": 0}
    assert runtime.cache.stats().pinned == 0
    assert engine.running == 0
