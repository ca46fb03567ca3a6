"""Loading and unloading skills over HTTP, around a real base model and real adapters."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch

from dynmerge.adapters.base_model import BaseModel
from dynmerge.adapters.checkpoint import load_adapter
from dynmerge.bank.bank import BaseIdentity
from dynmerge.bank.build import build_bank
from dynmerge.bank.calibration import Calibration
from dynmerge.bank.storage import add_calibration, drop_calibration, load_bank, save_bank
from dynmerge_server.vllm.skills import Skills
from dynmerge_server.vllm.state import Door
from tests.server.vllm.stand_ins import EchoServer

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def bank_folder(base_folder: Path, adapter_folders: Mapping[str, Path], tmp_path: Path) -> Path:
    base = BaseModel.open(base_folder)
    adapters = {
        name: load_adapter(adapter_folders[name], base, trust_base=True)
        for name in ("ada", "bob", "cyd")
    }
    save_bank(build_bank(BaseIdentity(base.name, base.fingerprint), adapters), tmp_path / "bank")
    return tmp_path / "bank"


@pytest.fixture(autouse=True)
def skills(
    server: EchoServer, door: Door, base_folder: Path, adapter_folders: Mapping[str, Path]
) -> None:
    root = adapter_folders["ada"].parent
    opened = partial(BaseModel.open, base_folder)
    skills = Skills(door.versions, root, opened, trust_base=True)
    server.app.state.dynmerge = replace(door, skills=skills)


async def test_a_skill_comes_and_goes(client: httpx.AsyncClient, bank_folder: Path) -> None:
    before = load_bank(bank_folder).digest
    reply = await client.post(LOAD, json={"lora_name": "dee", "lora_path": "dee"})
    assert reply.text == "Success: LoRA adapter 'dee' added successfully."
    said = await client.post("/v1/completions", json={"model": "dee"})
    assert said.json()["dynmerge"]["bank"] == load_bank(bank_folder).digest != before
    reply = await client.post(UNLOAD, json={"lora_name": "dee"})
    assert reply.text == "Success: LoRA adapter 'dee' removed successfully."
    assert (await client.post("/v1/completions", json={"model": "dee"})).status_code == 404
    assert load_bank(bank_folder).digest == before


async def test_a_skill_is_replaced_only_where_that_is_said(
    client: httpx.AsyncClient, bank_folder: Path
) -> None:
    body = {"lora_name": "ada", "lora_path": "dee"}
    refused = await client.post(LOAD, json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "lora_name")
    assert (await client.post(LOAD, json={**body, "load_inplace": True})).status_code == 200
    assert load_bank(bank_folder).names == ("ada", "bob", "cyd")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"lora_path": "../bank"}, "no folder within adapter_root"),
        ({"lora_path": "/etc"}, "no folder within adapter_root"),
        ({"lora_path": "none"}, "no folder within adapter_root"),
        ({"lora_path": "way-out"}, "no folder within adapter_root"),
        ({"lora_path": "linked"}, "a link that leads out"),
        ({"lora_path": "dee", "lora_name": "Dee"}, "not a skill name"),
        ({"lora_path": "dee", "lora_name": "careful"}, "taken by a skill"),
        ({"lora_path": "dee", "is_3d_lora_weight": True}, "not offered"),
        ({}, "lora_path"),
    ],
)
async def test_what_cannot_be_loaded_changes_nothing(
    client: httpx.AsyncClient,
    bank_folder: Path,
    adapter_folders: Mapping[str, Path],
    body: dict[str, object],
    says: str,
) -> None:
    root = adapter_folders["ada"].parent
    if not (root / "linked").exists():
        (root / "linked").mkdir()
        (root / "linked" / "adapter_config.json").symlink_to("/etc/hostname")
        (root / "way-out").symlink_to("/etc")
    before = (bank_folder / "bank.json").read_bytes()
    reply = await client.post(LOAD, json={"lora_name": "eve", **body})
    assert reply.status_code == 400, reply.text
    assert says in reply.json()["error"]["message"]
    assert str(root) not in reply.text
    assert (bank_folder / "bank.json").read_bytes() == before


async def test_a_calibrated_bank_says_how_its_skills_can_change_again(
    client: httpx.AsyncClient, bank_folder: Path
) -> None:
    digest = load_bank(bank_folder).coordinates_digest
    tensors = {".p": torch.tensor(4.0)}
    add_calibration(bank_folder, Calibration("tuned", "norm", digest, tensors))
    body = {"lora_name": "dee", "lora_path": "dee"}
    reply = await client.post(LOAD, json=body)
    assert reply.status_code == 400
    assert "dynmerge calibrate BANK --drop tuned" in reply.json()["error"]["message"]
    drop_calibration(bank_folder, "tuned")
    assert (await client.post(LOAD, json=body)).status_code == 200


@pytest.mark.parametrize(("name", "status"), [("eve", 404), ("bob", 400)])
async def test_what_is_not_there_or_is_in_a_preset_is_not_unloaded(
    client: httpx.AsyncClient, name: str, status: int
) -> None:
    reply = await client.post(UNLOAD, json={"lora_name": name})
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, "lora_name")
    assert (await client.post("/v1/completions", json={"model": "bob"})).status_code == 200
