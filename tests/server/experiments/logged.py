"""Records to log, each with what a test is about and something sensible for the rest."""

import time
import uuid
from collections.abc import Callable
from typing import Any

from dynmerge_server.experiments.log import Log
from dynmerge_server.experiments.records import Exposure, Finish, Outcome


def exposure(request_id: str = "r", unit: str = "u", **other: Any) -> Exposure:
    given: dict[str, Any] = {
        "id": uuid.uuid4().hex,
        "request_id": request_id,
        "time": time.time(),
        "unit": unit,
        "kind": "assigned",
        "preference": "ada=0.5, bob=0.5",
        "method": "linear",
        "merge_id": "0123456789abcdef",
        "experiment": "tone",
        "arm": "warm",
    }
    return Exposure(**{**given, **other})


def finish(of: Exposure, **other: Any) -> Finish:
    given: dict[str, Any] = {
        "status": 200,
        "cache": "hit",
        "prompt_tokens": 10,
        "completion_tokens": 20,
        "ttft": 0.125,
        "latency": 0.5,
        "finish_reason": "stop",
        "empty": False,
    }
    return Finish(of.id, **{**given, **other})


def outcome(request_id: str = "r", id: str | None = None, **other: Any) -> Outcome:
    given: dict[str, Any] = {"time": time.time(), "name": "score", "data_type": "NUMERIC"}
    if "category" not in other:
        given["value"] = 1.0
    return Outcome(id or uuid.uuid4().hex, request_id, **{**given, **other})


def until(true: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for it; a machine may be slow."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def written(log: Log) -> None:
    """Wait until nothing waits."""
    until(lambda: log.stats().waiting == 0)
