"""MergeCache: recent merges, bounded by bytes; a merge asked for many times at once is made once.

Knows recipes, bytes and claims; not how a merge is made (`make` does) nor who asks.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from dynmerge.errors import Overloaded
from dynmerge.merging.merge import Merge
from dynmerge.recipe import Recipe

Outcome = Literal["hit", "stored", "collapsed"]
MAX_PENDING = 256
# From a recipe, and whether anybody still waits for its merge: a long one may stop if not.
Make = Callable[[Recipe, Callable[[], bool]], Merge]


@dataclass(slots=True)
class CacheStats:
    """Counters since the start, and what is there now. `seconds` is time spent making merges."""

    hits: int = 0
    misses: int = 0
    collapsed: int = 0
    evictions: int = 0
    failures: int = 0
    seconds: float = 0.0
    entries: int = 0
    pinned: int = 0
    nbytes: int = 0
    capacity: int = 0


@dataclass(slots=True, eq=False)
class _Entry:
    future: "Future[Merge]" = field(default_factory=Future)
    claims: int = 0
    nbytes: int = 0


@dataclass(slots=True, eq=False)
class Claim:
    """A hold on one recipe's merge, present or on its way: it is not evicted until released.

    `outcome` is `hit` (it was there), `stored` (this claimant must call `fill`) or `collapsed`
    (another claimant is making it).
    """

    recipe: Recipe
    future: "Future[Merge]"
    outcome: Outcome
    released: bool = False


class MergeCache:
    """Recipe -> Merge, least recently used first out, at most `capacity` bytes. Thread-safe."""

    def __init__(self, make: Make, capacity: int, pending: int = MAX_PENDING) -> None:
        self._make = make
        self._max_pending = pending
        self._lock = threading.Lock()
        self._entries: OrderedDict[Recipe, _Entry] = OrderedDict()
        self._stats = CacheStats(capacity=capacity)

    def claim(self, recipe: Recipe) -> Claim:
        """Hold the merge of `recipe`. Never blocks; pair with `release`, and `fill` if `stored`.

        Raises Overloaded when too many merges wait to be made already.
        """
        with self._lock:
            entry = self._entries.get(recipe)
            outcome: Outcome
            if entry is None:
                waiting = sum(not other.future.done() for other in self._entries.values())
                if waiting >= self._max_pending:
                    raise Overloaded(f"{waiting} merges wait to be made already")
                entry = self._entries[recipe] = _Entry()
                outcome = "stored"
                self._stats.misses += 1
            elif entry.future.done():
                outcome = "hit"
                self._stats.hits += 1
            else:
                outcome = "collapsed"
                self._stats.collapsed += 1
            self._entries.move_to_end(recipe)
            entry.claims += 1
            return Claim(recipe, entry.future, outcome)

    def fill(self, claim: Claim) -> None:
        """Make the merge of a `stored` claim. An error goes to every claimant and is not kept.

        An error is Overloaded when the merges in use leave no room for this one. Where every
        claimant has left by now, nothing is made.
        """
        if self._dropped_if_abandoned(claim):
            return
        started = time.perf_counter()
        try:
            entry = self._entries[claim.recipe]
            merge = self._make(claim.recipe, lambda: entry.claims > 0)
            with self._lock:
                self._admit(self._entries[claim.recipe], merge.nbytes)
                self._stats.seconds += time.perf_counter() - started
        except BaseException as error:
            # Whatever went wrong, the claimants wait on this future: they must hear of it.
            self.fail(claim, error)
        else:
            claim.future.set_result(merge)

    def fail(self, claim: Claim, error: BaseException) -> None:
        """Give `error` to all who wait for a `stored` claim's merge, and forget the merge."""
        with self._lock:
            self._drop(claim)
            self._stats.failures += 1
        claim.future.set_exception(error)

    def release(self, claim: Claim) -> None:
        """Give up a claim, once; the merge may be evicted when nobody holds it."""
        with self._lock:
            if claim.released:
                return
            claim.released = True
            entry = self._entries.get(claim.recipe)
            if entry is not None and entry.future is claim.future:
                entry.claims -= 1

    @contextmanager
    def hold(self, recipe: Recipe) -> Iterator[Merge]:
        """The merge of `recipe`, made here if need be, held while the block runs. Blocks."""
        claim = self.claim(recipe)
        try:
            if claim.outcome == "stored":
                self.fill(claim)
            yield claim.future.result()
        finally:
            self.release(claim)

    def stats(self) -> CacheStats:
        """A snapshot of the counters and of what is held."""
        with self._lock:
            entries = self._entries.values()
            return replace(
                self._stats,
                entries=len(entries),
                pinned=sum(entry.claims > 0 for entry in entries),
            )

    def recipes(self) -> list[Recipe]:
        """What is here or on its way, least recently used first."""
        with self._lock:
            return list(self._entries)

    def _admit(self, entry: _Entry, nbytes: int) -> None:
        idle = [
            recipe
            for recipe, other in self._entries.items()
            if other is not entry and other.claims == 0 and other.future.done()
        ]
        room = self._stats.capacity - self._stats.nbytes
        evictable = sum(self._entries[recipe].nbytes for recipe in idle)
        if nbytes > room + evictable:
            raise Overloaded(
                f"no room for a merge of {nbytes} bytes: the cache holds {self._stats.capacity}, "
                f"{self._stats.nbytes - evictable} of them in use"
            )
        for recipe in idle:
            if nbytes <= self._stats.capacity - self._stats.nbytes:
                break
            self._stats.evictions += 1
            self._stats.nbytes -= self._entries.pop(recipe).nbytes
        entry.nbytes = nbytes
        self._stats.nbytes += nbytes

    def _dropped_if_abandoned(self, claim: Claim) -> bool:
        with self._lock:
            abandoned = self._entries[claim.recipe].claims == 0
            if abandoned:
                self._drop(claim)
        return abandoned

    def _drop(self, claim: Claim) -> None:
        entry = self._entries.get(claim.recipe)
        if entry is not None and entry.future is claim.future:
            del self._entries[claim.recipe]
