"""What an operator may say in --additional-config, and the slots that follow."""

from pathlib import Path
from typing import Any

import pytest

from dynmerge.bank.bank import BaseIdentity
from dynmerge.bank.outline import ModuleOutline, Outline
from dynmerge.engines.vllm.config import BUDGET, MOST_OWN, PluginConfig, Slots
from dynmerge.errors import ConfigError
from tests.merging.dense import BANK

SMALL = Outline.of_bank(BANK)


def large(modules: int = 224, width: int = 4096, tasks: int = 8, rank: int = 16) -> Outline:
    """A bank as of a model of 8 billion parameters."""
    stacked = tasks * rank
    return Outline(
        BaseIdentity("large", "0" * 64),
        tuple("abcdefghijklmnop"[:tasks]),
        "1" * 64,
        False,
        tuple(
            ModuleOutline(f"layers.{place}", width, width, stacked, stacked, (rank,) * tasks)
            for place in range(modules)
        ),
    )


def read(**settings: Any) -> PluginConfig:
    found = PluginConfig.read({"dynmerge": {"bank": "banks/mine", **settings}})
    assert found is not None
    return found


def test_vllm_without_a_word_for_dynmerge_is_left_alone() -> None:
    nothing: tuple[object, ...] = (None, {}, {"other": {"bank": "x"}}, "words", [])
    for additional in nothing:
        assert PluginConfig.read(additional) is None


def test_every_setting_is_read_and_those_left_out_have_defaults() -> None:
    assert read() == PluginConfig(Path("banks/mine"))
    said: dict[str, Any] = {
        "core_slots": 3,
        "own_slots": 0,
        "own_rank": 7,
        "versions": 1,
        "spare_rank": 4,
        "static": True,
        "trust_base": True,
    }
    expected = PluginConfig(Path("banks/mine"), Path("server.toml"), **said)
    assert read(settings="server.toml", **said) == expected
    assert read(core_slots=None, static=None, settings=None) == read()


def test_a_setting_nobody_knows_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"no setting 'core_slot' \(known: bank, settings, core_"):
        read(core_slot=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("settings", 3),
        ("core_slots", "3"),
        ("core_slots", True),
        ("core_slots", 3.0),
        ("core_slots", -1),
        ("own_slots", -1),
        ("own_rank", 0),
        ("versions", 0),
        ("spare_rank", -1),
        ("static", "true"),
        ("static", 1),
        ("trust_base", "no"),
        ("trust_base", 0),
        ("trust_base", None),
    ],
)
def test_a_value_of_another_kind_or_out_of_range_is_refused_by_name(
    name: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=rf"^dynmerge\.{name} is "):
        read(**{name: value})


@pytest.mark.parametrize("name", ["versions", "spare_rank"])
def test_null_is_refused_where_nothing_would_be_chosen_for_it(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^dynmerge\.{name} is "):
        read(**{name: None})


@pytest.mark.parametrize("settings", [{}, {"bank": None}, {"bank": 3}, {"bank": ["x"]}])
def test_settings_without_a_bank_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"^dynmerge\.bank names the bank's folder$"):
        PluginConfig.read({"dynmerge": settings})


@pytest.mark.parametrize("given", ["bank", ["bank"], 3, True, False])
def test_what_is_no_object_is_refused(given: object) -> None:
    with pytest.raises(ConfigError, match="is an object such as"):
        PluginConfig.read({"dynmerge": given})


def test_a_small_bank_has_as_many_slots_as_vllm_has() -> None:
    stacked = max(sum(module.ranks) for module in BANK.modules)
    assert read().slots(SMALL, 4, 100) == Slots(100, 100, MOST_OWN, stacked)
    assert read().slots(SMALL, 4, 3) == Slots(3, 3, MOST_OWN, stacked)


def test_the_slots_of_a_large_bank_keep_within_the_budget_of_their_form() -> None:
    slots = read().slots(large(), 2, 4096)
    core, own = 224 * 128 * 128 * 2, 224 * 128 * (4096 + 4096) * 2
    assert slots == Slots(4096, BUDGET // core, BUDGET // own, 128)
    assert slots.core * core <= BUDGET < (slots.core + 1) * core
    assert slots.own * own <= BUDGET < (slots.own + 1) * own


def test_where_one_merge_is_above_the_budget_a_core_slot_remains_and_no_own_one() -> None:
    slots = read().slots(large(rank=256), 4, 4096)
    assert (slots.core, slots.own) == (1, 0)


def test_what_the_operator_says_wins_over_the_budget() -> None:
    said = read(core_slots=5000, own_slots=9, own_rank=4)
    assert said.slots(large(), 2, 10) == Slots(10, 5000, 9, 4)
    none = read(core_slots=0, own_slots=0, own_rank=5)
    assert none.slots(SMALL, 4, 10) == Slots(10, 0, 0, 5)


def test_a_smaller_rank_of_own_factors_makes_room_for_more_of_them() -> None:
    wide, narrow = (read(own_rank=rank).slots(large(), 2, 4096) for rank in (256, 64))
    assert wide.own < narrow.own <= MOST_OWN
    assert narrow.own_rank == 64


def test_slots_are_found_by_form() -> None:
    slots = Slots(3, 2, 1, 8)
    assert (slots.of("diagonal"), slots.of("core"), slots.of("own")) == (3, 2, 1)
