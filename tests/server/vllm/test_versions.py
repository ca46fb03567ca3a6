import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynmerge.bank.bank import BaseIdentity, FactorBank
from dynmerge.bank.build import build_bank
from dynmerge.bank.edit import with_adapter, without
from dynmerge.bank.storage import add_calibration, load_bank, save_bank
from dynmerge_server.vllm import versions as module
from dynmerge_server.vllm.state import Door
from tests.bank_factory import (
    random_adapter,
    random_adapters,
    random_bank,
    random_calibrations,
)
from tests.server.vllm.stand_ins import EchoClient, EchoServer

PATH = "/v1/completions"


def held(vllm: EchoClient) -> Any:
    """The versions that the workers were last told to keep."""
    return [asked for asked in vllm.asked if asked[0] == "dynmerge_hold"][-1][2]


def bigger() -> FactorBank:
    return with_adapter(random_bank(), "eve", random_adapter({"layers.0.q": 2}, 9))


async def test_a_reload_serves_the_bank_on_disk_once_the_workers_have_it(
    client: httpx.AsyncClient, vllm: EchoClient, bank_folder: Path, door: Door
) -> None:
    old = door.versions.outline.digest
    assert (await client.post(PATH, json={"model": "eve"})).status_code == 404
    save_bank(bigger(), bank_folder, replace=True)
    vllm.pending = 2
    reply = (await client.post("/v1/bank/reload")).json()
    assert reply["skills"] == ["ada", "bob", "cyd", "eve"]
    assert (reply["digest"], reply["switching"]) == (bigger().digest, None)
    assert vllm.count("dynmerge_load") == 3
    assert held(vllm) == [bigger().digest] != [old]
    assert (await client.post(PATH, json={"model": "eve"})).status_code == 200
    cards = (await client.get("/v1/models")).json()["data"]
    assert "eve" in [card["id"] for card in cards]
    before = vllm.count("dynmerge_load")
    assert (await client.post("/v1/bank/reload")).status_code == 200
    assert vllm.count("dynmerge_load") == before


async def test_what_a_bank_carries_and_serves_by_default_is_shown(
    client: httpx.AsyncClient, bank_folder: Path
) -> None:
    shown = (await client.get("/v1/bank")).json()
    assert (shown["calibrations"], shown["default_method"]) == ([], "linear;p=1;scale=1")
    add_calibration(bank_folder, random_calibrations(random_bank())[-1])
    shown = (await client.post("/v1/bank/reload")).json()
    assert (shown["calibrations"], shown["default_method"]) == (["tuned"], "tuned;scale=1")


async def test_a_request_in_flight_keeps_its_version(
    client: httpx.AsyncClient, server: EchoServer, vllm: EchoClient, bank_folder: Path
) -> None:
    old = random_bank().digest
    server.gate.clear()
    running = asyncio.create_task(client.post(PATH, json={"model": "ada"}))
    while not server.merges:
        await asyncio.sleep(0)
    save_bank(bigger(), bank_folder, replace=True)
    assert (await client.post("/v1/bank/reload")).status_code == 200
    assert held(vllm) == sorted([old, bigger().digest])
    server.gate.set()
    assert (await running).json()["dynmerge"]["bank"] == old
    while held(vllm) != [bigger().digest]:
        await asyncio.sleep(0)
    after = await client.post(PATH, json={"model": "ada"})
    assert after.json()["dynmerge"]["bank"] == bigger().digest


async def test_a_switch_that_fails_leaves_the_old_one_serving(
    client: httpx.AsyncClient, vllm: EchoClient, bank_folder: Path
) -> None:
    save_bank(bigger(), bank_folder, replace=True)
    vllm.failing = f"{bank_folder}: no room"
    reply = await client.post("/v1/bank/reload")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert reply.json()["error"]["message"] == "the bank: no room"
    shown = (await client.get("/v1/bank")).json()
    assert (shown["digest"], shown["failure"]) == (random_bank().digest, "the bank: no room")
    assert held(vllm) == [random_bank().digest]
    assert (await client.post(PATH, json={"model": "ada"})).status_code == 200
    vllm.failing = ""
    assert (await client.post("/v1/bank/reload")).status_code == 200


async def test_what_workers_forgot_with_a_version_is_prepared_again(
    client: httpx.AsyncClient, vllm: EchoClient, bank_folder: Path
) -> None:
    body = {"model": "random@ada,bob", "method": "tsv-m"}
    assert (await client.post(PATH, json=body)).json()["dynmerge"]["cache"] == "stored"
    for bank in (bigger(), random_bank()):
        save_bank(bank, bank_folder, replace=True)
        assert (await client.post("/v1/bank/reload")).status_code == 200
    before = vllm.count("dynmerge_prepare")
    assert (await client.post(PATH, json=body)).json()["dynmerge"]["cache"] == "stored"
    assert vllm.count("dynmerge_prepare") == before + 1


async def test_a_switch_that_failed_is_tried_again(
    client: httpx.AsyncClient,
    vllm: EchoClient,
    bank_folder: Path,
    door: Door,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(module, "AGAIN_AFTER", 0.01)
    await door.versions.open()
    vllm.failing = "2 versions of the bank are in use"
    save_bank(bigger(), bank_folder, replace=True)
    while door.versions.failure is None:
        await asyncio.sleep(0.01)
    vllm.failing = ""
    while door.versions.outline.digest != bigger().digest:
        await asyncio.sleep(0.01)
    assert door.versions.failure is None
    door.versions.close()


@pytest.mark.parametrize("kind", ["another base", "a preset's skill is gone", "cut off"])
async def test_a_bank_that_cannot_be_served_is_never_loaded(
    client: httpx.AsyncClient, vllm: EchoClient, bank_folder: Path, kind: str
) -> None:
    if kind == "cut off":
        path = bank_folder / "bank.json"
        path.write_bytes(path.read_bytes()[:-9])
    elif kind == "another base":
        bank = build_bank(BaseIdentity("other", "1" * 64), random_adapters())
        save_bank(bank, bank_folder, replace=True)
    else:
        save_bank(without(random_bank(), "cyd"), bank_folder, replace=True)
    reply = await client.post("/v1/bank/reload")
    assert reply.status_code == 503
    assert str(bank_folder) not in reply.text
    assert vllm.count("dynmerge_load") == 0


async def test_what_another_process_wrote_is_noticed(
    door: Door, bank_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY", 0.01)
    await door.versions.open()
    (bank_folder / "bank.json").write_bytes(b"{")
    while door.versions.failure is None:
        await asyncio.sleep(0.01)
    save_bank(bigger(), bank_folder, replace=True)
    while door.versions.outline.digest != bigger().digest:
        await asyncio.sleep(0.01)
    assert door.versions.failure is None
    door.versions.close()
    assert load_bank(bank_folder).digest == bigger().digest


async def test_loading_skills_is_off_without_a_root(client: httpx.AsyncClient) -> None:
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert (await client.post(path, json={"lora_name": "x"})).status_code == 404
