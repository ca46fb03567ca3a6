"""vLLM with the plug-in gives what W + Delta written out gives, whatever shares the batch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dynmerge.adapters.adapter import Adapter
from dynmerge.bank.bank import FactorBank
from tests.engines.vllm.asking import (
    Answer,
    Ask,
    alone,
    answers,
    assert_right,
    engine,
    mixed,
)

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
pytestmark = pytest.mark.vllm

EXACT = 1e-5  # in float32
METHODS = ("ties", "pico+linear", "tsv-m", "knots-ties", "ties;space=full;rank=6")


def ask_batch(
    base: Path,
    bank: Path,
    loaded: FactorBank,
    batches: list[list[Ask]],
    settings: Mapping[str, object],
    options: Mapping[str, Any],
) -> tuple[list[list[Answer]], Any]:
    llm = engine(base, bank, settings, **options)
    found = [answers(llm, loaded, asks, 1 + 100 * i) for i, asks in enumerate(batches)]
    return found, llm.collective_rpc("dynmerge_stats")


@pytest.mark.oldest
@pytest.mark.parametrize("settings", [{}, {"static": True}], ids=["planned", "static"])
def test_eight_preferences_and_the_base_model_share_a_batch(
    settings: Mapping[str, object],
    wide_folder: Path,
    wide_bank_folder: Path,
    wide_bank: FactorBank,
    wide_adapters: Mapping[str, Adapter],
) -> None:
    several = [each for method in METHODS for each in mixed(method)[3:7]]
    batches = [mixed(), several, mixed() + mixed("ties")[4:6] + mixed("knots-ties")[4:6]]
    options = {"max_loras": 24, "max_num_seqs": 32}
    found, stats = alone(
        ask_batch,
        wide_folder,
        wide_bank_folder,
        wide_bank,
        batches,
        {"own_slots": 8, **settings},
        options,
    )
    assert_right(found[0], wide_adapters, wide_bank, batches[0], EXACT)
    # These merges are larger than the skills: float32 rounds more.
    assert_right(found[1], wide_adapters, wide_bank, batches[1], 5 * EXACT)
    assert_right(found[2], wide_adapters, wide_bank, batches[2], 5 * EXACT)
    assert stats[0]["slots"]["core"][0] > 5
    assert stats[0]["slots"]["own"][0] > 3


@pytest.mark.oldest
def test_fewer_slots_than_preferences_evict_and_stay_right(
    wide_folder: Path,
    wide_bank_folder: Path,
    wide_bank: FactorBank,
    wide_adapters: Mapping[str, Adapter],
) -> None:
    others = mixed("tsv-m")[:4] + mixed("knots-ties")[:4]
    # One at a time of the forms that have one slot; the first of each is evicted and comes again.
    batches = [mixed(), mixed()[::-1], *([each] for each in [*others, *others[::4]])]
    settings = {"core_slots": 1, "own_slots": 1}
    found, stats = alone(
        ask_batch,
        wide_folder,
        wide_bank_folder,
        wide_bank,
        batches,
        settings,
        {"max_loras": 3},
    )
    for asks, given in zip(batches, found, strict=True):
        tolerance = EXACT if asks[0].method == "linear" else 5 * EXACT
        assert_right(given, wide_adapters, wide_bank, asks, tolerance)
    assert stats[0]["slots"]["diagonal"] == [3, 3]
    assert stats[0]["merges"] > len(others)  # some were made again


@pytest.mark.parametrize("settings", [{}, {"static": True}], ids=["planned", "static"])
def test_two_tensor_parallel_ranks_give_the_same(
    settings: Mapping[str, object],
    wide_folder: Path,
    wide_bank_folder: Path,
    wide_bank: FactorBank,
    wide_adapters: Mapping[str, Adapter],
) -> None:
    batches = [mixed(), mixed("tsv-m"), mixed("knots-ties")]
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    slots = {"own_slots": 8, **settings}
    found, stats = alone(
        ask_batch, wide_folder, wide_bank_folder, wide_bank, batches, slots, options
    )
    for asks, given, tolerance in zip(batches, found, (1, 5, 5), strict=True):
        assert_right(given, wide_adapters, wide_bank, asks, tolerance * EXACT)
    assert len(stats) == 2


def base_beside_full_slots(
    base: Path, bank: Path, loaded: FactorBank, asks: list[Ask], settings: Mapping[str, object]
) -> list[Answer]:
    llm = engine(base, bank, settings, max_loras=3)
    alike = [Ask(ask.prompt) for ask in asks]  # so that the batch has the same shape
    return [answers(llm, loaded, alike)[-1], answers(llm, loaded, asks)[-1]]


@pytest.mark.parametrize("settings", [{}, {"static": True}], ids=["planned", "static"])
def test_a_base_request_beside_full_slots_is_exactly_the_base_model(
    settings: Mapping[str, object],
    wide_folder: Path,
    wide_bank_folder: Path,
    wide_bank: FactorBank,
) -> None:
    asks = [*mixed()[:1], *mixed("tsv-m")[4:5], *mixed("knots-ties")[4:5], *mixed()[8:]]
    slots = {"core_slots": 1, "own_slots": 1, **settings}
    before, beside = alone(
        base_beside_full_slots, wide_folder, wide_bank_folder, wide_bank, asks, slots
    )
    assert beside == before
