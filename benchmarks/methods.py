"""What each merge method costs beside `linear`: a row per method and space.

`first` is the first merge of a support, which prepares what weights do not decide; `cold` is the
next preference over the same skills, a cache miss. `over linear` pairs each cold merge with a
linear one made right before it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from statistics import median

from benchmarks.harness import settle
from dynmerge.bank.bank import FactorBank
from dynmerge.merging.choice import parse_method
from dynmerge.merging.merge import Merger
from dynmerge.preference import Preference
from dynmerge.recipe import MethodChoice, Recipe

CORE = (
    "linear;p=4",
    "ties",
    "ties;scope=module",
    "ties;order=mergekit",
    "dare-linear",
    "dare-ties",
    "della",
    "tsv-m",
    "iso-c",
    "iso-cts",
    "pico",
    "pico;pool=static",
    "pico;gauge=canonical",
    "pico+ties",
    "linear+svc",
)
DENSE = (
    "lego",
    "ties;space=knots",
    "dare-ties;space=knots",
    "ties;space=full",
    "dare-linear;space=full",
    "dare-ties;space=full",
    "della;space=full",
    "iso-c-dense",
)


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of the first and of later merges, and the latter over `linear`."""

    first: float
    cold: float
    over_linear: float


def preferences(tasks: int) -> Iterator[Preference]:
    """Ever new preferences over all tasks, named as `random_adapters` does."""
    for turn in count(1):
        weights = {f"task{index}": 100 + (turn * (index + 3)) % 97 for index in range(tasks)}
        yield Preference.of(weights)


def costs(bank: FactorBank, methods: Sequence[str], rounds: int, device: str) -> dict[str, Cost]:
    """What each of `methods` costs, `rounds` pairs each."""
    fresh = preferences(len(bank.tasks))

    def seconds(merger: Merger, method: MethodChoice) -> float:
        recipe = Recipe(next(fresh), method, bank.digest)
        return _timed(lambda: merger.merge(recipe), device)

    found = {}
    for text in methods:
        # One of its own for each: what was prepared for one method is of no use to the next.
        merger, plain, method = Merger(bank), parse_method("linear"), parse_method(text)
        first = seconds(merger, method)
        seconds(merger, plain)
        pairs = [(seconds(merger, plain), seconds(merger, method)) for _ in range(rounds)]
        over = median(taken / linear for linear, taken in pairs)
        found[text] = Cost(first, median(taken for _, taken in pairs), over)
    return found


def _timed(run: Callable[[], object], device: str) -> float:
    settle(device)
    started = time.perf_counter()
    run()
    settle(device)
    return time.perf_counter() - started
