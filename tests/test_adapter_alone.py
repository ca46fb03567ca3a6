"""One skill at 1 is its adapter as PEFT serves it; zero is the base model, bit for bit."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from dynmerge.adapters.base_model import BaseModel
from dynmerge.adapters.checkpoint import load_adapter
from dynmerge.bank.bank import BaseIdentity, FactorBank
from dynmerge.bank.build import build_bank
from dynmerge.engines.transformers.layers import Layers
from dynmerge.merging.choice import default_method
from dynmerge.merging.merge import Merge, merge
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from tests import reference
from tests.conftest import ADAPTERS

IDS = torch.tensor([[5, 70, 141, 212, 33, 304, 18, 99, 250, 7, 61]])


@pytest.fixture(scope="module")
def bank(base_folder: Path, adapter_folders: dict[str, Path]) -> FactorBank:
    base = BaseModel.open(base_folder)
    adapters = {name: load_adapter(folder, base) for name, folder in adapter_folders.items()}
    return build_bank(BaseIdentity(base.name, base.fingerprint), adapters)


def merged(bank: FactorBank, text: str) -> Merge:
    return merge(bank, Recipe(Preference.parse(text), default_method(), bank.digest))


@torch.no_grad()
def logits(model: PreTrainedModel, bank: FactorBank, made: Merge) -> torch.Tensor:
    layers = Layers(model, bank, 1)
    layers.prepare([made], [IDS.shape[1]])
    found = model(IDS).logits
    layers.remove()
    return found


@pytest.mark.parametrize("skill", ADAPTERS)
def test_one_skill_at_one_is_what_peft_serves(
    skill: str,
    bank: FactorBank,
    base_model: PreTrainedModel,
    base_folder: Path,
    adapter_folders: dict[str, Path],
) -> None:
    ours = logits(base_model, bank, merged(bank, skill))
    plain = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(plain, adapter_folders[skill]).eval()(IDS).logits
        base = base_model(IDS).logits
    assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (theirs - base).abs().max() > 0.1  # the adapter does something


def test_a_preference_is_the_base_weights_plus_the_weighted_deltas(
    bank: FactorBank,
    base_model: PreTrainedModel,
    base_folder: Path,
    adapter_folders: dict[str, Path],
) -> None:
    weights = {"ada": 0.4, "bob": 0.1, "cyd": 0.2, "dee": 0.3}
    text = ", ".join(f"{name}={weight}" for name, weight in weights.items())
    ours = logits(base_model, bank, merged(bank, text))
    base = BaseModel.open(base_folder)
    adapters = {name: load_adapter(folder, base) for name, folder in adapter_folders.items()}
    dense = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    reference.written_out(dense, reference.merged_deltas(adapters, weights))
    with torch.no_grad():
        assert_close(ours, dense(IDS).logits, rtol=0, atol=1e-4)


def test_all_zero_is_the_base_model_bit_for_bit(
    bank: FactorBank, base_model: PreTrainedModel
) -> None:
    with torch.no_grad():
        expected = base_model(IDS).logits
    assert torch.equal(logits(base_model, bank, merged(bank, "ada=0, bob=0")), expected)
    # Beside other requests the hooks do run, and add an exact zero to the base model's tokens.
    layers = Layers(base_model, bank, 2)
    layers.prepare([None, merged(bank, "bob")], [5, 6])
    with torch.no_grad():
        together = base_model(IDS).logits
    layers.remove()
    assert torch.equal(together[:, :5], expected[:, :5])
    assert not torch.equal(together[:, 5:], expected[:, 5:])
