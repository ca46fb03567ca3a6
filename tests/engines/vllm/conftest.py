"""A base model that vLLM runs on a CPU, and the usual adapters for it."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.base_model import BaseModel
from dynmerge.adapters.checkpoint import load_adapter
from dynmerge.bank.bank import BaseIdentity, FactorBank
from dynmerge.bank.build import build_bank
from dynmerge.bank.storage import save_bank
from tests.conftest import ADAPTERS, save_adapter, tiny_model, tiny_tokenizer

HEAD_DIM = 32
SIZE = 0.1  # of the factors' entries: updates as large, beside these weights, as elsewhere


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model with heads as wide as vLLM needs."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(head_dim=HEAD_DIM).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide_adapters(
    wide_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Adapter]:
    """Skill name -> adapter, one for each row of ADAPTERS."""
    root, base = tmp_path_factory.mktemp("adapters"), BaseModel.open(wide_folder)
    return {
        name: load_adapter(save_adapter(wide_folder, root / name, config, seed, SIZE), base)
        for seed, (name, config) in enumerate(ADAPTERS.items(), start=1)
    }


@pytest.fixture(scope="session")
def wide_bank(wide_folder: Path, wide_adapters: Mapping[str, Adapter]) -> FactorBank:
    """The bank of these adapters."""
    base = BaseModel.open(wide_folder)
    return build_bank(BaseIdentity(base.name, base.fingerprint), wide_adapters)


@pytest.fixture
def wide_bank_folder(wide_folder: Path, wide_bank: FactorBank, tmp_path: Path) -> Path:
    """The bank on disk, free to be replaced."""
    save_bank(wide_bank, tmp_path / "bank", source=str(wide_folder))
    return tmp_path / "bank"
