"""Against PEFT's own `add_weighted_adapter`, and mergekit's order of operations written out.

PEFT's `cat` is our linear. Its other rules combine A and B apart: they are other methods.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.merge_utils import task_arithmetic, ties
from torch import Tensor
from transformers import AutoModelForCausalLM

from dynmerge.adapters.base_model import BaseModel
from dynmerge.adapters.checkpoint import load_adapter
from dynmerge.bank.bank import BaseIdentity, FactorBank
from dynmerge.bank.build import build_bank
from tests import reference
from tests.bank_factory import SHAPES
from tests.conftest import save_adapter
from tests.merging.dense import ADAPTERS, assert_same, merged

MIXES: tuple[Mapping[str, float], ...] = (
    {"ada": 0.7, "bob": 0.3},
    {"ada": 0.2, "bob": 0.5, "dee": 0.3},
    {"bob": -0.5, "dee": 1.5},
)


def opened(base: Path, folders: Mapping[str, Path]) -> PeftModel:
    """The tiny model with all adapters, as PEFT loads them."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    (first, folder), *others = folders.items()
    loaded = PeftModel.from_pretrained(model, folder, adapter_name=first)
    for name, other in others:
        loaded.load_adapter(other, adapter_name=name)
    return loaded


def added_by_peft(
    model: PeftModel, weights: Mapping[str, float], rule: str, **options: object
) -> dict[str, Tensor]:
    """Module name -> the update of PEFT's merged adapter, in the layers it has."""
    torch.manual_seed(0)
    model.add_weighted_adapter(
        list(weights), list(weights.values()), "mix", combination_type=rule, **options
    )
    updates = {
        name.removeprefix("base_model.model."): layer.get_delta_weight("mix").detach().double()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and "mix" in layer.lora_A
    }
    model.delete_adapter("mix")
    return updates


@pytest.fixture(scope="module")
def peft_model(base_folder: Path, adapter_folders: Mapping[str, Path]) -> PeftModel:
    return opened(base_folder, adapter_folders)


def bank_of(base_folder: Path, folders: Mapping[str, Path]) -> FactorBank:
    base = BaseModel.open(base_folder)
    adapters = {name: load_adapter(folder, base) for name, folder in folders.items()}
    return build_bank(BaseIdentity("tiny", "0" * 64), adapters)


@pytest.fixture(scope="module")
def bank(base_folder: Path, adapter_folders: Mapping[str, Path]) -> FactorBank:
    return bank_of(base_folder, adapter_folders)


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest relative difference over the layers."""
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


@pytest.mark.parametrize("weights", MIXES, ids=str)
def test_linear_is_what_peft_calls_cat(
    peft_model: PeftModel, bank: FactorBank, weights: Mapping[str, float]
) -> None:
    assert_same(merged(weights, "linear", bank), added_by_peft(peft_model, weights, "cat"))


def test_peft_makes_cat_too_strong_where_the_first_adapter_is_rslora(
    peft_model: PeftModel, bank: FactorBank
) -> None:
    # The merged adapter inherits the first one's scaling rule: alpha / sqrt(r) of its own rank, 6.
    weights = {"cyd": 0.5, "ada": 0.5}
    ours = merged(weights, "linear", bank)
    theirs = added_by_peft(peft_model, weights, "cat")
    assert_same(theirs, {name: 6**0.5 * ours[name] for name in theirs})
    turned = added_by_peft(peft_model, dict(reversed(weights.items())), "cat")
    assert_same(turned, {name: ours[name] for name in turned})


# PEFT's other rules take adapters of one rank only.
ALIKE: Mapping[str, LoraConfig] = {
    "ada": LoraConfig(r=3, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "bob": LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "up_proj"]),
}
HALVES = dict.fromkeys(ALIKE, 0.5)
NOTHING_PRUNED = pytest.mark.filterwarnings("ignore:The density 1.0 is greater than or equal to 1")


@pytest.fixture(scope="module")
def alike(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("alike")
    return {
        name: save_adapter(base_folder, root / name, config, seed)
        for seed, (name, config) in enumerate(ALIKE.items(), start=11)
    }


@pytest.fixture(scope="module")
def alike_model(base_folder: Path, alike: Mapping[str, Path]) -> PeftModel:
    return opened(base_folder, alike)


@pytest.fixture(scope="module")
def alike_bank(base_folder: Path, alike: Mapping[str, Path]) -> FactorBank:
    return bank_of(base_folder, alike)


def shared(updates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layers that both adapters have."""
    return {name: update for name, update in updates.items() if "up_proj" not in name}


