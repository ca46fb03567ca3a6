"""What a bank carries is what its methods read, and it is read once."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dynmerge.bank.bank import FactorBank
from dynmerge.bank.edit import with_calibration
from dynmerge.errors import BankError, MethodError
from dynmerge.merging.choice import parse_method
from dynmerge.merging.merge import Merger, merge
from dynmerge.merging.methods import METHODS
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from tests.bank_factory import random_bank, random_calibration, random_calibrations
from tests.merging.dense import BANK, made_by, merged

PLAIN = random_bank()
CALIBRATED = [name for name, row in METHODS.items() if row.needs == name]
THREE: Mapping[str, float] = {"ada": 0.2, "bob": 0.5, "cyd": 0.3}


def without_label(bank: FactorBank, method: str, label: str) -> FactorBank:
    calibration = bank.calibration(method)
    kept = {name: t for name, t in calibration.tensors.items() if not name.endswith(f".{label}")}
    return with_calibration(bank, replace(calibration, tensors={**kept, ".more": torch.ones(())}))


@pytest.mark.parametrize(
    ("method", "label"),
    [
        ("tuned", "p"),
        ("adamerging", "ratio"),
        ("adamerging", "gain"),
        ("tara-a", "bubbles"),
        ("tara-b", "ratio"),
        ("core", "ratio"),
        ("core", "tables"),
        ("regmean", "moments"),
    ],
)
def test_a_calibration_without_what_its_method_reads_is_refused_at_load(
    method: str, label: str
) -> None:
    bank = without_label(BANK, method, label)
    with pytest.raises(BankError, match=f"for {method}: .*'{label}' has the shape none, not"):
        Merger(bank)


@pytest.mark.parametrize("method", CALIBRATED)
def test_tensors_of_another_shape_are_refused_at_load(method: str) -> None:
    calibration = BANK.calibration(method)
    longer: dict[str, Tensor] = {
        name: torch.cat([t, t]) if t.ndim else t[None] for name, t in calibration.tensors.items()
    }
    bank = with_calibration(BANK, replace(calibration, tensors=longer))
    with pytest.raises(BankError, match=rf"for {method}: layers.* has the shape \(.*\), not \("):
        Merger(bank)


def test_a_form_that_nobody_knows_is_refused_at_load() -> None:
    odd = replace(BANK.calibration("tara-a"), form="spline")
    with pytest.raises(BankError, match=r"tara-a is of form 'spline'; .* knows ratio, bubbles"):
        Merger(with_calibration(BANK, odd))


def test_a_norm_that_is_none_is_refused_at_load() -> None:
    odd = replace(BANK.calibration("tuned"), tensors={".p": torch.tensor(-1.0)})
    with pytest.raises(BankError, match="the calibration for tuned: p is -1, below 1"):
        Merger(with_calibration(BANK, odd))


def test_a_form_for_one_preference_says_which() -> None:
    fixed = random_calibration(
        PLAIN, "tara-a", lambda module: {"fixed": (sum(module.ranks),)}, "fixed"
    )
    with pytest.raises(BankError, match=r"'at' has the shape none, not \(3,\)"):
        Merger(with_calibration(PLAIN, fixed))
    at = torch.tensor([0.2, 0.5, 0.3])
    bank = with_calibration(PLAIN, replace(fixed, tensors={**fixed.tensors, ".at": at}))
    recipe = Recipe(Preference.of(THREE), parse_method("tara-a"), bank.digest)
    assert merge(bank, recipe).core is not None
    other = replace(recipe, preference=Preference.of({"ada": 1}))
    with pytest.raises(MethodError, match=r"one preference .*, ada=0\.2, bob=0\.5, cyd=0\.3"):
        merge(bank, other)


def test_a_merger_itself_refuses_what_an_offer_would() -> None:
    with pytest.raises(MethodError, match="core takes no negative weight"):
        made_by({"ada": 1.0, "bob": -0.5}, "core")
    with pytest.raises(MethodError, match="tara-a needs a calibration"):
        made_by(THREE, "tara-a", PLAIN)


@pytest.mark.parametrize("method", CALIBRATED)
def test_a_method_reads_its_own_calibration_and_no_other(method: str) -> None:
    own = next(each for each in random_calibrations(PLAIN) if each.method == method)
    alone = with_calibration(PLAIN, own)
    everything = replace(PLAIN, calibrations=random_calibrations(PLAIN))
    found, expected = merged(THREE, method, everything), merged(THREE, method, alone)
    for name, update in expected.items():
        assert torch.equal(found[name], update)
    assert made_by(THREE, method, alone).recipe.digest != made_by(THREE, method).recipe.digest


def test_a_calibration_that_no_method_here_reads_is_left_alone() -> None:
    later = replace(BANK.calibration("tuned"), method="tuned-more", form="whatever")
    bank = with_calibration(BANK, later)
    for name, update in merged(THREE, "tuned", bank).items():
        assert_close(update, merged(THREE, "tuned")[name])


def test_what_follows_from_the_bank_alone_is_made_once() -> None:
    bank = replace(BANK)
    first, second = Merger(bank), Merger(bank)
    for merger in (first, second):
        for weights in (THREE, {"ada": 0.5, "bob": 0.5}):
            preference = Preference.of(weights)
            merger.merge(Recipe(preference, parse_method("tara-b"), bank.digest))
    made: list[str] = []
    bank.keep(("constants", "tara-b"), lambda: made.append("joint"))
    assert not made
