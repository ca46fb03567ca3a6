import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dynmerge.errors import Abandoned, DynmergeError, Overloaded
from dynmerge.merging.cache import MergeCache
from dynmerge.merging.choice import default_method
from dynmerge.merging.merge import Merge
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe

SIZE = 100


def recipe(weight: int) -> Recipe:
    return Recipe(Preference.of({"a": weight, "b": 1000 - weight}), default_method(), "bank")


class Maker:
    """Makes merges of SIZE bytes, counts them, and can be held back or told to fail."""

    def __init__(self) -> None:
        self.made: list[Recipe] = []
        self.go = threading.Event()
        self.go.set()
        self.error: Exception | None = None

    def __call__(self, recipe: Recipe, wanted: Callable[[], bool]) -> Merge:
        assert self.go.wait(10)
        self.made.append(recipe)
        if self.error is not None:
            raise self.error
        if not wanted():
            raise Abandoned("nobody waits")
        return Merge(recipe, torch.zeros(SIZE, dtype=torch.uint8))


def test_a_repeated_preference_is_a_hit() -> None:
    maker = Maker()
    cache = MergeCache(maker, 10 * SIZE)
    for _ in range(3):
        with cache.hold(recipe(1)) as made:
            assert made.recipe == recipe(1)
    stats = cache.stats()
    assert (stats.misses, stats.hits, len(maker.made), stats.nbytes) == (1, 2, 1, SIZE)
    assert stats.pinned == 0
    assert stats.seconds > 0


def test_a_hundred_identical_cold_requests_make_one_merge() -> None:
    maker = Maker()
    maker.go.clear()
    cache = MergeCache(maker, 10 * SIZE)
    claims = [cache.claim(recipe(1)) for _ in range(100)]
    assert [claim.outcome for claim in claims] == ["stored"] + ["collapsed"] * 99
    with ThreadPoolExecutor(1) as pool:
        pool.submit(cache.fill, claims[0])
        maker.go.set()
        merges = {id(claim.future.result(10)) for claim in claims}
    assert len(merges) == 1
    assert len(maker.made) == 1
    assert cache.stats().pinned == 1
    for claim in claims:
        cache.release(claim)
    assert cache.stats().pinned == 0


def test_bytes_stay_bounded_and_the_least_recently_used_goes_first() -> None:
    cache = MergeCache(Maker(), 3 * SIZE)
    for weight in (1, 2, 3, 1, 4):
        with cache.hold(recipe(weight)):
            pass
    assert cache.recipes() == [recipe(3), recipe(1), recipe(4)]
    for weight in range(500):
        with cache.hold(recipe(weight)):
            assert cache.stats().nbytes <= 3 * SIZE
    assert cache.stats().entries == 3


def test_what_is_held_is_not_evicted_and_no_room_is_said() -> None:
    cache = MergeCache(Maker(), 2 * SIZE)
    with cache.hold(recipe(1)), cache.hold(recipe(2)):
        with pytest.raises(Overloaded, match="200 of them in use"), cache.hold(recipe(3)):
            pass
        assert cache.recipes() == [recipe(1), recipe(2)]
    with cache.hold(recipe(3)):
        assert cache.stats().nbytes == 2 * SIZE


def test_a_failed_merge_reaches_every_claimant_and_is_made_anew_next_time() -> None:
    maker = Maker()
    maker.error = DynmergeError("out of memory")
    cache = MergeCache(maker, 10 * SIZE)
    first, second = cache.claim(recipe(1)), cache.claim(recipe(1))
    cache.fill(first)
    for claim in (first, second):
        with pytest.raises(DynmergeError, match="out of memory"):
            claim.future.result(0)
        cache.release(claim)
    maker.error = None
    with cache.hold(recipe(1)) as made:
        assert made.nbytes == SIZE
    stats = cache.stats()
    assert (stats.failures, stats.entries, stats.nbytes) == (1, 1, SIZE)


def test_a_stale_claim_does_not_release_its_successor() -> None:
    maker = Maker()
    maker.error = DynmergeError("no")
    cache = MergeCache(maker, 10 * SIZE)
    stale = cache.claim(recipe(1))
    cache.fill(stale)
    maker.error = None
    fresh = cache.claim(recipe(1))
    cache.fill(fresh)
    cache.release(stale)
    assert cache.stats().pinned == 1
    cache.release(fresh)
    cache.release(fresh)
    assert cache.stats().pinned == 0


def test_many_threads_agree() -> None:
    maker = Maker()
    cache = MergeCache(maker, 5 * SIZE)

    def ask(step: int) -> bool:
        with cache.hold(recipe(step % 9)) as made:
            return made.recipe == recipe(step % 9)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(2000)))
    stats = cache.stats()
    assert stats.hits + stats.misses + stats.collapsed == 2000
    assert stats.misses == len(maker.made)
    assert (stats.pinned, stats.nbytes) == (0, 5 * SIZE)


def test_a_merge_that_everybody_has_left_is_not_made() -> None:
    maker = Maker()
    cache = MergeCache(maker, 10 * SIZE)
    claims = [cache.claim(recipe(weight)) for weight in range(1, 100)]
    for claim in claims[:98]:
        cache.release(claim)
    for claim in claims:
        cache.fill(claim)
    assert maker.made == [recipe(99)]
    assert cache.recipes() == [recipe(99)]


def test_merges_on_their_way_are_bounded() -> None:
    cache = MergeCache(Maker(), 10 * SIZE, pending=2)
    first = cache.claim(recipe(1))
    cache.claim(recipe(2))
    with pytest.raises(Overloaded, match="2 merges wait"):
        cache.claim(recipe(3))
    assert cache.claim(recipe(2)).outcome == "collapsed"
    cache.fill(first)
    assert cache.claim(recipe(3)).outcome == "stored"


def test_a_merge_that_everybody_leaves_half_way_is_given_up_and_made_again_when_asked() -> None:
    maker = Maker()
    maker.go.clear()
    cache = MergeCache(maker, 10 * SIZE)
    claim = cache.claim(recipe(1))
    with ThreadPoolExecutor(1) as pool:
        filled = pool.submit(cache.fill, claim)
        while not filled.running():
            time.sleep(0.001)
        cache.release(claim)
        maker.go.set()
        filled.result(10)
    assert cache.stats().entries == 0
    with cache.hold(recipe(1)) as made:
        assert made.recipe == recipe(1)
