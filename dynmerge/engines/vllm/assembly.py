"""Assembly: work beside the step loop: merges that take long, and versions of the bank.

Each is started by the first who asks and asked about until it is ready; nobody blocks. A merge that
nobody has asked about for a while is given up.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import torch

from dynmerge.errors import Abandoned, DynmergeError
from dynmerge.merging.demands import in_background
from dynmerge.merging.lane import lane
from dynmerge.merging.merge import Merge, Merger
from dynmerge.recipe import Recipe

PATIENCE = 10.0  # seconds without a question after which nobody is taken to wait

logger = logging.getLogger("dynmerge.vllm")


class _Told(TypedDict):
    state: Literal["ready", "pending", "failed"]
    reason: str  # where it failed


class Status(_Told, total=False):
    """What is said over vLLM's RPC; `rank` and `energy` of a merge with factors of its own."""

    rank: int
    energy: float


READY: Status = {"state": "ready", "reason": ""}
PENDING: Status = {"state": "pending", "reason": ""}


def ready(merge: Merge) -> Status:
    """The merge is there."""
    if merge.own is None:
        return READY
    return {**READY, "rank": merge.rank, "energy": merge.energy}


def failed(reason: str) -> Status:
    """What was asked for cannot be had."""
    return {"state": "failed", "reason": reason}


@dataclass(slots=True)
class Order:
    """Something being made, and when it was last asked about."""

    future: "Future[Any]"
    asked: list[float] = field(default_factory=lambda: [time.monotonic()])

    @property
    def abandoned(self) -> bool:
        """Whether it was given up because nobody asked."""
        return self.future.done() and isinstance(self.future.exception(), Abandoned)

    def status(self) -> Status:
        """How far it is; asking keeps it wanted."""
        self.asked[0] = time.monotonic()
        if not self.future.done():
            return PENDING
        error = self.future.exception()
        if error is None:
            return READY
        if not isinstance(error, DynmergeError):
            logger.error("work beside the step loop failed", exc_info=error)
        return failed(str(error) or type(error).__name__)


class Assembly:
    """Merges made and on their way, at most `most` of them, by digest."""

    def __init__(self, most: int, device: torch.device) -> None:
        self._most = max(most, 1)
        self._orders: OrderedDict[str, Order] = OrderedDict()
        # Quick ones never wait behind those that take minutes.
        self._lanes = {False: lane("dynmerge-merging"), True: lane("dynmerge-background")}
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self.seconds = 0.0
        self.made = 0

    def prepare(self, recipe: Recipe, merger: Merger) -> Status:
        """Begin to make a merge, or say how far it is. A failure is told once, then forgotten."""
        order = self._orders.get(recipe.digest)
        if order is None or order.abandoned:
            asked = [time.monotonic()]
            work = self._lanes[in_background(recipe.method)].submit(
                self._make, recipe, merger, lambda: time.monotonic() - asked[0] < PATIENCE
            )
            order = self._orders[recipe.digest] = Order(work, asked)
            self._forget()
        status = order.status()
        if status["state"] == "failed":
            del self._orders[recipe.digest]
        elif status["state"] == "ready":
            status = ready(order.future.result())
        return status

    def take(self, recipe: Recipe, merger: Merger) -> Merge:
        """The merge, for good. If it was not prepared it is made now, while the step waits."""
        order = self._orders.pop(recipe.digest, None)
        try:
            if order is not None:
                merge = order.future.result()
                assert isinstance(merge, Merge)
                self._hand_over(merge)
                return merge
        except Abandoned:
            pass
        logger.warning("merge %s was not prepared: the step waits for it", recipe.digest)
        return self._make(recipe, merger, lambda: True)

    def _hand_over(self, merge: Merge) -> None:
        """To the stream that reads it now: its memory is not another merge's until that is done."""
        if self._stream is None:
            return
        reader = torch.cuda.current_stream(self._stream.device)
        own = [t for each in (merge.own or {}).values() for t in (each.A, each.B)]
        for tensor in (*own, *([] if merge.core is None else [merge.core])):
            tensor.record_stream(reader)

    def close(self) -> None:
        """Start nothing more."""
        for each in self._lanes.values():
            each.shutdown(wait=False, cancel_futures=True)

    def _make(self, recipe: Recipe, merger: Merger, wanted: Callable[[], bool]) -> Merge:
        started = time.perf_counter()
        if self._stream is None:
            merge = merger.merge(recipe, wanted)
        else:
            with torch.cuda.stream(self._stream):
                merge = merger.merge(recipe, wanted)
                self._stream.synchronize()
        self.seconds += time.perf_counter() - started
        self.made += 1
        return merge

    def _forget(self) -> None:
        """Give up what was asked about longest ago: its place may be needed."""
        while len(self._orders) > self._most:
            oldest = min(self._orders, key=lambda digest: self._orders[digest].asked[0])
            self._orders.pop(oldest).future.cancel()
