"""Every method against its dense float64 twin, on adapters that differ in rank and modules."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.lowrank import LowRank
from dynmerge.bank.bank import FactorBank
from dynmerge.merging.choice import parse_method, parts_of
from dynmerge.merging.lego import starts
from dynmerge.merging.methods import METHODS
from dynmerge.merging.sparsify import uniform
from tests import reference
from tests.bank_factory import BASE, random_adapter
from tests.merging.dense import ADAPTERS, BANK, assert_same, bank_of, merged, soups_of

WEIGHTS: Sequence[Mapping[str, float]] = (
    {"ada": 0.5, "bob": 0.3, "cyd": 0.2},
    {"ada": 1.5, "bob": -0.25, "cyd": 0.5},
)
SUBSET: Mapping[str, float] = {"ada": 0.6, "bob": 0.4}
SPACES = ("core", "knots", "full")
ELEMENTWISE = ("ties", "dare-linear", "dare-ties", "della")
METHOD_TEXTS = (
    *(name for name in METHODS if name != "iso-c-dense"),
    "pico+lora-soups;gauge=canonical",
    "pico+tara-a;gauge=canonical",
    "pico+tara-b;pool=static",
    "tara-a+svc",
    "tara-b;scale=0.8",
    "regmean;ridge=0.5",
    "regmean+svc",
    "linear;scale=0.8",
    "linear;p=4",
    "linear;p=inf",
    *(f"{name};space={space}" for name in ELEMENTWISE for space in SPACES[1:]),
    "ties;density=1",
    "ties;scope=module",
    "ties;scope=module;space=full;density=0.5",
    "ties;sign=count",
    "ties;sign=count;space=full",
    "ties;aggregate=sum",
    "ties;order=mergekit;density=0.6",
    "ties;order=mergekit;scope=module;space=full",
    "ties;space=full;rank=2",
    "dare-linear;density=0.2;seed=7;p=2",
    "dare-ties;scope=module;sign=count",
    "della;rescale=l1;epsilon=0.2",
    "della;rescale=l1;space=full",
    "knots-ties;density=0.7;sign=count",
    "tsv-m;p=1",
    "iso-c;p=1;scale=2",
    "iso-cts;common=0.4",
    "iso-cts;common=1",
    "lego;clusters=2",
    "lego;signs=aligned;seed=3",
    "pico",
    "pico;pool=static",
    "pico;gauge=canonical",
    "pico;restore=none;gauge=canonical;pool=static",
    "pico+ties",
    "pico+ties;space=full",
    "pico+tsv-m",
    "pico+iso-cts",
    "pico+knots-ties",
    "pico+lego",
    "linear+svc",
    "linear+svc;floor=1",
    "ties+svc",
    "ties+svc;space=full",
    "knots-ties+svc",
    "iso-c+svc",
    "iso-cts+svc",
    "tsv-m+svc;floor=1",
    "pico+dare-ties+svc;gauge=canonical;scale=1.5",
)


# What sees the support, or what a skill outside of it left in the bases.
OF_A_SUBSET = (
    *(name for name in METHODS if name != "iso-c-dense"),
    "ties;space=full",
    "della;space=knots",
    "pico",
    "pico;pool=static",
    "linear+svc",
    "pico+dare-ties+svc;gauge=canonical;scale=1.5",
)


def by_the_oracle(
    adapters: Mapping[str, Adapter], bank: FactorBank, weights: Mapping[str, float], text: str
) -> dict[str, Tensor]:
    """The dense float64 twin's merge, given the draws and bases that are the bank's own."""
    choice = parse_method(text)
    values = dict(choice.parameters)
    seed = int(values.get("seed", 0))
    tasks = {task.name: task for task in bank.tasks}

    merger = parts_of(choice.name)[1]
    needs = METHODS[merger].needs
    calibration = bank.calibration(merger) if needs == merger else None

    def draws(skill: str, module: str, shape: tuple[int, int]) -> Tensor:
        return uniform(shape, seed, tasks[skill], module)

    return reference.merged_by(
        choice.name,
        adapters,
        weights,
        values,
        draws=draws,
        starts=lambda module, units, clusters: starts(module, units, clusters, seed),
        soups=soups_of(adapters),
        learned=None if calibration is None else calibration.tensors,
        form="" if calibration is None else calibration.form,
        bases={module.name: (module.U.double(), module.V.double()) for module in bank.modules},
    )


def taken(text: str, weights: Mapping[str, float]) -> Mapping[str, float]:
    """The weights, or their magnitudes where the method takes no negative ones."""
    row = METHODS[parts_of(parse_method(text).name)[1]]
    return weights if row.takes_negative else {name: abs(w) for name, w in weights.items()}


@pytest.mark.parametrize("text", METHOD_TEXTS)
def test_a_method_is_its_dense_twin(text: str) -> None:
    seen = [*WEIGHTS, *([SUBSET] if text in OF_A_SUBSET else [])]
    for given in seen + ([{"bob": 1.0}] if "iso-c" in text else []):
        weights = taken(text, given)
        assert_same(merged(weights, text), by_the_oracle(ADAPTERS, BANK, weights, text))


def silent(adapter: Adapter) -> Adapter:
    """The same modules and A's with B = 0, as LoRA starts."""
    modules = {
        name: LowRank(A=update.A, B=torch.zeros_like(update.B))
        for name, update in adapter.modules.items()
    }
    return Adapter(modules, BASE.name)


