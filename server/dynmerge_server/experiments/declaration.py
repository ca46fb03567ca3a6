"""Experiment: what somebody declared, in TOML or JSON, checked but for what only a bank knows.

Knows no requests, no log and no statistics.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from math import isfinite
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError

from dynmerge.errors import ExperimentError
from dynmerge_server.config import explain
from dynmerge_server.experiments.records import OUTCOME_NAME

NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
ARM_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
MAX_ARMS = 32
SUM_ERROR = 1e-9  # of weights that were divided by their sum

Number = Annotated[float, Strict()]  # neither true nor "0.5"
Share = Annotated[Number, Field(ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[Number, Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
OutcomeName = Annotated[str, Field(pattern=OUTCOME_NAME)]
State = Literal["draft", "running", "paused", "stopped"]
# What is known of every request without anybody's feedback; seconds, tokens, or 1 for yes.
Measure = Literal["error", "empty", "ttft", "latency", "tokens"]
PerUnit = Literal["mean", "sum", "any"]
UnitSource = Literal["any", "header", "session", "user"]

_STRICT = ConfigDict(extra="forbid")


def _no_number(value: object) -> object:
    if isinstance(value, (int, float)):
        raise ValueError("a time is written as 2026-12-01T09:00:00Z")
    return value


Moment = Annotated[datetime, BeforeValidator(_no_number)]


@dataclass(frozen=True, slots=True)
class Arm:
    """What a unit's requests are served with. All None is what the server does by itself."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    preference: str | Mapping[str, Finite] | None = None
    preset: str | None = None
    method: str | None = None

    def __post_init__(self) -> None:
        if self.preference is not None and self.preset is not None:
            raise ExperimentError("preference and preset both say what is served; give one of them")


@dataclass(frozen=True, slots=True)
class Namespace:
    """Experiments with disjoint parts of one namespace never share a unit."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    start: Share = 0.0
    end: Share = 1.0

    def __post_init__(self) -> None:
        if self.start >= self.end:
            raise ExperimentError(f"the part from {self.start} to {self.end} is empty")


@dataclass(frozen=True, slots=True)
class Holdout:
    """A share of units that gets no arm of any experiment with the same holdout."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    share: Annotated[Number, Field(gt=0, lt=1)]


@dataclass(frozen=True, slots=True)
class Metric:
    """What is compared: an outcome by its name, or a measure; one number for each unit.

    `mean` is over a unit's values, and units without any are left out; `sum` and `any` (1 if any is
    above 0) count units without as 0. `over` makes each value 1 where it is larger, else 0. Of
    outcomes more is better, of errors, empty answers and seconds less, unless `better` says so.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    outcome: OutcomeName | None = None
    measure: Measure | None = None
    per_unit: PerUnit = "mean"
    over: Finite | None = None
    better: Literal["higher", "lower"] = ""  # type: ignore[assignment] # filled in

    def __post_init__(self) -> None:
        if (self.outcome is None) == (self.measure is None):
            raise ExperimentError("a metric is of one outcome or of one measure")
        if not self.better:
            if self.measure == "tokens":
                raise ExperimentError("of tokens, say whether `better` is higher or lower")
            object.__setattr__(self, "better", "lower" if self.measure else "higher")

    @property
    def name(self) -> str:
        """As reports call it."""
        over = "" if self.over is None else f" over {self.over:g}"
        per_unit = "" if self.per_unit == "mean" else f" ({self.per_unit} per unit)"
        return f"{self.outcome or self.measure}{over}{per_unit}"


@dataclass(frozen=True, slots=True)
class Guardrail:
    """A metric that must not get worse; an arm that breaks it ends the experiment.

    `at_most` and `at_least` bound an arm's own mean, `worse_by` its difference to the control.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    metric: Metric
    at_most: Finite | None = None
    at_least: Finite | None = None
    worse_by: Annotated[Number, Field(ge=0, allow_inf_nan=False)] | None = None
    action: Literal["stop", "show"] = "stop"

    def __post_init__(self) -> None:
        given = [b for b in (self.at_most, self.at_least, self.worse_by) if b is not None]
        if len(given) != 1:
            raise ExperimentError("a guardrail has one of at_most, at_least and worse_by")


@dataclass(frozen=True, slots=True)
class Plan:
    """How large a run was planned, before it began: units of all arms, and the difference that
    should be found."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    units: Annotated[int, Field(ge=2, le=10**9)]
    effect: Positive | None = None
    power: Annotated[Number, Field(ge=0.5, le=0.999)] = 0.8


@dataclass(frozen=True, slots=True)
class Step:
    """A share of traffic from a time on."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    at: Moment
    traffic: Share


