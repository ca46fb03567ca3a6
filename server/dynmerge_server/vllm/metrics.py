"""Metrics beside vLLM's own: dynmerge_* in the registry that vLLM's /metrics shows, and one series
of `vllm:lora_requests_info` whatever is asked for.

Plain counters and gauges: they work with several API processes too, where collectors do not.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from dynmerge.errors import ConfigError
from dynmerge_server.vllm.residents import ResidentStats

COUNTED = ("hits", "misses", "evictions")
SHOWN = ("entries", "pinned", "waiting", "capacity")


class Metrics:
    """What this API process did. No label's values come from a client."""

    def __init__(self, model: str, registry: CollectorRegistry = REGISTRY) -> None:
        self._model = model
        self._requests = Counter(
            "dynmerge_requests",
            "Requests, by who chose the preference.",
            ("model_name", "source"),
            registry=registry,
        )
        self._counters = {
            name: Counter(
                f"dynmerge_merge_slots_{name}",
                f"Merges: {name}.",
                ("model_name",),
                registry=registry,
            ).labels(model)
            for name in COUNTED
        }
        self._gauges = {
            name: Gauge(
                f"dynmerge_merge_slots_{name}",
                f"Merges that may be in flight: {name}.",
                ("model_name",),
                multiprocess_mode="livesum",
                registry=registry,
            ).labels(model)
            for name in SHOWN
        }
        self._told = dict.fromkeys(COUNTED, 0)

    def began(self, source: str) -> None:
        """A request came whose preference was chosen by `source`."""
        self._requests.labels(self._model, source).inc()

    def tell(self, stats: ResidentStats) -> None:
        """Bring counters and gauges to `stats`."""
        now = asdict(stats)
        for name, counter in self._counters.items():
            counter.inc(now[name] - self._told[name])
            self._told[name] = now[name]
        for name, gauge in self._gauges.items():
            gauge.set(now[name])


class OneSeries:
    """In place of vLLM's gauge of adapters, whose labels would name every mix of merges in flight.

    Its one series names the skills, as a gateway that routes by adapter wants to know them.
    """

    def __init__(self, gauge: Any, skills: Callable[[], tuple[str, ...]]) -> None:
        self._gauge = gauge
        self._skills = skills
        self._labels: dict[str, str] = {}

    def labels(self, **given: object) -> Any:
        """The series, whatever merges are given."""
        names = ",".join(self._skills())
        labels = {
            "max_lora": str(given["max_lora"]),
            "waiting_lora_adapters": "",
            "running_lora_adapters": names,
        }
        if labels != self._labels:  # the bank has other skills now, or this is the first
            self._gauge.clear()
            self._labels = labels
        return self._gauge.labels(**labels)


def collapse(engine: Any, skills: Callable[[], tuple[str, ...]]) -> None:
    """Give vLLM's loggers the gauge of one series. Raises ConfigError where it is not found."""
    loggers = engine.logger_manager.stat_loggers if engine.logger_manager else ()
    found = [each for each in loggers if hasattr(each, "gauge_lora_info")]
    if loggers and not found:
        raise ConfigError("this vLLM has no gauge vllm:lora_requests_info to keep small")
    for each in found:
        if each.gauge_lora_info is not None:
            each.gauge_lora_info = OneSeries(each.gauge_lora_info, skills)
            each.gauge_lora_info.labels(max_lora=each.max_lora).set(time.time())