# One skill has more ranks than a layer has rows; one changes nothing and has a layer to itself.
ODD = {
    "ada": ADAPTERS["ada"],
    "nil": silent(random_adapter({"layers.0.q": 2, "layers.0.v": 1, "layers.1.up": 3}, 21)),
    "wide": random_adapter({"layers.0.q": 2, "layers.0.v": 5}, 22),
}
ODD_BANK = bank_of(ODD)
ODD_TEXTS = (
    *(name for name in METHODS if name != "iso-c-dense"),
    "pico;gauge=canonical",
    "pico+tsv-m+svc",
    "pico+knots-ties+svc;scope=module",
)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_skill_of_more_ranks_than_the_layer_has_rows_is_like_any_other(text: str) -> None:
    for given in ({"ada": 0.6, "wide": 0.4}, {"wide": -1.0}):
        weights = taken(text, given)
        expected = by_the_oracle(ODD, ODD_BANK, weights, text)
        assert_same(merged(weights, text, ODD_BANK), expected)


NIL: Sequence[Mapping[str, float]] = (
    {"ada": 0.5, "nil": 0.3, "wide": 0.2},
    {"nil": -0.5, "wide": 1.5},
    {"nil": 1.0},
)


@pytest.mark.parametrize(
    "text", [*ODD_TEXTS, "ties;scope=module", "ties;space=full", "knots-ties;scope=module"]
)
def test_a_skill_that_changes_nothing_is_like_any_other(text: str) -> None:
    for given in NIL:
        weights = taken(text, given)
        expected = by_the_oracle(ODD, ODD_BANK, weights, text)
        assert_same(merged(weights, text, ODD_BANK), expected)


def test_a_skill_that_changes_nothing_gives_iso_c_dense_nothing_to_complete() -> None:
    for weights in NIL:
        for module, update in merged(weights, "iso-c-dense", ODD_BANK).items():
            having = {name for name in weights if module in ODD[name].modules}
            assert bool(update.isfinite().all())
            assert bool(update.abs().max() > 1e-6) == bool(having - {"nil"}), module


@pytest.mark.parametrize("weights", [*WEIGHTS, SUBSET, {"bob": 1.0}], ids=str)
def test_iso_c_dense_is_flat_in_all_directions_and_right_in_the_real_ones(
    weights: Mapping[str, float],
) -> None:
    choice = dict(parse_method("iso-c-dense").parameters)
    expected = reference.isotropic_dense_part(ADAPTERS, weights, choice)
    for module, update in merged(weights, "iso-c-dense").items():
        real = expected.get(module, torch.zeros_like(update))
        if real.abs().max() == 0:
            assert update.abs().max() == 0
            continue
        singular = torch.linalg.svdvals(update)
        torch.testing.assert_close(singular, singular.mean().expand_as(singular), rtol=1e-5, atol=0)
        left, _, right = reference.real_svd(real)
        inside = left @ left.mT @ update @ right @ right.mT
        assert_same({module: inside}, {module: real})


def test_the_bases_are_those_of_core_space() -> None:
    for module in BANK.modules:
        U, V = reference.core_bases(ADAPTERS, module.name)
        for mine, its in ((module.U.double(), U), (module.V.double(), V)):
            assert mine.shape == its.shape
            signs = (mine * its).sum(0).sign()
            torch.testing.assert_close(mine, its * signs, rtol=0, atol=1e-5)
