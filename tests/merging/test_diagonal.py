"""A merge of one number per stacked direction is the merge."""

from collections.abc import Mapping
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from dynmerge.bank.bank import FactorBank
from dynmerge.merging.choice import parse_method
from dynmerge.merging.diagonal import Diagonal, is_diagonal
from dynmerge.merging.methods import AFTER, CALIBRATION, METHODS
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from tests.bank_factory import random_adapter
from tests.merging.dense import ADAPTERS, BANK, bank_of, made_by

DIAGONAL = ("linear", "lora-soups", "tuned", "adamerging", "tara-a")
TEXTS = (
    "linear",
    "linear;p=4",
    "linear;p=inf",
    "linear;scale=0.8",
    "lora-soups;scale=2",
    "tuned",
    "adamerging;scale=0.8",
    "tara-a",
)
WEIGHTS: tuple[Mapping[str, float], ...] = (
    {"ada": 0.5, "bob": 0.3, "cyd": 0.2},
    {"ada": 0.6, "bob": 0.4},
    {"cyd": 1.0},
    {"bob": -1.0},
    {"ada": 1.5, "bob": -0.25, "cyd": -2.0},
)
BANKS = {
    "unequal": BANK,
    "one skill": bank_of({"bob": ADAPTERS["bob"]}),
    "one module": bank_of(
        {name: random_adapter({"layers.1.up": rank}, rank) for name, rank in (("ada", 1), ("b", 9))}
    ),
    # Ten directions in four outputs: the shared bases have fewer columns than there are ranks.
    "more ranks than outputs": bank_of(
        {name: random_adapter({"layers.0.v": rank}, rank) for name, rank in (("ada", 4), ("b", 6))}
    ),
}


def diagonal(bank: FactorBank, recipe: Recipe) -> Tensor:
    """Flat as a merge's core: left diag(d) right, module after module."""
    made = Diagonal(bank)
    parts = torch.split(made.of(recipe), made.sizes)
    return torch.cat(
        [
            (module.left.double() @ d.double().diag() @ module.right.double()).flatten()
            for module, d in zip(bank.modules, parts, strict=True)
        ]
    )


def assert_is_the_merge(bank: FactorBank, weights: Mapping[str, float], method: str) -> None:
    made = made_by(weights, method, bank)
    assert made.core is not None
    expected = made.core.double()
    size = max(float(expected.abs().max()), 1.0)
    found = diagonal(bank, made.recipe)
    assert_close(found / size, expected / size, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("text", "weights"), [*product(TEXTS, WEIGHTS)])
def test_between_the_bases_it_is_the_core_of_the_merge(
    text: str, weights: Mapping[str, float]
) -> None:
    assert_is_the_merge(BANK, weights, text)


@pytest.mark.parametrize(("name", "text"), [*product(BANKS, TEXTS)])
def test_whatever_the_bank(name: str, text: str) -> None:
    bank = BANKS[name]
    weights = {skill: 0.75 - place for place, skill in enumerate(bank.names)}
    assert_is_the_merge(bank, weights, text)


@settings(max_examples=40)
@given(
    st.dictionaries(st.sampled_from(BANK.names), st.integers(-2000, 2000)).filter(
        lambda thousandths: any(thousandths.values())
    ),
    st.sampled_from(DIAGONAL),
    st.sampled_from(["1", "1.5", "2", "64", "inf"]),
    st.integers(0, 4000),
)
def test_whatever_the_multipliers_and_parameters(
    thousandths: dict[str, int], name: str, p: str, scale: int
) -> None:
    weights = {name: value / 1000 for name, value in thousandths.items()}
    text = f"linear;p={p}" if name == "linear" else name
    assert_is_the_merge(BANK, weights, f"{text};scale={scale / 1000}")


@pytest.mark.parametrize("text", TEXTS)
def test_directions_of_a_skill_that_is_not_asked_for_get_nothing(text: str) -> None:
    preference = Preference.of({"bob": 0.8}, normalize=False)
    made = Diagonal(BANK)
    found = made.of(Recipe(preference, parse_method(text), BANK.digest))
    parts = torch.split(found, made.sizes)
    for module, d in zip(BANK.modules, parts, strict=True):
        ada, bob, cyd = torch.split(d, list(module.ranks))
        assert not ada.any()
        assert not cyd.any()
        assert bob.all()
        assert len(set(bob.tolist())) <= 1


@pytest.mark.parametrize("text", DIAGONAL)
def test_the_base_model_is_all_zeros(text: str) -> None:
    recipe = Recipe(Preference.base_model(), parse_method(text), BANK.digest)
    assert_close(Diagonal(BANK).of(recipe), torch.zeros(sum(Diagonal(BANK).sizes)))


def test_a_share_of_the_base_model_leaves_the_others_theirs() -> None:
    def of(weights: Mapping[str, float]) -> Tensor:
        preference = Preference.of(weights)
        return Diagonal(BANK).of(Recipe(preference, parse_method("linear"), BANK.digest))

    assert_close(of({"ada": 0.7, "base": 0.3}), 0.7 * of({"ada": 1}))


def test_there_is_one_number_for_every_rank_of_every_module_in_float32() -> None:
    made = Diagonal(BANK)
    preference = Preference.of({"ada": 1})
    d = made.of(Recipe(preference, parse_method("linear"), BANK.digest))
    assert made.sizes == [sum(module.ranks) for module in BANK.modules]
    assert d.shape == (sum(made.sizes),)
    assert d.dtype == torch.float32


@pytest.mark.parametrize("name", METHODS)
def test_only_what_weighs_directions_is_diagonal(name: str) -> None:
    assert is_diagonal(parse_method(name)) == (name in DIAGONAL)
    assert not is_diagonal(parse_method(f"{CALIBRATION}+{name}"))
    if METHODS[name].takes_svc:
        assert not is_diagonal(parse_method(f"{name}+{AFTER}"))
        assert not is_diagonal(parse_method(f"{CALIBRATION}+{name}+{AFTER}"))


def test_calibration_alone_is_not_diagonal() -> None:
    assert not is_diagonal(parse_method(CALIBRATION))
