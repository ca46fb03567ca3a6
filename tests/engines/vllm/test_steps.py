"""Runs against a loop over tokens."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmerge.engines.vllm.steps import NOWHERE, Assignment, Run, Singles, assign, joined

BASE = (0, -1)  # what vLLM says of a token of the base model, and of padding
PLACES = {1: ("core", 0), 2: ("core", 2), 5: ("own", 0), 7: ("core", 0), 9: ("diagonal", 4)}

# As requests leave them, neighbours alike, and in any order.
BATCHES = st.lists(
    st.tuples(st.sampled_from([*BASE, *PLACES]), st.integers(1, 4)), min_size=1, max_size=12
).map(lambda runs: [number for number, length in runs for _ in range(length)])


def rows_of(numbers: list[int], table: str) -> list[int]:
    """Token by token: its row in `table`, NOWHERE if it has none."""
    found = [PLACES.get(number, ("", NOWHERE)) for number in numbers]
    return [row if there == table else NOWHERE for there, row in found]


def by_runs(assignment: Assignment, tokens: int) -> list[int]:
    """The rows that the runs give, each token at most once."""
    rows = [NOWHERE] * tokens
    for run in assignment.runs:
        assert run.start < run.stop <= tokens
        assert rows[run.start : run.stop] == [NOWHERE] * (run.stop - run.start)
        rows[run.start : run.stop] = [run.row] * (run.stop - run.start)
    return rows


@given(BATCHES)
def test_every_token_has_the_row_of_its_merge_by_index_and_by_runs(numbers: list[int]) -> None:
    found = assign(numbers, PLACES)
    assert set(found) == {PLACES[number][0] for number in numbers if number in PLACES}
    for table, assignment in found.items():
        expected = rows_of(numbers, table)
        assert assignment.index.tolist() == expected
        assert assignment.index.dtype == np.int64
        assert by_runs(assignment, len(numbers)) == expected


@given(BATCHES)
def test_runs_stand_in_the_order_of_tokens_and_end_where_the_merge_does(
    numbers: list[int],
) -> None:
    for assignment in assign(numbers, PLACES).values():
        for run in assignment.runs:
            assert len(set(numbers[run.start : run.stop])) == 1
            assert numbers[run.start - 1 : run.start] != [numbers[run.start]]
            assert numbers[run.stop : run.stop + 1] != [numbers[run.start]]
        starts = [run.start for run in assignment.runs]
        assert starts == sorted(starts)


@given(BATCHES)
def test_joined_runs_cover_the_same_tokens_and_only_single_ones_are_joined(
    numbers: list[int],
) -> None:
    for assignment in assign(numbers, PLACES).values():
        pieces = joined(assignment.runs)
        apart = [
            Run(place, place + 1, int(assignment.index[place]))
            for piece in pieces
            if isinstance(piece, Singles)
            for place in range(piece.start, piece.stop)
        ]
        kept = [piece for piece in pieces if isinstance(piece, Run)]
        assert sorted([*apart, *kept], key=lambda run: run.start) == list(assignment.runs)
        ends = [(piece.start, piece.stop) for piece in pieces]
        assert ends == sorted(ends)
        single = [isinstance(p, Singles) or p.stop - p.start == 1 for p in pieces]
        for both, (one, other) in zip(pairwise(single), pairwise(ends), strict=True):
            assert not (all(both) and one[1] == other[0])


def test_a_decode_of_many_merges_is_one_piece_and_the_base_model_parts_it() -> None:
    runs = assign([1, 2, 7, 0, 1, 2, 2, 1], PLACES)["core"].runs
    assert joined(runs) == [Singles(0, 3), Run(4, 5, 0), Run(5, 7, 2), Run(7, 8, 0)]
    assert joined([]) == []


def test_a_batch_of_the_base_model_alone_needs_no_table() -> None:
    assert assign([0, 0, -1, 0], PLACES) == {}


def test_an_empty_batch_needs_no_table() -> None:
    assert assign([], PLACES) == {}


def test_a_number_nobody_settled_is_an_error_rather_than_the_base_model() -> None:
    with pytest.raises(KeyError):
        assign([1, 3], PLACES)
