"""What arrives on a real socket: sizes, deadlines, parsers, keys."""

import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.applications import Starlette

from dynmerge.runtime import Runtime
from dynmerge_server.app import create_app
from dynmerge_server.auth import is_open
from dynmerge_server.config import Auth, Limits, ServerConfig
from tests.server.asking import CHAT
from tests.server.conftest import served
from tests.server.echo_engine import EchoEngine

SMALL = Limits(header_bytes=4096, headers=20, body_bytes=20_000, receive_seconds=0.5)
BODY = json.dumps(CHAT).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def small() -> Iterator[str]:
    """A server with small limits, for all tests of this file."""
    from tests.bank_factory import random_bank
    from tests.conftest import tiny_tokenizer

    config = ServerConfig(port=0, limits=SMALL)
    runtime = Runtime(random_bank(), EchoEngine(tiny_tokenizer()))
    app = create_app(runtime, config)
    with served(app, config) as url:
        yield url
    app.state.serving.prompts.close()
    runtime.close()


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    where = urlsplit(url)
    assert where.hostname is not None
    with closing(socket.create_connection((where.hostname, where.port or 80), 5)) as sock:
        yield sock


def talk(url: str, sent: bytes) -> bytes:
    """Everything the server says to these bytes until it closes or falls silent."""
    with connected(url) as sock:
        sock.sendall(sent)
        return everything(sock)


def everything(sock: socket.socket) -> bytes:
    sock.settimeout(3)
    said = b""
    try:
        while piece := sock.recv(65536):
            said += piece
    except (TimeoutError, ConnectionResetError):
        pass
    return said


def status(said: bytes) -> int:
    return int(said.split(b" ", 2)[1])


def closing_request(extra: bytes = b"", body: bytes = BODY) -> bytes:
    length = b"Content-Length: %d\r\nConnection: close\r\n" % len(body)
    return HEAD + extra + length + b"\r\n" + body


def test_an_ordinary_request_passes(small: str) -> None:
    assert status(talk(small, closing_request())) == 200


def test_many_or_large_headers_are_refused(small: str) -> None:
    many = b"".join(b"X-%d: y\r\n" % index for index in range(300))
    assert status(talk(small, closing_request(many))) in (400, 431)
    few = b"".join(b"X-%d: y\r\n" % index for index in range(30))
    assert status(talk(small, closing_request(few))) == 431
    assert status(talk(small, closing_request(b"X-Big: " + b"y" * 5000 + b"\r\n"))) == 431
    assert status(talk(small, HEAD + b"X-Big: " + b"y" * 300_000)) == 400


def test_a_large_body_is_refused_with_and_without_its_length(small: str) -> None:
    where = urlsplit(small)
    assert where.hostname is not None
    big = b"x" * 2_000_000
    for chunked in (False, True):
        connection = http.client.HTTPConnection(where.hostname, where.port, timeout=10)
        body = iter([big[:1_000_000], big[1_000_000:]]) if chunked else big
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/tokenize", body, headers, encode_chunked=chunked)
        reply = connection.getresponse()
        assert reply.status == 413
        assert json.loads(reply.read())["error"]["code"] == 413
        connection.close()
    said = talk(
        small, HEAD + b"Content-Length: 999999999999999999999999\r\nConnection: close\r\n\r\n"
    )
    assert status(said) in (400, 413)


def test_a_request_that_does_not_arrive_is_given_up(small: str) -> None:
    announced = HEAD + b"Content-Length: 500\r\n\r\n" + b'{"messages"'
    started = time.monotonic()
    assert status(talk(small, announced)) == 408
    assert talk(small, b"POST /v1/chat/compl") == b""
    assert talk(small, b"") == b""
    assert time.monotonic() - started < 9


def test_a_connection_outlives_a_refused_request(small: str) -> None:
    with httpx.Client(base_url=small) as client:
        for _ in range(2):
            assert client.post("/tokenize", json={"prompt": 1}).status_code == 400
            assert client.post("/tokenize", json={"prompt": "x"}).status_code == 200


def test_what_is_not_http_gets_an_answer_in_the_error_form(small: str) -> None:
    said = talk(small, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
    assert status(said) == 400
    assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == 400
    bad_chunk = HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
    assert b"Traceback" not in talk(small, bad_chunk)
    assert status(talk(small, closing_request())) == 200


def test_a_request_with_two_lengths_is_refused_and_its_rest_not_read(small: str) -> None:
    both = b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    for headers in (both, both.replace(b"Content-Length: 5\r\n", b"Content-Length: 0\r\n")):
        said = talk(
            small, HEAD + headers + b"0\r\n\r\n" + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        )
        assert status(said) == 400
        assert said.count(b"HTTP/1.1") == 1
        assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == 400


def test_idle_connections_neither_block_nor_stay(small: str) -> None:
    where = urlsplit(small)
    assert where.hostname is not None
    idle = [socket.create_connection((where.hostname, where.port or 80), 5) for _ in range(200)]
    try:
        assert status(talk(small, closing_request())) == 200
        idle[0].settimeout(5)
        assert idle[0].recv(1) == b""
    finally:
        for sock in idle:
            sock.close()


KEYED = ServerConfig(auth=Auth(keys=("one", "two")))


@pytest.fixture
def config() -> ServerConfig:
    return KEYED


async def test_a_key_is_needed_but_for_probes_and_static_files(client: httpx.AsyncClient) -> None:
    for path in ("/health", "/ping", "/version", "/playground/"):
        assert (await client.get(path)).status_code == 200
    for path in ("/metrics", "/load", "/v1/models", "/v1/merges", "/nowhere", "/healthx"):
        reply = await client.get(path)
        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == 401
        assert reply.headers["www-authenticate"] == "Bearer"
    for key, wanted in (("one", 200), ("two", 200), ("on", 401), ("onee", 401), ("é", 401)):
        headers = {"Authorization": f"Bearer {key}".encode()}
        assert (await client.get("/v1/models", headers=headers)).status_code == wanted
    basic = {"Authorization": "Basic one"}
    assert (await client.get("/v1/models", headers=basic)).status_code == 401
    assert (await client.post("/v1/chat/completions", content=b"x")).status_code == 401


def test_no_path_slips_through_an_open_one(app: Starlette) -> None:
    for path in ("/healthz", "/health/../metrics", "/playgroundx", "//health", "/v1/playground/"):
        assert not is_open(path)
