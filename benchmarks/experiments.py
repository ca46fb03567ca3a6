"""What experiments add to a request, in CPU-microseconds of the thread that serves it: its arm, and
telling the log; beside the same request without experiments, which says nothing or a preference.

The writer's own thread is not in it. `new units` were never seen, `known` ones came before;
`after weights changed` asks who was there already.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

from starlette.datastructures import Headers

from benchmarks.adapters import random_adapters
from benchmarks.harness import finish, options, show
from dynmerge.bank.bank import BaseIdentity
from dynmerge.bank.build import build_bank
from dynmerge.bank.outline import Outline
from dynmerge.offer import Offer
from dynmerge_server.config import ServerConfig
from dynmerge_server.experiments.entry import resolve
from dynmerge_server.experiments.live import Experiments
from dynmerge_server.experiments.log import Log, LogConfig
from dynmerge_server.experiments.trial import begin
from dynmerge_server.models import Models
from dynmerge_server.preferences import Preferences, Wish

ARMS = {"a": {"preference": "task0=1"}, "b": {"preference": "task0=0.5, task1=0.5"}}
UNITS = 5000
PREFERENCE = Headers({"X-Dynmerge-Preference": "task0=0.5, task1=0.5"})
NOTHING = Headers()


def main() -> None:
    """Measure and print."""
    arguments = options(__doc__ or "").parse_args()
    requests, rounds = (500, 5) if arguments.quick else (2000, 15)
    with tempfile.TemporaryDirectory() as folder:
        log = Log(LogConfig(Path(folder) / "log.sqlite", queue=1_000_000))
        try:
            medians = measure(log, requests, rounds)
        finally:
            log.close()
    plain = medians["no experiments, no preference"]
    show(
        f"{requests} requests a round, {rounds} rounds in turn",
        ("request", "µs", "added"),
        [(name, f"{each:.1f}", f"{each - plain:.1f}") for name, each in medians.items()],
    )
    reading = medians["no experiments, a preference"] - plain
    ratios = {
        f"added by {name}, over reading a preference": (each - plain) / reading
        for name, each in medians.items()
        if name.startswith("experiments")
    }
    finish(arguments, ratios, {"microseconds": medians})


def measure(log: Log, requests: int, rounds: int) -> dict[str, float]:
    """Median CPU-microseconds of a request by what it meets."""
    preferences = preferences_of_bank()
    live, weighed = Experiments(log), Experiments(log)
    live.declare("live", {"arms": ARMS, "namespace": {"name": "n", "end": 0.9}})
    weighed.declare("weighed", {"arms": ARMS, "namespace": {"name": "n", "start": 0.9}})
    weighed.change("weighed", {"weights": {"a": 1, "b": 3}})
    fresh, again = count(), count()
    new = lambda: unit(f"new-{next(fresh)}")  # noqa: E731
    known = lambda: unit(f"known-{next(again) % UNITS}")  # noqa: E731
    variants: dict[str, Callable[[], float]] = {
        "no experiments, no preference": lambda: run(None, preferences, requests, lambda: NOTHING),
        "no experiments, a preference": lambda: run(
            None, preferences, requests, lambda: PREFERENCE
        ),
        "experiments, no unit": lambda: run(live, preferences, requests, lambda: NOTHING),
        "experiments, new units, arm alone": lambda: run(
            live, preferences, requests, new, logged=False
        ),
        "experiments, new units": lambda: run(live, preferences, requests, new),
        "experiments, known units": lambda: run(live, preferences, requests, known),
        "experiments, new units after weights changed": lambda: run(
            weighed, preferences, requests, new
        ),
    }
    spent: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(-1, rounds):
        for name, variant in variants.items():
            seconds = variant()
            if turn >= 0:
                spent[name].append(seconds / requests * 1e6)
    return {name: statistics.median(each) for name, each in spent.items()}


def preferences_of_bank() -> Preferences:
    """Those of a small bank; what is in its layers does not matter here."""
    adapters = random_adapters({"layer": (32, 32)}, 4, 4, 0)
    offer = Offer(Outline.of_bank(build_bank(BaseIdentity("base", ""), adapters)))
    config = ServerConfig()
    return Preferences(offer, Models.of(offer, config, 512), config)


def unit(name: str) -> Headers:
    """A request's headers, as a server has them."""
    return Headers(raw=[(b"x-dynmerge-unit", name.encode())])


def run(
    experiments: Experiments | None,
    preferences: Preferences,
    requests: int,
    headers: Callable[[], Headers],
    *,
    logged: bool = True,
) -> float:
    """CPU-seconds of this thread for that many requests, from headers to the log."""
    asked = [headers() for _ in range(requests)]

    async def all_of() -> float:
        started = time.thread_time()
        for number, each in enumerate(asked):
            resolved = await resolve(experiments, preferences, each, Wish(), None)
            log = experiments.log if experiments and logged else None
            trial = begin(log, resolved, f"r{number}", time.perf_counter())
            if trial is not None:
                trial.first_token()
                trial.end(200, cache="hit", prompt_tokens=9, completion_tokens=9, empty=False)
        return time.thread_time() - started

    return asyncio.run(all_of())


if __name__ == "__main__":
    main()
