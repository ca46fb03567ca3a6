from dataclasses import replace

from dynmerge.merging.choice import default_method, parse_method
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe

RECIPE = Recipe(Preference.parse("math=0.7, code=0.3"), default_method(), "bank")


def test_equal_recipes_have_one_name_whatever_the_spelling() -> None:
    assert RECIPE.digest == replace(RECIPE, preference=Preference.parse("code=3,math=7")).digest
    assert RECIPE.digest == replace(RECIPE, method=parse_method("linear;scale=1.0")).digest
    # The name is part of the contract between replicas: it may change with a method's version only.
    assert RECIPE.digest == "281648f4baf429a89015b02a08a104d3"


def test_whatever_determines_a_merge_changes_its_name() -> None:
    changed = [
        replace(RECIPE, preference=Preference.parse("math=0.701, code=0.299")),
        replace(RECIPE, method=parse_method("linear;scale=0.9")),
        replace(RECIPE, method=replace(RECIPE.method, version=2)),
        replace(RECIPE, bank="another"),
    ]
    assert len({RECIPE.digest, *(recipe.digest for recipe in changed)}) == 5


def test_the_base_model_is_the_base_model_whatever_the_method() -> None:
    assert replace(RECIPE, preference=Preference.parse("math=0")).is_base
    assert not RECIPE.is_base
