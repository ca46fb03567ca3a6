"""Fixtures: a real runtime over a real small bank, an EchoEngine, and HTTP clients in and out of
process.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import httpx
import pytest
from starlette.applications import Starlette
from transformers import PreTrainedTokenizerFast

from dynmerge.runtime import Runtime
from dynmerge_server.app import create_app
from dynmerge_server.config import ServerConfig
from dynmerge_server.listener import listen, make_server
from tests.bank_factory import random_bank
from tests.conftest import tiny_tokenizer
from tests.server.echo_engine import EchoEngine

BASE = "random"
PRESETS = {"careful": "ada=0.75, bob=0.25", "double": {"cyd": 1.0}}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def engine(tokenizer: PreTrainedTokenizerFast) -> EchoEngine:
    return EchoEngine(tokenizer)


@pytest.fixture
def runtime(engine: EchoEngine) -> Iterator[Runtime]:
    runtime = Runtime(random_bank(), engine)
    yield runtime
    runtime.close()


@pytest.fixture
def config() -> ServerConfig:
    return ServerConfig(presets=PRESETS)


@pytest.fixture
def app(runtime: Runtime, config: ServerConfig) -> Iterator[Starlette]:
    app = create_app(runtime, config)
    yield app
    app.state.serving.prompts.close()


@pytest.fixture
async def client(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@contextmanager
def served(app: Starlette, config: ServerConfig) -> Iterator[str]:
    """`app` behind a real socket on a free port of 127.0.0.1; the address."""
    ready = threading.Event()
    port: list[int] = []

    def listening(number: int) -> None:
        port.append(number)
        ready.set()

    server = make_server(app, config, listening)
    sockets = listen(config.host, config.port)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets)))
    thread.start()
    try:
        assert ready.wait(20)
        yield f"http://127.0.0.1:{port[0]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def url(app: Starlette) -> Iterator[str]:
    """The application behind a real socket."""
    with served(app, ServerConfig(port=0)) as address:
        yield address