@dataclass(frozen=True, slots=True)
class Experiment:
    """One experiment as declared. `weights` and `control` are filled in; weights sum to 1."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    arms: Mapping[str, Arm]
    weights: Mapping[str, Annotated[Number, Field(ge=0, le=1e9)]] = field(default_factory=dict)
    control: str | None = None  # the first arm
    traffic: Share = 1.0
    ramp: tuple[Step, ...] = ()
    unit: UnitSource = "any"
    flag: str | None = None  # of the team's own flag system, whose value is the arm
    seed: str | None = None  # of the hash; None is the name
    namespace: Namespace | None = None
    holdout: Holdout | None = None
    primary: Metric | None = None
    metrics: tuple[Metric, ...] = ()
    guardrails: tuple[Guardrail, ...] = ()
    plan: Plan | None = None
    alpha: Annotated[Number, Field(gt=0, lt=0.5)] = 0.05
    state: State = "running"
    start: Moment | None = None
    stop: Moment | None = None

    def __post_init__(self) -> None:
        _check_names(self)
        set_here = object.__setattr__
        set_here(self, "control", self.control or next(iter(self.arms)))
        set_here(self, "weights", _shares(self))
        _check_times(self)

    @classmethod
    def parse(cls, name: str, table: Any) -> "Experiment":
        """A declaration from outside. Raises ExperimentError naming the key and the choices."""
        given = {**table, "name": name} if isinstance(table, Mapping) else table
        try:
            return _ADAPTER.validate_python(given)
        except ValidationError as error:
            raise ExperimentError(f"experiment {name}: {explain(error, cls)}") from None
        except ExperimentError as error:
            raise ExperimentError(f"experiment {name}: {error}") from None

    def traffic_at(self, time: float) -> float:
        """The share of traffic by the ramp's last step that is over."""
        if not self.ramp:
            return self.traffic
        steps = [step.traffic for step in self.ramp if step.at.timestamp() <= time]
        return steps[-1] if steps else self.traffic

    def runs_at(self, time: float) -> bool:
        """Whether units get arms then."""
        begun = self.start is None or self.start.timestamp() <= time
        over = self.stop is not None and self.stop.timestamp() <= time
        return self.state == "running" and begun and not over

    def table(self) -> dict[str, Any]:
        """As JSON holds it; `parse` reads it back."""
        table: dict[str, Any] = _ADAPTER.dump_python(self, mode="json", exclude_none=True)
        return table


_ADAPTER: TypeAdapter[Experiment] = TypeAdapter(Experiment)


def parse_all(tables: object) -> dict[str, Experiment]:
    """Experiments by name, from the table `experiments` of a file. Raises ExperimentError.

    Parts of one namespace that overlap are one, as they would share units.
    """
    if not isinstance(tables, Mapping):
        raise ExperimentError("experiments is a table of experiments by name")
    found = {str(name): Experiment.parse(str(name), table) for name, table in tables.items()}
    check_apart(found.values())
    return found


def check_apart(experiments: Iterable[Experiment]) -> None:
    """Raise ExperimentError where parts of one namespace overlap, of experiments not stopped."""
    parts = [
        (each.namespace.name, each.namespace.start, each.namespace.end, each.name)
        for each in experiments
        if each.namespace is not None and each.state != "stopped"
    ]
    for (here, _, end, one), (there, start, _, other) in pairwise(sorted(parts)):
        if here == there and start < end:
            raise ExperimentError(
                f"experiments {one} and {other} overlap in the namespace {here}, from {start:g} to "
                f"{end:g}: give them parts that do not"
            )


def _check_names(given: Experiment) -> None:
    if not NAME.fullmatch(given.name):
        raise ExperimentError("its name is up to 64 of a-z 0-9 _ -, the first a letter")
    if not 2 <= len(given.arms) <= MAX_ARMS:
        raise ExperimentError(f"arms: {len(given.arms)} of them; an experiment has 2 to {MAX_ARMS}")
    for name in given.arms:
        if not ARM_NAME.fullmatch(name):
            raise ExperimentError(
                f"arm {name[:80]!r}: up to 64 of A-Z a-z 0-9 _ -, the first a letter"
            )
    known = ", ".join(given.arms)
    for name in (*given.weights, *([given.control] if given.control else [])):
        if name not in given.arms:
            raise ExperimentError(f"no arm named {name!r} (known: {known})")
    names = [metric.name for metric in metrics_of(given)]
    for name in names:
        if names.count(name) > 1:
            raise ExperimentError(f"metrics: {name} stands there twice")
    _check_alike([*metrics_of(given), *(rail.metric for rail in given.guardrails)])


def _check_alike(metrics: Iterable[Metric]) -> None:
    """Raise ExperimentError where two different metrics would have one name in a report."""
    by_name: dict[str, Metric] = {}
    for metric in metrics:
        if by_name.setdefault(metric.name, metric) != metric:
            raise ExperimentError(f"two different metrics are both called {metric.name}")


def metrics_of(experiment: Experiment) -> list[Metric]:
    """The primary metric first, then the others."""
    return [*([experiment.primary] if experiment.primary else []), *experiment.metrics]


def _shares(given: Experiment) -> dict[str, float]:
    """Weights of all arms, in their order, divided by their sum; what has been is left alone."""
    weights = {name: given.weights.get(name) for name in given.arms}
    if not given.weights:
        return {name: 1 / len(weights) for name in weights}
    for name, weight in weights.items():
        if weight is None or not isfinite(weight):
            raise ExperimentError(
                f"weights: none for the arm {name!r}; give one to each, or none at all"
            )
    total = sum(weight for weight in weights.values() if weight is not None)
    if total <= 0:
        raise ExperimentError("weights: all are 0")
    whole = 1.0 if abs(total - 1) < SUM_ERROR else total
    return {name: (weight or 0.0) / whole for name, weight in weights.items()}


def _check_times(given: Experiment) -> None:
    times = [time for time in (given.start, *(step.at for step in given.ramp), given.stop) if time]
    if any(time.tzinfo is None for time in times):
        raise ExperimentError("times have a zone, such as 2026-12-01T09:00:00Z")
    if times != sorted(times):
        raise ExperimentError("start, the steps of ramp and stop follow each other in time")
