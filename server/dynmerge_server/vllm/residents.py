"""Residents: the merges that may be in flight, each under the id by which vLLM's engine knows it.

A worker has slots for so many merges of each form, and a step that asks for more ends it. So every
merge is pinned here before its request goes to vLLM, and what finds no place waits. Bounded by the
slots, whatever preferences come. Knows no vLLM and no HTTP; used from one event loop.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from dynmerge.engines.vllm.forms import Form, form_of
from dynmerge.errors import Overloaded
from dynmerge.recipe import Recipe

LAST_ID = 2**31 - 2
MAX_WAITING = 256


@dataclass(slots=True, eq=False)
class Resident:
    """A merge and its id. `ready` says that the workers are known to have it.

    `rank` and `energy` are of a merge that left the shared bases, once it is ready.
    """

    recipe: Recipe
    id: int
    form: Form
    pins: int = 0
    uses: int = 0
    last_used: int = 0
    ready: bool = False
    rank: int | None = None
    energy: float = 1.0
    making: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True, slots=True)
class ResidentStats:
    """Counters since the start, and what is there now."""

    hits: int
    misses: int
    evictions: int
    entries: int
    pinned: int
    waiting: int
    capacity: int


@dataclass(slots=True, eq=False)
class _Place:
    """The merges of one form: those in use, the others from least to most recently used."""

    capacity: int
    pinned: dict[str, Resident] = field(default_factory=dict)
    idle: OrderedDict[str, Resident] = field(default_factory=OrderedDict)
    waiting: "deque[tuple[Recipe, asyncio.Future[Resident]]]" = field(default_factory=deque)

    def get(self, digest: str) -> Resident | None:
        return self.pinned.get(digest) or self.idle.get(digest)

    @property
    def count(self) -> int:
        return len(self.pinned) + len(self.idle)


class Residents:
    """At most `capacity` merges of each form, with the ids of API process `index` of `count`."""

    def __init__(
        self,
        capacity: Mapping[Form, int],
        index: int = 0,
        count: int = 1,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self._places = {form: _Place(number) for form, number in capacity.items()}
        self._ids = range(1 + index, LAST_ID + 1, count)
        self._next = 0
        self._taken: set[int] = set()
        self._gone: list[str] = []
        self._max_waiting = max_waiting
        self._hits = self._misses = self._evictions = self._clock = 0

    async def pin(self, recipe: Recipe) -> Resident:
        """Hold the place of a merge until `unpin`, waiting for one where all are in use.

        Raises Overloaded where too many wait already.
        """
        form = form_of(recipe.method)
        place = self._places[form]
        if recipe.digest in place.pinned or (not place.waiting and self._has_room(place, recipe)):
            return self._hold(place, form, recipe)
        if len(place.waiting) >= self._max_waiting:
            raise Overloaded(
                f"{self._max_waiting} requests wait already, for one of {place.capacity} merges "
                "in use to end"
            )
        turn: asyncio.Future[Resident] = asyncio.get_running_loop().create_future()
        place.waiting.append((recipe, turn))
        try:
            return await turn
        except asyncio.CancelledError:
            with suppress(ValueError):
                place.waiting.remove((recipe, turn))
            if turn.done() and not turn.cancelled():  # it was given its place in the meantime
                self.unpin(turn.result())
            raise

    def unpin(self, resident: Resident) -> None:
        """Give a place back; the merge keeps it until another needs it."""
        resident.pins -= 1
        if resident.pins:
            return
        place, digest = self._places[resident.form], resident.recipe.digest
        place.idle[digest] = place.pinned.pop(digest)
        while place.waiting and (
            place.waiting[0][1].done() or self._has_room(place, place.waiting[0][0])
        ):
            recipe, turn = place.waiting.popleft()
            if not turn.done():
                turn.set_result(self._hold(place, resident.form, recipe))

    def forget(self, bank: str) -> None:
        """A version of the bank is no more, and what the workers had prepared of it."""
        for place in self._places.values():
            for digest in [d for d, each in place.idle.items() if each.recipe.bank == bank]:
                self._taken.discard(place.idle.pop(digest).id)
            for each in place.pinned.values():
                each.ready = each.ready and (each.recipe.bank != bank or each.form == "diagonal")

    def gone(self) -> list[str]:
        """Merges that left since this was asked, for the workers to be told."""
        gone, self._gone = self._gone, []
        return gone

    def recipes(self) -> list[Recipe]:
        """What is here, least recently used first."""
        there = [
            each
            for place in self._places.values()
            for each in (*place.pinned.values(), *place.idle.values())
        ]
        return [each.recipe for each in sorted(there, key=lambda each: each.last_used)]

    def stats(self) -> ResidentStats:
        """The counters now."""
        places = self._places.values()
        return ResidentStats(
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
            entries=sum(place.count for place in places),
            pinned=sum(len(place.pinned) for place in places),
            waiting=sum(len(place.waiting) for place in places),
            capacity=sum(place.capacity for place in places),
        )

    def _has_room(self, place: _Place, recipe: Recipe) -> bool:
        known = place.get(recipe.digest) is not None
        return known or bool(place.idle) or place.count < place.capacity

    def _hold(self, place: _Place, form: Form, recipe: Recipe) -> Resident:
        resident = place.get(recipe.digest)
        if resident is None:
            self._misses += 1
            resident = self._admit(place, form, recipe)
        else:
            self._hits += 1
        place.idle.pop(recipe.digest, None)
        place.pinned[recipe.digest] = resident
        self._clock += 1
        resident.pins, resident.uses = resident.pins + 1, resident.uses + 1
        resident.last_used = self._clock
        return resident

    def _admit(self, place: _Place, form: Form, recipe: Recipe) -> Resident:
        if place.count >= place.capacity:
            _, evicted = place.idle.popitem(last=False)
            self._taken.discard(evicted.id)
            self._evictions += 1
            if form != "diagonal":  # their rows are taken within a step, by vLLM's own count
                self._gone.append(evicted.recipe.digest)
        # Merges of the form `diagonal` are made within a step.
        return Resident(recipe, self._new_id(), form, ready=form == "diagonal")

    def _new_id(self) -> int:
        """An id that is not in use, and was not for as long as possible.

        What a client left may still run when its place is given away: under the same id it would be
        taken for the newcomer.
        """
        while True:
            found = self._ids[self._next]
            self._next = (self._next + 1) % len(self._ids)
            if found not in self._taken:
                self._taken.add(found)
                return found
