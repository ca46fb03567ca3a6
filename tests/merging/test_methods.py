from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dynmerge.adapters.adapter import Adapter
from dynmerge.bank.bank import FactorBank
from dynmerge.errors import DynmergeError, MethodError
from dynmerge.merging.merge import merge
from dynmerge.merging.methods import METHODS, Choice, assemble, default_method, parse_method
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from tests import reference
from tests.bank_factory import random_adapters, random_bank

ADAPTERS = random_adapters()
BANK = random_bank(ADAPTERS)


def dense(bank: FactorBank, core: Tensor) -> dict[str, Tensor]:
    """What a flat core stands for: module name -> (d_out, d_in) float64."""
    return {
        module.name: module.U.double() @ C.double() @ module.V.double().mT
        for module, C in zip(bank.modules, bank.layout.split(core), strict=True)
    }


def merged(
    weights: Mapping[str, float], method: str = "linear", bank: FactorBank = BANK
) -> dict[str, Tensor]:
    preference = Preference.of(weights, normalize=False, allow_negative=True)
    return dense(bank, assemble(bank, [preference], parse_method(method))[0])


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for module, update in actual.items():
        reference_update = expected.get(module, torch.zeros_like(update))
        assert_close(update, reference_update, rtol=1e-5, atol=1e-5)
    assert set(expected) <= set(actual)


def alone(adapter: Adapter) -> dict[str, Tensor]:
    return {module: reference.delta(adapter, module) for module in adapter.modules}


@pytest.mark.parametrize("scale", [1.0, 0.8])
@pytest.mark.parametrize(
    "weights",
    [{"ada": 0.7, "bob": 0.3}, {"ada": 0.2, "bob": 0.5, "cyd": 0.3}, {"ada": 1.5, "cyd": -0.5}],
)
def test_linear_is_the_weighted_sum_of_deltas_whatever_the_ranks(
    weights: dict[str, float], scale: float
) -> None:
    expected = reference.merged_deltas(ADAPTERS, weights, scale)
    assert_same(merged(weights, f"linear;scale={scale}"), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("skill", ADAPTERS)
def test_one_skill_at_one_is_that_adapter(method: str, skill: str) -> None:
    assert_same(merged({skill: 1.0}, method), alone(ADAPTERS[skill]))


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_adapters_does_not_matter(method: str) -> None:
    backwards = random_bank(dict(reversed(ADAPTERS.items())))
    weights = {"ada": 0.2, "bob": 0.5, "cyd": 0.3}
    assert backwards.digest == BANK.digest
    assert_same(merged(weights, method, backwards), merged(weights, method))


@pytest.mark.parametrize("method", METHODS)
def test_weight_zero_is_absence(method: str) -> None:
    two = random_bank({name: ADAPTERS[name] for name in ("ada", "bob")})
    weights = {"ada": 0.6, "bob": 0.4}
    with_zero = merged({**weights, "cyd": 0.0}, method)
    assert_same(with_zero, merged(weights, method, two))
    assert with_zero["layers.1.up"].abs().max() == 0


def test_minus_one_negates_and_doubling_doubles() -> None:
    half = merged({"ada": 0.5, "bob": 0.25})
    assert_same(merged({"ada": -0.5, "bob": -0.25}), {name: -d for name, d in half.items()})
    assert_same(merged({"ada": 1.0, "bob": 0.5}), {name: 2 * d for name, d in half.items()})


def test_two_different_adapters_at_plus_and_minus_one_leave_no_cross_terms() -> None:
    difference = {
        module: reference.delta(ADAPTERS["ada"], module) - reference.delta(ADAPTERS["bob"], module)
        for module in ADAPTERS["ada"].modules
    }
    difference["layers.0.v"] = -reference.delta(ADAPTERS["bob"], "layers.0.v")
    assert_same(merged({"ada": 1.0, "bob": -1.0}), difference)


def test_a_module_only_one_adapter_has_survives() -> None:
    update = merged({"ada": 0.5, "cyd": 0.5})["layers.1.up"]
    assert_close(
        update, 0.5 * reference.delta(ADAPTERS["cyd"], "layers.1.up"), rtol=1e-5, atol=1e-5
    )


def test_many_preferences_in_one_step_are_each_alone() -> None:
    preferences = [Preference.of({"ada": a, "bob": 10 - a, "cyd": 3}) for a in range(11)]
    together = assemble(BANK, preferences, default_method())
    for row, preference in zip(together, preferences, strict=True):
        assert_close(row, assemble(BANK, [preference], default_method())[0])


def test_a_merge_is_cast_once_and_counts_its_bytes() -> None:
    recipe = Recipe(Preference.of({"ada": 1, "bob": 1}), default_method(), BANK.digest)
    made = merge(BANK, recipe, torch.bfloat16)
    assert made.core.dtype == torch.bfloat16
    assert made.nbytes == 2 * BANK.layout.size
    assert_close(made.core, merge(BANK, recipe).core.to(torch.bfloat16), rtol=0, atol=0)


def test_a_recipe_for_another_bank_is_refused() -> None:
    with pytest.raises(DynmergeError, match="another bank"):
        merge(BANK, Recipe(Preference.of({"ada": 1}), default_method(), "other"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tiess", "no method 'tiess' (known: linear"),
        ("linear;density=0.2", "linear has no parameter 'density' (it takes: scale)"),
        ("linear;scale=9", "linear;scale must lie within 0 .. 4"),
        ("linear;scale=-1", "must lie within 0 .. 4"),
        ("linear;scale", "is a number, not True"),
        ('linear;scale="1"', "is a number"),
        ("linear scale", "is not a method"),
        ("", "is not a method"),
        ("0.5", "no method"),
        ("linéar", "is not a method"),
    ],
)
def test_a_bad_method_is_an_error_that_says_what_is_allowed(text: str, says: str) -> None:
    with pytest.raises(MethodError) as caught:
        parse_method(text)
    assert says in str(caught.value)
    assert caught.value.param == "X-Dynmerge-Method"


@pytest.mark.parametrize("name", METHODS)
def test_a_choice_is_printed_as_it_is_read(name: str) -> None:
    assert parse_method(str(parse_method(name))) == parse_method(name)


def test_a_choice_parameter_takes_its_words_only() -> None:
    space = Choice("space", "core", ("core", "full"), "where entries are compared")
    assert space.check("full", "ties", "here") == "full"
    with pytest.raises(MethodError, match=r"here: ties;space is one of core\|full, not 'knots'"):
        space.check("knots", "ties", "here")


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), -1])
def test_a_number_out_of_range_is_refused_whatever_its_size(value: float) -> None:
    with pytest.raises(MethodError, match=r"here: linear;scale must lie within 0 \.\. 4"):
        METHODS["linear"].choose("linear", {"scale": value}, "here")


def test_a_number_is_what_a_header_can_say() -> None:
    choice = METHODS["linear"].choose("linear", {"scale": 0.123456}, "here")
    assert parse_method(str(choice)) == choice
