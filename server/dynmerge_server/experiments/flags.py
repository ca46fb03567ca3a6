"""Flags: a team's own feature flags, asked through OpenFeature which arm a unit gets.

Knows no particular flag system, and not what an arm serves. OpenFeature is optional, and imported
only where a configuration names a provider. Its other side, dynmerge as a provider of flags, is in
`provider.py`.
"""

import asyncio
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from dynmerge.errors import ConfigError, ExperimentError
from dynmerge_server.config import FlagsConfig
from dynmerge_server.experiments.declaration import Experiment

if TYPE_CHECKING:
    from openfeature.client import OpenFeatureClient
    from openfeature.provider import AbstractProvider

DOMAIN = "dynmerge"  # of OpenFeature: a client of its own, beside whatever else the process asks
WORKERS = 8  # flags asked for at once
KEEP = 10_000  # values
MISSING = "OpenFeature is not installed: pip install 'dynmerge[experiments]'"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Requests that got no arm of an experiment since the start, for one `reason`.

    `last` is what the last of them met.
    """

    experiment: str
    reason: str  # no arm, late, or OpenFeature's error code in small letters
    count: int
    last: str


@dataclass(frozen=True, slots=True)
class _Answer:
    """A flag's value, or why there is none."""

    value: str | None
    reason: str = ""
    detail: str = ""


class Flags:
    """One provider. A unit whose flag names no arm gets none: it is counted, and never guessed."""

    def __init__(
        self,
        provider: "AbstractProvider",
        config: FlagsConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Let the provider begin; until it is ready no unit gets an arm. `clock` is in seconds."""
        from openfeature import api

        api.set_provider(provider, DOMAIN)
        self._client: OpenFeatureClient = api.get_client(DOMAIN)
        self._wait = config.seconds
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="dynmerge-flags")
        self._late: list[Future[_Answer]] = []  # that still run though nobody waits for them
        self._known = _Known(KEEP, config.keep_seconds, clock)
        self._counts: Counter[tuple[str, str]] = Counter()
        self._last: dict[tuple[str, str], str] = {}

    @classmethod
    def of(cls, config: FlagsConfig) -> "Flags":
        """With the provider that a configuration names. Raises ConfigError where it names none."""
        return cls(_provider(config.provider), config)

    async def arm(self, experiment: Experiment, unit: str) -> str | None:
        """The arm that the experiment's flag names for `unit`, asked for as its targeting key.

        Waits no longer than configured, and not in the event loop. None where the provider is not
        ready, fails, takes longer, or names what is no arm.
        """
        flag = experiment.flag
        if flag is None:
            raise ExperimentError(f"experiment {experiment.name} has no flag")
        answer = self._known.get((flag, unit)) or await self._asked(flag, unit)
        if answer.value is not None and answer.value not in experiment.arms:
            known = ", ".join(experiment.arms)
            detail = f"flag {flag} is {answer.value[:80]!r}, which is no arm (known: {known})"
            answer = _Answer(None, "no arm", detail)
        if answer.value is None:
            key = (experiment.name, answer.reason)
            self._counts[key] += 1
            self._last[key] = answer.detail
        return answer.value

    def refusals(self) -> list[Refusal]:
        """Why requests got no arm, for those who look at an experiment."""
        return [
            Refusal(experiment, reason, count, self._last[experiment, reason])
            for (experiment, reason), count in sorted(self._counts.items())
        ]

    def close(self) -> None:
        """End the threads, and have the provider shut down."""
        from openfeature import api
        from openfeature.provider.no_op_provider import NoOpProvider

        self._pool.shutdown(wait=False, cancel_futures=True)
        api.set_provider(NoOpProvider(), DOMAIN)

    async def _asked(self, flag: str, unit: str) -> _Answer:
        late = _Answer(None, "late", f"flag {flag} took longer than {self._wait:g} s")
        self._late = [call for call in self._late if not call.done()]
        if len(self._late) >= WORKERS:  # to wait for a free thread would be in vain
            return late
        call = self._pool.submit(self._looked_up, flag, unit)
        try:
            await asyncio.wait([asyncio.wrap_future(call)], timeout=self._wait)
        finally:  # also where the one who asked has left
            if not call.done() and not call.cancel():
                self._late.append(call)
        return call.result() if call.done() and not call.cancelled() else late

    def _looked_up(self, flag: str, unit: str) -> _Answer:
        """Blocks for as long as the provider does. What it says late, the next request finds."""
        from openfeature.evaluation_context import EvaluationContext

        details = self._client.get_string_details(flag, "", EvaluationContext(unit))
        if details.error_code is not None:
            code = details.error_code.value.lower().replace("_", " ")
            return _Answer(None, code, f"flag {flag}: {details.error_message or code}")
        answer = _Answer(details.value)
        self._known.add((flag, unit), answer)
        return answer


class _Known:
    """The values found last, each for a time. Any thread may ask and add."""

    def __init__(self, most: int, seconds: float, clock: Callable[[], float]) -> None:
        self._most = most
        self._seconds = seconds
        self._clock = clock
        self._values: OrderedDict[tuple[str, str], tuple[float, _Answer]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, str]) -> _Answer | None:
        with self._lock:
            until, answer = self._values.get(key, (0.0, None))
            if answer is None or self._clock() >= until:
                return None
            self._values.move_to_end(key)
            return answer

    def add(self, key: tuple[str, str], answer: _Answer) -> None:
        with self._lock:
            self._values[key] = self._clock() + self._seconds, answer
            self._values.move_to_end(key)
            if len(self._values) > self._most:
                self._values.popitem(last=False)


def _provider(path: str) -> "AbstractProvider":
    try:
        from openfeature.provider import AbstractProvider
    except ImportError:
        raise ConfigError(MISSING) from None
    module, _, factory = path.partition(":")
    try:
        make = getattr(import_module(module), factory)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"flags: no provider at {path!r}, which is to be package.module:factory ({error})"
        ) from None
    provider = make()
    if not isinstance(provider, AbstractProvider):
        raise ConfigError(
            f"flags: {path} made a {type(provider).__name__}, not an OpenFeature AbstractProvider"
        )
    return provider
