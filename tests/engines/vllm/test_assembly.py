"""Merges made beside the step loop are the merges, and nobody waits for one that nobody wants."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from dynmerge.engines.vllm import assembly
from dynmerge.engines.vllm.assembly import PENDING, READY, Assembly, Status
from dynmerge.errors import Abandoned, MethodError
from dynmerge.merging.choice import parse_method
from dynmerge.merging.merge import Merge, Merger, merge
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from tests.bank_factory import random_bank
from tests.merging.dense import BANK, assert_same, written_out

CPU = torch.device("cpu")
SPACES = ("core", "full")


class Held(Merger):
    """A merger that begins when it is told to, and asks then whether it is still wanted."""

    def __init__(self) -> None:
        super().__init__(BANK)
        self.begun, self.may_go = threading.Event(), threading.Event()
        self.asked: list[str] = []

    def merge(self, recipe: Recipe, wanted: Callable[[], bool] = lambda: True) -> Merge:
        self.asked.append(recipe.digest)
        self.begun.set()
        assert self.may_go.wait(60)
        if not wanted():
            raise Abandoned("nobody waited for it")
        return super().merge(recipe, wanted)


def recipe(method: str = "ties", share: float = 0.5, bank: str = BANK.digest) -> Recipe:
    preference = Preference.of({"ada": share, "bob": 1 - share})
    return Recipe(preference, parse_method(method), bank)


def settled(made: Assembly, wanted: Recipe, merger: Merger) -> Status:
    """What is said once it is made or failed."""
    pause = threading.Event()
    while (status := made.prepare(wanted, merger))["state"] == "pending":
        pause.wait(0.002)
    return status


@pytest.fixture
def make() -> Iterator[Assembly]:
    made = Assembly(4, CPU)
    yield made
    made.close()


@pytest.fixture
def held() -> Iterator[Held]:
    merger = Held()
    yield merger
    merger.may_go.set()


@pytest.mark.parametrize("space", SPACES)
def test_what_was_prepared_is_the_merge(make: Assembly, space: str) -> None:
    wanted = recipe(f"ties;space={space}")
    merger = Merger(BANK)
    status = settled(make, wanted, merger)
    taken = make.take(wanted, merger)
    assert taken.recipe == wanted
    # What a reply says of a merge with factors of its own is told with its being ready.
    told = {"rank": taken.rank, "energy": taken.energy} if space == "full" else {}
    assert status == {**READY, **told}
    assert (taken.core is None) == (space == "full")
    assert_same(written_out(BANK, taken), written_out(BANK, merge(BANK, wanted)), 1e-6)
    assert make.made == 1


def test_whoever_asks_is_told_at_once_whether_it_is_ready(make: Assembly, held: Held) -> None:
    wanted = recipe()
    assert make.prepare(wanted, held) == PENDING
    assert held.begun.wait(60)
    assert make.prepare(wanted, held) == PENDING
    held.may_go.set()
    assert settled(make, wanted, held) == READY
    assert make.prepare(wanted, held) == READY
    assert held.asked == [wanted.digest]


def test_a_quick_merge_does_not_wait_behind_one_that_takes_long(make: Assembly, held: Held) -> None:
    assert make.prepare(recipe("ties;space=full"), held) == PENDING
    assert held.begun.wait(60)
    assert settled(make, recipe(), Merger(BANK)) == READY
    assert make.prepare(recipe("ties;space=full"), held) == PENDING


def test_what_was_taken_is_made_anew_for_the_next(make: Assembly) -> None:
    wanted, merger = recipe(), Merger(BANK)
    for _ in range(2):
        assert settled(make, wanted, merger) == READY
        make.take(wanted, merger)
    assert make.made == 2


def test_a_merge_that_nobody_prepared_is_made_when_it_is_taken(
    make: Assembly, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = recipe()
    taken = make.take(wanted, Merger(BANK))
    assert_same(written_out(BANK, taken), written_out(BANK, merge(BANK, wanted)), 1e-6)
    assert f"merge {wanted.digest} was not prepared" in caplog.text
    assert make.seconds > 0


def test_taking_what_is_on_its_way_waits_for_it(make: Assembly, held: Held) -> None:
    wanted = recipe()
    make.prepare(wanted, held)
    assert held.begun.wait(60)
    threading.Timer(0.05, held.may_go.set).start()
    assert make.take(wanted, held).recipe == wanted
    assert held.asked == [wanted.digest]


def test_a_failure_is_told_once_and_tried_again_by_the_next(make: Assembly) -> None:
    plain = random_bank()
    wanted, merger = recipe("lora-soups", bank=plain.digest), Merger(plain)
    for _ in range(2):
        status = settled(make, wanted, merger)
        assert status["state"] == "failed"
        assert "lora-soups needs learned weights" in status["reason"]
    with pytest.raises(MethodError, match="needs learned weights"):
        make.take(wanted, merger)
    assert make.made == 0


def test_a_failure_that_is_not_ours_is_told_too_and_logged(
    make: Assembly, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = recipe(bank="")

    class Broken(Merger):
        def merge(self, recipe: Recipe, wanted: Callable[[], bool] = lambda: True) -> Merge:
            raise ZeroDivisionError

    status = settled(make, wanted, Broken(BANK))
    assert status == {"state": "failed", "reason": "ZeroDivisionError"}
    assert "work beside the step loop failed" in caplog.text


def test_one_that_is_not_asked_about_is_given_up(
    make: Assembly, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "PATIENCE", 0.0)
    make.prepare(recipe(), held)
    assert held.begun.wait(60)
    held.may_go.set()
    make.close()
    for lane in make._lanes.values():
        lane.shutdown(wait=True)
    assert make.made == 0


def test_one_that_was_given_up_is_made_when_a_step_needs_it(
    make: Assembly, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "PATIENCE", 0.0)
    wanted = recipe()
    make.prepare(wanted, held)
    assert held.begun.wait(60)
    held.may_go.set()
    assert make.take(wanted, Merger(BANK)).recipe == wanted
    assert make.made == 1


def test_one_that_was_given_up_is_begun_again_for_whoever_asks_next(
    make: Assembly, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "PATIENCE", 0.0)
    wanted = recipe()
    make.prepare(wanted, held)
    held.may_go.set()
    make._orders[wanted.digest].future.exception(60)
    monkeypatch.setattr(assembly, "PATIENCE", 60.0)
    assert settled(make, wanted, Merger(BANK)) == READY


def test_at_most_so_many_are_kept_and_those_asked_about_longest_ago_go(make: Assembly) -> None:
    merger = Merger(BANK)
    wanted = [recipe(share=share / 10) for share in range(1, 7)]
    for each in wanted[:4]:
        assert settled(make, each, merger) == READY
    assert make.prepare(wanted[0], merger) == READY
    for each in wanted[4:]:
        assert settled(make, each, merger) == READY
    kept = [wanted[place].digest for place in (3, 0, 4, 5)]
    assert set(make._orders) == set(kept)
    assert make.made == 6


def test_one_in_the_queue_that_gave_its_place_up_is_never_begun(make: Assembly, held: Held) -> None:
    wanted = [recipe(share=share / 10) for share in range(1, 7)]
    for each in wanted:
        assert make.prepare(each, held) == PENDING
    assert held.begun.wait(60)
    held.may_go.set()
    assert settled(make, wanted[5], held) == READY
    # The first had begun; the second was in the queue.
    assert held.asked == [each.digest for each in (wanted[0], *wanted[2:])]


def test_nothing_is_begun_after_the_end(make: Assembly) -> None:
    make.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        make.prepare(recipe(), Merger(BANK))
