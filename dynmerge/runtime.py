"""Runtime: the path of one request, from a preference to tokens. Knows no HTTP and no files.

preference -> recipe -> lease on its merge (cache, made off the event loop) -> engine -> chunks
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import torch

from dynmerge.bank.bank import FactorBank
from dynmerge.bank.outline import Outline
from dynmerge.engines.engine import Chunk, Engine, Generation
from dynmerge.errors import ConfigError, DynmergeError, EngineDead, Overloaded
from dynmerge.merging.cache import Claim, MergeCache
from dynmerge.merging.choice import HEADER as METHOD_HEADER
from dynmerge.merging.demands import in_background, outside_bytes
from dynmerge.merging.lane import lane
from dynmerge.merging.merge import PREPARED_BYTES, Merge, Merger
from dynmerge.offer import Offer
from dynmerge.preference import Preference
from dynmerge.recipe import MethodChoice, Recipe

DEFAULT_CACHE_BYTES = 1 << 30
MAX_BACKGROUND = 8  # merges that wait there: each may take a minute
_CLOSED = "the runtime is closed"


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """A merge held for one request. Release it when the request ends; `with lease:` does.

    `merge` is None for the base model, whose `outcome` is `base`. `seconds` is what the request
    waited.
    """

    recipe: Recipe
    merge: Merge | None
    outcome: Literal["base", "hit", "stored", "collapsed"]
    seconds: float
    _claim: Claim | None = None
    _cache: MergeCache | None = None

    def release(self) -> None:
        """Give the merge back to the cache."""
        if self._claim is not None and self._cache is not None:
            self._cache.release(self._claim)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Runtime:
    """A bank, an engine that runs its base model, and the cache of merges between them."""

    def __init__(
        self,
        bank: FactorBank,
        engine: Engine,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        prepared_bytes: int = PREPARED_BYTES,
    ) -> None:
        """Serve `bank` with `engine`. Raises ConfigError when the cache cannot hold one merge."""
        merge_bytes = bank.layout.size * engine.dtype.itemsize
        if cache_bytes < merge_bytes:
            raise ConfigError(
                f"a merge cache of {cache_bytes} bytes holds no merge: one takes {merge_bytes}"
            )
        # The engine keeps the shared bases in its own dtype; merging needs only the small factors.
        self.bank = bank.to(engine.device, bases=False)
        self.engine = engine
        self.offer = Offer(Outline.of_bank(self.bank), self._no_room)
        self._room = cache_bytes
        self._merger = Merger(self.bank, engine.dtype, prepared_bytes)
        self.cache = MergeCache(self._make, capacity=cache_bytes)
        self._closed = False
        self._places = threading.Semaphore(MAX_BACKGROUND)
        # One worker each: merges queue instead of fighting over the cores the engine runs on, and
        # a quick one never waits behind one that takes long.
        self._merging = ThreadPoolExecutor(1, thread_name_prefix="dynmerge-merging")
        self._background = lane("dynmerge-background")
        on_gpu = engine.device.type == "cuda"
        self._stream = torch.cuda.Stream(engine.device) if on_gpu else None  # type: ignore[no-untyped-call]

    @property
    def skills(self) -> tuple[str, ...]:
        """The skills a preference may name."""
        return self.offer.skills

    def recipe(
        self,
        preference: Preference,
        method: MethodChoice | None = None,
        source: str = "preference",
        method_source: str = METHOD_HEADER,
    ) -> Recipe:
        """The recipe of a request. Raises PreferenceError or MethodError; see `Offer.recipe`."""
        return self.offer.recipe(preference, method, source, method_source)

    def _no_room(self, recipe: Recipe) -> str | None:
        itemsize = self.engine.dtype.itemsize
        needed, there = outside_bytes(self.offer.outline, recipe, itemsize), self._room
        if needed <= there:
            return None
        return (
            f"a merge by {recipe.method.name} takes up to {needed} bytes here; the cache of merges "
            f"holds {there}"
        )

    async def lease(self, recipe: Recipe) -> Lease:
        """Hold the merge of `recipe`, making it if nobody has; the caller releases it.

        Raises Overloaded when merges in use or on their way leave no room, EngineDead after
        `close`, and whatever the method raised.
        """
        if recipe.is_base:
            return Lease(recipe, None, "base", 0.0)
        started = time.perf_counter()
        claim = self.cache.claim(recipe)
        try:
            if claim.outcome == "stored":
                self._start(claim)
            if claim.outcome == "hit":
                made = claim.future.result()
            else:
                # Shielded: a client that leaves must not cancel the merge others wait for.
                waiting = asyncio.wrap_future(claim.future)
                waiting.add_done_callback(_heard)
                made = await asyncio.shield(waiting)
        except BaseException:
            self.cache.release(claim)
            raise
        return Lease(recipe, made, claim.outcome, time.perf_counter() - started, claim, self.cache)

    def _start(self, claim: Claim) -> None:
        slow = in_background(claim.recipe.method)
        if slow and not self._places.acquire(blocking=False):
            full = f"{MAX_BACKGROUND} merges wait to be made in the background already"
            raise self._failed(claim, Overloaded(full))
        lane = self._background if slow else self._merging
        try:
            filled = lane.submit(self._fill, claim)
        except RuntimeError:  # closed: others who wait for this merge must hear of it
            raise self._failed(claim, EngineDead(_CLOSED)) from None
        if slow:
            filled.add_done_callback(lambda _: self._places.release())

    def _failed(self, claim: Claim, error: DynmergeError) -> DynmergeError:
        self.cache.fail(claim, error)
        return error

    def _make(self, recipe: Recipe, wanted: Callable[[], bool]) -> Merge:
        def still() -> bool:
            if self._closed:
                raise EngineDead(_CLOSED)
            return wanted()

        if self._stream is None or not in_background(recipe.method):
            return self._merger.merge(recipe, still)
        # On the device's own stream quick merges and the engine would queue behind this one.
        with torch.cuda.stream(self._stream):
            made = self._merger.merge(recipe, still)
            self._stream.synchronize()
        return made

    def _fill(self, claim: Claim) -> None:
        if self._closed:
            self.cache.fail(claim, EngineDead(_CLOSED))
        else:
            self.cache.fill(claim)

    def generate(self, generation: Generation) -> AsyncIterator[Chunk]:
        """Stream one sequence from the engine; closing the iterator cancels it."""
        return self.engine.generate(generation)

    def close(self) -> None:
        """Stop the engine and the merging threads; merges not started yet end in EngineDead."""
        self._closed = True
        self.engine.close()
        self._merging.shutdown(wait=True)
        self._background.shutdown(wait=True)


def _heard(merge: "asyncio.Future[Merge]") -> None:
    """Take note of an error that a client who left will not: asyncio would log its trace."""
    if not merge.cancelled():
        merge.exception()
