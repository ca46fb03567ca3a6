"""How long the steps of running streams take while slow merges are assembled beside them.

Runs within an engine's process, which is the worker's: its step loop and the thread that assembles.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.vllm_engine import MODEL_LENGTH, Engine, Load, prompts

ALONE = "alone"
METHODS = ("tsv-m", "ties;space=full", "knots-ties")
BATCH = 16
POLL = 4  # steps between two questions whether a merge is ready
LONGEST = 20.0  # seconds that one merge is watched


@dataclass(frozen=True, slots=True)
class Steps:
    """Milliseconds of each step, and the seconds until the merge was ready or watched no longer."""

    ms: list[float]
    seconds: float

    def quantile(self, share: float) -> float:
        """The step that `share` of all are no longer than."""
        ordered = sorted(self.ms)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def told(self) -> str:
        """The seconds, in words."""
        return f"> {LONGEST:.0f}" if self.seconds > LONGEST else f"{self.seconds:.1f}"


def measure_stall(engine: Engine, steps: int) -> dict[str, Steps]:
    """Steps alone, `steps` of them, then beside merges by each method."""
    streams = Streams(engine)
    started = time.perf_counter()
    warm = started + 2.0
    streams.until(lambda: time.perf_counter() > warm)
    count = iter(range(steps))
    found = {ALONE: Steps(streams.until(lambda: next(count, None) is None), 0.0)}
    for place, method in enumerate(METHODS):
        found[method] = _beside(engine, streams, 100 + place, method)
    return found


def _beside(engine: Engine, streams: "Streams", number: int, method: str) -> Steps:
    recipe = engine.recipe(number, method)
    started, asked = time.perf_counter(), [0]

    def over() -> bool:
        asked[0] += 1
        if time.perf_counter() - started > LONGEST:
            return True
        return asked[0] % POLL == 1 and engine.is_ready(recipe)

    return Steps(streams.until(over), time.perf_counter() - started)


class Streams:
    """BATCH requests that decode without end, each under a merge of its own."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = engine.llm.llm_engine
        self._started = 0

    def until(self, over: Callable[[], bool]) -> list[float]:
        """The milliseconds of each step until it is over, but those that prompts share."""
        found = []
        while not over():
            fresh = not self._loop.has_unfinished_requests()
            if fresh:
                self._start()
            started = time.perf_counter()
            self._loop.step()
            if not fresh:
                found.append(1000 * (time.perf_counter() - started))
        return found

    def _start(self) -> None:
        load = Load(BATCH, 4, MODEL_LENGTH - 8)
        requests = self._engine.requests(BATCH, BATCH, "linear")
        for prompt, request in zip(prompts(load), requests, strict=True):
            self._started += 1
            sampling = self._engine.sampling(load.new)
            self._loop.add_request(str(self._started), prompt, sampling, lora_request=request)
