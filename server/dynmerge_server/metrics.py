"""Metrics for Prometheus: vLLM's names, so that its dashboards and gateways work, and dynmerge_*
for merges.

Every label's values are bounded: by the routes, the skills and words of our own, never by what a
client sends. A merge's id is no label.
"""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dynmerge.engines.engine import FinishReason
from dynmerge.runtime import Runtime
from dynmerge_server.models import Models

TO_FIRST = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
    20,
    40,
    80,
)
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
FINISHED: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")


class Metrics:
    """What requests did. `in_flight` is how many are being answered now."""

    def __init__(self, runtime: Runtime, models: Models) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(RuntimeCollector(runtime, models))
        self.in_flight = 0
        self._model = models.base
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens taken.")
        self._generated = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._success = self._counter(
            "vllm:request_success", "Sequences finished, by reason.", "finished_reason"
        )
        self._sources = self._counter(
            "dynmerge_requests", "Requests, by who chose the preference.", "source"
        )
        self._first = self._histogram("time_to_first_token_seconds", TO_FIRST)
        self._between = self._histogram("inter_token_latency_seconds", PER_TOKEN)
        self._whole = self._histogram("e2e_request_latency_seconds", WHOLE)
        self._queue = self._histogram("request_queue_time_seconds", WHOLE)
        self._prefill = self._histogram("request_prefill_time_seconds", WHOLE)
        self._prompt_sizes = self._histogram("request_prompt_tokens", TOKENS)
        self._answer_sizes = self._histogram("request_generation_tokens", TOKENS)
        self._n = self._histogram("request_params_n", (1, 2, 5, 10, 20))
        self._max_tokens = self._histogram("request_params_max_tokens", TOKENS)
        for reason in FINISHED:
            self._success.labels(self._model, reason)

    def began(self, source: str, n: int, sizes: list[int], max_tokens: int, queued: float) -> None:
        """A request goes to the engine `queued` seconds after it came; `sizes` are its prompts'."""
        self._sources.labels(self._model, source).inc()
        self._n.labels(self._model).observe(n)
        self._max_tokens.labels(self._model).observe(max_tokens)
        self._queue.labels(self._model).observe(queued)
        for size in sizes:
            self._prompt_tokens.labels(self._model).inc(size)
            self._prompt_sizes.labels(self._model).observe(size)

    def first_token(self, seconds: float, prefill: float) -> None:
        """The first token came `seconds` after the request, `prefill` after the engine had it."""
        self._first.labels(self._model).observe(seconds)
        self._prefill.labels(self._model).observe(prefill)

    def tokens(self, count: int, since_last: float | None) -> None:
        """Tokens of one sequence came, `since_last` seconds after those before."""
        self._generated.labels(self._model).inc(count)
        if since_last is not None and count:
            self._between.labels(self._model).observe(since_last / count)

    def finished(self, reason: FinishReason, count: int, seconds: float) -> None:
        """A sequence of `count` tokens ended, `seconds` after its request came."""
        self._success.labels(self._model, reason).inc()
        self._answer_sizes.labels(self._model).observe(count)
        self._whole.labels(self._model).observe(seconds)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(name, what, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        what = name.replace("_", " ")
        histogram = Histogram(
            f"vllm:{name}", what, ("model_name",), buckets=buckets, registry=self.registry
        )
        histogram.labels(self._model)  # there from the start, empty
        return histogram


class RuntimeCollector(Collector):
    """Reads the engine's load and the merge cache's counters when Prometheus asks."""

    def __init__(self, runtime: Runtime, models: Models) -> None:
        self._runtime = runtime
        self._model = models.base

    def collect(self) -> Iterator[Metric]:
        """The engine under vLLM's names, then the merge cache under ours."""
        load = self._runtime.engine.load()
        yield self._gauge("vllm:num_requests_running", "Sequences running.", load.running)
        yield self._gauge("vllm:num_requests_waiting", "Sequences waiting.", load.waiting)
        usage = "Key-value cache in use, 0 to 1."
        yield self._gauge("vllm:kv_cache_usage_perc", usage, load.cache_usage)
        queries = "Tokens looked up in the prefix cache."
        yield self._counter("vllm:prefix_cache_queries", queries, load.prefix_queries)
        yield self._counter("vllm:prefix_cache_hits", "Tokens found there.", load.prefix_hits)
        yield self._lora()
        stats = self._runtime.cache.stats()
        for name in ("hits", "misses", "collapsed", "evictions", "failures"):
            yield self._counter(
                f"dynmerge_merge_cache_{name}", f"Merges: {name}.", getattr(stats, name)
            )
        yield self._counter("dynmerge_merge_seconds", "Time spent making merges.", stats.seconds)
        for name in ("entries", "pinned", "nbytes", "capacity"):
            label = {"nbytes": "bytes", "capacity": "capacity_bytes"}.get(name, name)
            what = f"Merge cache: {label}."
            yield self._gauge(f"dynmerge_merge_cache_{label}", what, getattr(stats, name))

    def _gauge(self, name: str, what: str, value: float) -> Metric:
        metric = GaugeMetricFamily(name, what, labels=("model_name",))
        metric.add_metric((self._model,), value)
        return metric

    def _counter(self, name: str, what: str, value: float) -> Metric:
        metric = CounterMetricFamily(name, what, labels=("model_name",))
        metric.add_metric((self._model,), value)
        return metric

    def _lora(self) -> Metric:
        """What a Kubernetes inference gateway routes by: one series, of all skills, always."""
        skills = self._runtime.skills
        labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        metric = GaugeMetricFamily("vllm:lora_requests_info", "Skills served.", labels=labels)
        metric.add_metric((str(len(skills)), ",".join(skills), ""), time.time())
        return metric
