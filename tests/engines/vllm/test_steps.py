"""Runs against a loop over tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmerge.engines.vllm.steps import NOWHERE, Assignment, assign

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


def test_a_batch_of_the_base_model_alone_needs_no_table() -> None:
    assert assign([0, 0, -1, 0], PLACES) == {}


def test_an_empty_batch_needs_no_table() -> None:
    assert assign([], PLACES) == {}


def test_a_number_nobody_settled_is_an_error_rather_than_the_base_model() -> None:
    with pytest.raises(KeyError):
        assign([1, 3], PLACES)
