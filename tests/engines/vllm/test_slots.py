"""Rows against a list in the order of last use."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dynmerge.engines.vllm.slots import Rows
from dynmerge.errors import DynmergeError

NUMBERS = st.integers(1, 7)
NAMES = st.sampled_from(["a", "b", "c"])


class AsAList(RuleBasedStateMachine):
    """Whatever is asked of Rows, a list of (number, name, row) says the same."""

    @initialize(count=st.integers(0, 4))
    def begin(self, count: int) -> None:
        self.rows = Rows(count)
        self.held: list[tuple[int, str, int]] = []  # the one used longest ago first

    def at(self, number: int) -> tuple[int, str, int] | None:
        return next((each for each in self.held if each[0] == number), None)

    @rule(number=NUMBERS, name=NAMES)
    def find(self, number: int, name: str) -> None:
        there = self.at(number)
        if there is None or there[1] != name:
            assert self.rows.find(number, name) is None
            return
        assert self.rows.find(number, name) == there[2]
        self.held.remove(there)
        self.held.append(there)

    @rule(number=NUMBERS, name=NAMES, busy=st.sets(NUMBERS))
    def take(self, number: int, name: str, busy: set[int]) -> None:
        there = self.at(number)
        full = len(self.held) == self.rows.count
        idle = [each for each in self.held if each[0] not in busy]
        if there is None and full and not idle:
            with pytest.raises(DynmergeError, match=f"more than the {self.rows.count} slots"):
                self.rows.take(number, name, busy)
            return
        row, evicted = self.rows.take(number, name, busy)
        leaves = there if there is not None else idle[0] if full else None
        assert evicted == (leaves[0] if leaves is not None and there is None else None)
        if leaves is None:
            assert row in set(range(self.rows.count)) - {each[2] for each in self.held}
        else:
            assert row == leaves[2]
            self.held.remove(leaves)
        self.held.append((number, name, row))

    @rule(number=NUMBERS)
    def drop(self, number: int) -> None:
        there = self.at(number)
        assert self.rows.drop(number) is (there is not None)
        if there is not None:
            self.held.remove(there)

    @rule()
    def clear(self) -> None:
        self.rows.clear()
        self.held.clear()

    @invariant()
    def the_same_are_there(self) -> None:
        assert len(self.rows) == len(self.held)
        for _, name, _ in self.held:
            rows = {row for _, other, row in self.held if other == name}
            assert self.rows.row_of(name) in rows


TestRowsAsAList = AsAList.TestCase


def test_the_least_recently_used_leaves_and_the_next_has_its_row() -> None:
    rows = Rows(2)
    first, _ = rows.take(1, "a", ())
    second, _ = rows.take(2, "b", ())
    assert rows.find(1, "a") == first
    assert rows.take(3, "c", ()) == (second, 2)
    assert rows.find(2, "b") is None
    assert rows.find(1, "a") == first


def test_who_is_busy_stays_however_long_ago_it_was_used() -> None:
    rows = Rows(2)
    first, _ = rows.take(1, "a", ())
    second, _ = rows.take(2, "b", ())
    assert rows.take(3, "c", {1, 3}) == (second, 2)
    assert rows.find(1, "a") == first


def test_a_number_that_comes_to_stand_for_another_merge_keeps_its_row_and_must_be_written() -> None:
    rows = Rows(2)
    row, _ = rows.take(1, "a", ())
    assert rows.find(1, "b") is None
    assert rows.take(1, "b", {1}) == (row, None)
    assert rows.find(1, "a") is None
    assert rows.find(1, "b") == row
    assert (rows.row_of("a"), rows.row_of("b")) == (None, row)


def test_a_step_of_more_merges_than_rows_is_an_error_that_leaves_all_in_place() -> None:
    rows = Rows(2)
    there = {number: rows.take(number, "a", ())[0] for number in (1, 2)}
    with pytest.raises(DynmergeError, match="a step needs more than the 2 slots there are"):
        rows.take(3, "c", {1, 2, 3})
    assert {number: rows.find(number, "a") for number in (1, 2)} == there
    with pytest.raises(DynmergeError, match="0 slots"):
        Rows(0).take(1, "a", ())


@given(st.lists(st.tuples(NUMBERS, st.booleans())))
def test_no_two_merges_ever_share_a_row(uses: list[tuple[int, bool]]) -> None:
    rows, held = Rows(3), dict[int, int]()
    for number, leaves in uses:
        row, evicted = rows.take(number, "a", ())
        held.pop(evicted or number, None)
        held[number] = row
        if leaves:
            assert rows.drop(number)
            del held[number]
        assert len(set(held.values())) == len(held) == len(rows)


def test_what_was_dropped_or_cleared_is_not_there_and_its_row_is_free() -> None:
    rows = Rows(2)
    for number in (1, 2):
        rows.take(number, "a", ())
    assert rows.drop(1)
    assert not rows.drop(1)
    assert rows.take(3, "b", {2, 3})[1] is None
    rows.clear()
    assert len(rows) == 0
    assert rows.find(2, "a") is None
    assert {rows.take(number, "c", {4, 5})[0] for number in (4, 5)} == {0, 1}
