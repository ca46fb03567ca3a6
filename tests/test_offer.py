from pathlib import Path

import pytest

from dynmerge.bank.build import with_soups
from dynmerge.bank.outline import Outline
from dynmerge.bank.storage import save_bank
from dynmerge.errors import MethodError, PreferenceError
from dynmerge.merging.choice import parse_method
from dynmerge.merging.demands import outside_bytes, outside_rank
from dynmerge.offer import Offer
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from tests.bank_factory import random_bank


@pytest.mark.parametrize("soups", [False, True])
def test_a_banks_outline_is_that_of_its_manifest(tmp_path: Path, soups: bool) -> None:
    bank = random_bank()
    if soups:
        names = [module.name for module in bank.modules]
        bank = with_soups(bank, {name: dict.fromkeys(bank.names, 1.0) for name in names})
    outline = Outline.of_bank(bank)
    assert outline == Outline.of_manifest(save_bank(bank, tmp_path / "bank"))
    assert (outline.digest, outline.has_soups) == (bank.digest, soups)


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
