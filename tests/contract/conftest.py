"""Fixtures: one running server per engine and session, and a client of it.

What these tests hold is true of every engine; where engines may differ they say nothing.
"""

from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import httpx
import pytest
import torch

from dynmerge.adapters.base_model import BaseModel
from dynmerge.adapters.checkpoint import load_adapter
from dynmerge.bank.bank import BaseIdentity, FactorBank
from dynmerge.bank.build import build_bank
from dynmerge.bank.calibration import AT
from dynmerge.bank.edit import with_calibration
from dynmerge.bank.storage import load_bank, save_bank
from dynmerge.merging.demands import BEST
from dynmerge.preference import Preference
from tests.bank_factory import random_calibration, random_calibrations
from tests.conftest import ADAPTERS, save_adapter, tiny_model, tiny_tokenizer
from tests.contract.asking import ASKED_OF_ALL
from tests.contract.server import HAS_VLLM, Served, running

HEAD_DIM = 32  # the least that vLLM's attention takes on a CPU
ENGINES = ["embedded", *([pytest.param("vllm", marks=pytest.mark.vllm)] if HAS_VLLM else [])]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model that every engine can run, as an ordinary folder named `tiny`."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(head_dim=HEAD_DIM).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_folders(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Skill name -> PEFT folder of that model, one for each row of ADAPTERS."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(base_folder, root / name, config, seed)
        for seed, (name, config) in enumerate(ADAPTERS.items(), start=1)
    }


@pytest.fixture(scope="session")
def bank_folder(
    base_folder: Path, adapter_folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The bank of all adapters, on disk."""
    base = BaseModel.open(base_folder)
    adapters = {name: load_adapter(folder, base) for name, folder in adapter_folders.items()}
    folder = tmp_path_factory.mktemp("banks") / "bank"
    bank = build_bank(BaseIdentity(base.name, base.fingerprint), adapters)
    save_bank(calibrated(bank), folder, source=str(base_folder))
    return folder


def calibrated(bank: FactorBank) -> FactorBank:
    """With calibrations that serve those who name them; without a name, it serves `linear`."""
    for each in random_calibrations(bank):
        if each.method not in BEST:
            bank = with_calibration(bank, each)
    rho = torch.tensor(Preference.parse(ASKED_OF_ALL).vector(bank.names))
    only = random_calibration(
        bank, "tara-a", lambda module: {"fixed": (sum(module.ranks),)}, "fixed", {AT: rho}
    )
    return with_calibration(bank, only)


@pytest.fixture(scope="session", params=ENGINES)
def served(
    request: pytest.FixtureRequest,
    bank_folder: Path,
    base_folder: Path,
    adapter_folders: Mapping[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """The server of one engine."""
    engine: str = request.param
    folder = tmp_path_factory.mktemp(engine)
    with running(engine, bank_folder, folder) as url:
        yield Served(engine, url, load_bank(bank_folder), base_folder, adapter_folders, folder)


@pytest.fixture
async def client(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the server. Its patience is for what an engine compiles on first use."""
    # Nothing here is encrypted, and reading certificates takes longer than many a request.
    async with httpx.AsyncClient(base_url=served.url, timeout=180, verify=False) as client:
        yield client
