from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dynmerge.bank.bank import FactorBank
from dynmerge.bank.build import with_soups
from dynmerge.bank.edit import with_calibration
from dynmerge.bank.outline import Outline
from dynmerge.bank.storage import save_bank
from dynmerge.errors import MethodError, PreferenceError
from dynmerge.merging.choice import parse_method
from dynmerge.merging.demands import BEST, outside_bytes, outside_rank
from dynmerge.merging.methods import METHODS
from dynmerge.offer import Offer
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from tests.bank_factory import random_bank, random_calibration, random_calibrations


@pytest.mark.parametrize("soups", [False, True])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_banks_outline_is_that_of_its_manifest(
    tmp_path: Path, soups: bool, calibrated: bool
) -> None:
    bank = random_bank()
    if soups:
        names = [module.name for module in bank.modules]
        bank = with_soups(bank, {name: dict.fromkeys(bank.names, 1.0) for name in names})
    if calibrated:
        bank = fixed(replace(bank, calibrations=random_calibrations(bank)))
    outline = Outline.of_bank(bank)
    assert outline == Outline.of_manifest(save_bank(bank, tmp_path / "bank"))
    assert (outline.digest, outline.has_soups) == (bank.digest, soups)
    assert outline.carries == bank.carries
    assert outline.fixed_at == ({"tara-a": (0.5, 0.25, 0.25)} if calibrated else {})


def fixed(bank: FactorBank) -> FactorBank:
    """The bank with a tara-a that serves one preference only."""
    shared = {"at": torch.tensor([0.5, 0.25, 0.25])}
    return with_calibration(
        bank,
        random_calibration(
            bank, "tara-a", lambda module: {"fixed": (sum(module.ranks),)}, "fixed", shared
        ),
    )


def test_a_method_that_the_bank_carries_nothing_for_is_refused_with_how_to_get_it() -> None:
    bank = random_bank()
    offer = Offer(Outline.of_bank(bank))
    for name, row in METHODS.items():
        if row.needs is None:
            assert offer.recipe(Preference.parse("ada"), parse_method(name)).bank == bank.digest
            continue
        how = "build --soup-weights puts" if row.needs == "soups" else f"BANK --method {name} makes"
        for text in (name, f"pico+{name}", f"{name}+svc"):
            with pytest.raises(MethodError, match=f"^body: {name} needs .*{how}") as caught:
                offer.recipe(
                    Preference.parse("ada"), parse_method(text), "preference", method_source="body"
                )
            assert caught.value.param == "body"
    full = Offer(Outline.of_bank(replace(bank, calibrations=random_calibrations(bank))))
    assert full.recipe(Preference.parse("ada"), parse_method("tara-b")).method.name == "tara-b"


def test_tables_of_pairs_take_no_negative_weight() -> None:
    bank = random_bank()
    offer = Offer(Outline.of_bank(replace(bank, calibrations=random_calibrations(bank))))
    negative = Preference.parse("ada=1.5, bob=-0.5;raw", allow_negative=True)
    for text in ("core", "pico+core"):
        with pytest.raises(MethodError, match=r"^body: core takes no negative weight") as caught:
            offer.recipe(negative, parse_method(text), method_source="body")
        assert caught.value.param == "body"
    offer.recipe(negative, parse_method("tara-b"))
    offer.recipe(Preference.parse("ada=1.5, bob=0.5;raw"), parse_method("core"))
    offer.recipe(Preference.base_model(), parse_method("core"))


def test_what_was_found_for_one_preference_serves_no_other() -> None:
    offer = Offer(Outline.of_bank(fixed(random_bank())))
    method = parse_method("tara-a")
    for same in ("ada=2, bob=1, cyd=1", "ada=1, bob=-0.5, cyd=0.5;raw", "base=1"):
        offer.recipe(Preference.parse(same, allow_negative=True), method)
    offer.recipe(Preference.parse("ada=0.5, bob=0.251, cyd=0.249"), method)
    # On the grid ada=0.033, bob=0.017, cyd=0.017: what a fifteenth of it comes nearest to.
    offer.recipe(Preference.parse("ada=2, bob=1, cyd=1, base=56"), method)
    only = "calibrated for one preference in this bank, ada=0.5, bob=0.25, cyd=0.25$"
    others = ("ada", "ada, bob, cyd", "ada=0.502, bob=0.249, cyd=0.249", "ada=0.001, base=0.999")
    for other in others:
        with pytest.raises(MethodError, match=f"^body: tara-a is {only}"):
            offer.recipe(Preference.parse(other), method, method_source="body")


def test_an_offer_gives_the_recipe_or_the_reason() -> None:
    offer = Offer(Outline.of_bank(random_bank()), lambda recipe: f"{recipe.method.name} is too big")
    with pytest.raises(MethodError, match=r"^body: linear is too big$"):
        offer.recipe(Preference.parse("ada"), method_source="body")
    with pytest.raises(PreferenceError, match="no skill named 'eve'"):
        offer.recipe(Preference.parse("eve"))
    free = Offer(offer.outline)
    assert free.recipe(Preference.parse("ada")).bank == random_bank().digest


def test_what_a_merge_takes_outside_the_shared_bases_is_known_before() -> None:
    outline = Outline.of_bank(random_bank())

    def of(method: str) -> Recipe:
        return Recipe(Preference.parse("ada, bob"), parse_method(method), outline.digest)

    assert outside_rank(outline, of("ties")) == outside_bytes(outline, of("ties"), 4) == 0
    assert outside_rank(outline, of("knots-ties")) == 6
    assert outside_rank(outline, of("ties;space=full;rank=2")) == 2
    assert outside_rank(outline, of("iso-c-dense")) == 10
    assert outside_bytes(outline, of("iso-c-dense"), 2) == 2 * (10 * 22 + 4 * 14 + 10 * 22)


def test_where_nobody_chose_the_best_calibration_for_all_preferences_serves() -> None:
    bank = random_bank()
    wish = Preference.parse("ada=0.5, bob=0.5")
    assert Offer(Outline.of_bank(bank)).recipe(wish).method.name == "linear"
    learned = replace(bank, calibrations=random_calibrations(bank))
    assert Offer(Outline.of_bank(learned)).recipe(wish).method.name == BEST[0]
    served = Offer(Outline.of_bank(fixed(learned))).recipe(wish).method.name
    assert BEST[0] == "tara-a"
    assert served == BEST[1], "what serves one preference only is no default"
