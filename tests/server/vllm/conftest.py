"""Fixtures: the API process's parts around a real bank on disk, with stand-ins for vLLM's."""

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry

from dynmerge.bank.storage import save_bank
from dynmerge_server.config import ServerConfig
from dynmerge_server.errors import HANDLERS
from dynmerge_server.vllm.metrics import Metrics
from dynmerge_server.vllm.middleware import MergeMiddleware
from dynmerge_server.vllm.residents import Residents
from dynmerge_server.vllm.routes import ROUTES
from dynmerge_server.vllm.served import Served, Terms
from dynmerge_server.vllm.state import Door
from dynmerge_server.vllm.turn import take_turns
from dynmerge_server.vllm.versions import Versions
from dynmerge_server.vllm.workers import Workers
from tests.bank_factory import random_bank
from tests.server.conftest import PRESETS
from tests.server.vllm.stand_ins import Dead, EchoClient, EchoServer

ROOM = {"diagonal": 2, "core": 1, "own": 1}


@pytest.fixture
def bank_folder(tmp_path: Path) -> Path:
    save_bank(random_bank(), tmp_path / "bank")
    return tmp_path / "bank"


@pytest.fixture
def vllm() -> EchoClient:
    return EchoClient()


@pytest.fixture
def door(bank_folder: Path, vllm: EchoClient) -> Door:
    workers = Workers(vllm, Dead)
    config = ServerConfig(presets=PRESETS)
    terms = Terms(config, ("random", "alias"), 512, ROOM, own_rank=9)
    residents, offer = Residents(ROOM), partial(Served.of, terms=terms)
    versions = Versions(bank_folder, workers, offer, forget=residents.forget)
    registry = CollectorRegistry()
    return Door(versions, residents, workers, Metrics("random", registry), None)


@pytest.fixture
def server(door: Door) -> EchoServer:
    """vLLM's application with the middleware and the routes."""
    server = EchoServer()
    server.app.add_middleware(MergeMiddleware)
    server.app.router.routes[:0] = ROUTES
    for kind, handler in HANDLERS.items():
        server.app.add_exception_handler(kind, handler)
    server.app.state.dynmerge = door
    take_turns(server.models, dict)
    return server


@pytest.fixture
async def client(server: EchoServer) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(server.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