def of_factors(
    model: PeftModel, rule: Callable[[list[Tensor], Tensor], Tensor], weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """rule(B's) @ rule(A's), each side under the square roots of weight times scaling."""
    updates = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        having = [skill for skill in weights if skill in layer.lora_A]
        roots = torch.tensor([(weights[skill] * layer.scaling[skill]) ** 0.5 for skill in having])
        A = rule([layer.lora_A[skill].weight.detach() for skill in having], roots)
        B = rule([layer.lora_B[skill].weight.detach() for skill in having], roots)
        updates[name.removeprefix("base_model.model.")] = (B @ A).double()
    return updates


def test_peft_linear_multiplies_every_b_with_every_a(
    alike_model: PeftModel, alike_bank: FactorBank
) -> None:
    theirs = added_by_peft(alike_model, HALVES, "linear")
    assert_same(theirs, of_factors(alike_model, task_arithmetic, HALVES))
    ours = merged(HALVES, "linear", alike_bank)
    assert_same(ours, added_by_peft(alike_model, HALVES, "cat"))
    assert distance(shared(theirs), shared(ours)) > 0.5


@NOTHING_PRUNED
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_peft_ties_trims_and_elects_on_a_and_b_apart_and_ours_on_the_updates(
    alike_model: PeftModel, alike_bank: FactorBank, density: float
) -> None:
    def apart(factors: list[Tensor], weights: Tensor) -> Tensor:
        return ties(factors, weights, density)

    theirs = added_by_peft(alike_model, HALVES, "ties", density=density)
    assert_same(theirs, of_factors(alike_model, apart, HALVES))
    text = f"ties;space=full;scope=module;rank=99;density={density}"
    ours = merged(HALVES, text, alike_bank)
    # On dense updates PEFT's steps are ours but for the divisor: the count, not the weight.
    alone = {skill: merged({skill: 1.0}, "linear", alike_bank) for skill in HALVES}
    for name, update in shared(ours).items():
        deltas = [alone[skill][name] for skill in HALVES]
        dense = ties(deltas, torch.tensor(list(HALVES.values())), density)
        assert_same({name: update}, {name: 2 * dense})
    assert distance(shared(theirs), shared(ours)) > 0.5


@NOTHING_PRUNED
@pytest.mark.parametrize(
    ("rule", "without_drop"), [("dare_linear", "linear"), ("dare_ties", "ties")]
)
def test_peft_dare_drops_from_a_and_b_apart_and_is_no_sum_even_where_nothing_is_dropped(
    alike_model: PeftModel, alike_bank: FactorBank, rule: str, without_drop: str
) -> None:
    theirs = added_by_peft(alike_model, HALVES, rule, density=1.0)
    options = {} if without_drop == "linear" else {"density": 1.0}
    assert_same(theirs, added_by_peft(alike_model, HALVES, without_drop, **options))
    name = rule.replace("_", "-")
    ours = merged(HALVES, f"{name};density=1;space=full;rank=99", alike_bank)
    plain = "linear" if without_drop == "linear" else "ties;density=1;space=full;rank=99"
    assert_same(ours, merged(HALVES, plain, alike_bank))
    assert distance(shared(theirs), shared(ours)) > 0.5


def by_mergekit(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """mergekit 0.1.5's order for `ties`, one tensor at a time.

    Keep the int(density * n) largest; weight; elect the sign of the weighted sum, + at zero; sum
    those that have it; divide by their weights.
    """
    weighted = []
    for delta, weight in zip(deltas, weights, strict=True):
        kept = torch.zeros(delta.numel(), dtype=delta.dtype)
        largest = delta.abs().flatten().argsort(descending=True)[: int(density * delta.numel())]
        kept[largest] = delta.flatten()[largest]
        weighted.append(weight * kept.view_as(delta))
    elected = torch.where(sum(weighted, torch.zeros(())) >= 0, 1.0, -1.0)
    total, divisor = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for part, weight in zip(weighted, weights, strict=True):
        agrees = part.sign() == elected
        total, divisor = total + part * agrees, divisor + weight * agrees
    return total / torch.where(divisor == 0, 1.0, divisor)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize(
    "weights", [{"ada": 0.2, "bob": 0.5, "cyd": 0.3}, {"ada": 0.9, "bob": 0.1}], ids=str
)
def test_ties_in_mergekits_order_is_mergekits(weights: Mapping[str, float], density: float) -> None:
    # Densities of which every layer keeps a whole number: mergekit rounds down, we round up.
    text = f"ties;order=mergekit;scope=module;space=full;rank=99;density={density}"
    expected = {}
    for module in SHAPES:
        having = [skill for skill in weights if module in ADAPTERS[skill].modules]
        if having:
            deltas = [reference.delta(ADAPTERS[skill], module) for skill in having]
            expected[module] = by_mergekit(deltas, [weights[skill] for skill in having], density)
    assert_same(merged(weights, text), expected)
    elected_first = merged(weights, text.replace("order=mergekit", "order=paper"))
    if density > 0.2:  # below it, no entry of two skills is kept
        assert distance(elected_first, {"layers.0.q": expected["layers.0.q"]}) > 1e-2
