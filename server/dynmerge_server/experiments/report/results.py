"""Results: what a report says, as values. Knows neither how they are found nor shown."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["primary", "exploratory"]
Better = Literal["higher", "lower"]
State = Literal["ok", "broken", "unknown"]
Decision = Literal["better", "none", "few", "mismatch", "undeclared"]


@dataclass(frozen=True, slots=True)
class Interval:
    """From one number to another; None is without end."""

    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside."""
        above = self.low is not None and self.low > 0
        return above or (self.high is not None and self.high < 0)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with the interval for whoever looks once, and the one for whoever looks often."""

    value: float
    fixed: Interval
    sequence: Interval


@dataclass(frozen=True, slots=True)
class Counts:
    """What there is beside the units that are compared. Tuples are by arm."""

    requests: tuple[int, ...]  # of the units that are compared
    cold: tuple[int, ...]  # of those, the ones that waited for their merge
    assigned: tuple[int, ...]  # units compared that the weights placed, not a team's own flags
    forced: int  # requests that named their arm
    holdout: int  # units that got no arm
    two_arms: int  # units seen in more than one arm, left out
    earlier: int  # units first seen before the weights last changed, left out


@dataclass(frozen=True, slots=True)
class ArmMean:
    """One arm's mean of a metric over its units; its interval is for whoever looks once."""

    arm: str
    units: int  # that the mean is of
    answered: float  # the share of all the arm's units that have any value
    mean: float | None
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One arm against the control. The sequence decides, the fixed interval is shown beside it."""

    arm: str
    units: int  # of both
    too_few: str | None  # why nothing can be said yet
    difference: Estimate | None = None
    relative: Estimate | None = None  # to the control's mean, where that is well above 0
    # All to be compared with the experiment's alpha: they allow for all comparisons that share it.
    fixed_p: float | None = None
    adjusted_p: float | None = None  # of an exploratory metric, by Holm, which is the least strict
    sequence_p: float | None = None
    variance_removed: float | None = None  # the share that the time before explained (CUPED)


@dataclass(frozen=True, slots=True)
class Look:
    """The primary metric as it was when the units that had come by `time` were all there were."""

    time: float
    units: tuple[int, ...]  # by arm, whether they have the metric or not
    differences: tuple[Estimate | None, ...]  # by arm other than the control


@dataclass(frozen=True, slots=True)
class MetricResult:
    """One metric in all arms. `alpha` is how often each interval may be wrong."""

    name: str
    role: Role
    better: Better
    rate: bool  # all numbers are 0 or 1
    alpha: float
    arms: tuple[ArmMean, ...]
    comparisons: tuple[Comparison, ...]
    trouble: str | None = None  # why nothing of it can ever be compared


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the primary metric's sequences say; arms are named against the control."""

    decision: Decision
    text: str
    better: tuple[str, ...] = ()
    worse: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SampleRatio:
    """Whether arms have the units that the weights promise them; `red` hides who is better."""

    units: tuple[int, ...]  # by arm, of those that the weights placed
    expected: tuple[float, ...]
    p: float | None  # None where there is nothing to test
    red: bool


@dataclass(frozen=True, slots=True)
class GuardrailState:
    """One guardrail in one arm, broken where even `bound`, which is sure, is beyond `limit`.

    Neither it nor `value` is there where it is not known yet, or hidden by a red sample ratio.
    """

    metric: str
    arm: str
    rule: str
    limit: float
    action: Literal["stop", "show"]
    state: State
    value: float | None
    bound: float | None
    units: int  # of the smaller arm

    @property
    def text(self) -> str:
        """In one sentence."""
        told = f"{self.metric} in {self.arm}, {self.rule} {self.limit:g}: {self.state}"
        if self.state == "unknown":
            return f"{told}; {self.units} units are too few to say, or too much alike"
        if self.value is None or self.bound is None:
            return f"{told}; by how much is not shown while there is a sample ratio mismatch"
        side = "below" if self.rule == "at least" else "above"
        sure = f"surely {side} {self.bound:.4g}"
        return f"{told}; it is {self.value:.4g} in {self.units} units, {sure}"


@dataclass(frozen=True, slots=True)
class Power:
    """What a run of `units` can find, by the test at its end and by the sequence at its end."""

    arm: str
    units: int  # of this arm and the control
    planned: bool  # else as many as there are
    baseline: float  # the control's mean
    alpha: float
    power: float  # that is asked for
    smallest_fixed: float  # differences that are found with that power
    smallest_sequence: float
    effect: float | None = None  # that was planned for
    fixed: float | None = None  # the power to find that
    sequence: float | None = None


@dataclass(frozen=True, slots=True)
class Strength:
    """One arm in comparisons side by side; log-odds to win against the control, whose own are 0."""

    arm: str
    comparisons: int
    wins: float  # a tie is half of one
    strength: float | None = None
    interval: Interval | None = None
    against_control: float | None = None  # the chance to win against it, of neither shown first


@dataclass(frozen=True, slots=True)
class Pairs:
    """All votes. Intervals are for whoever looks once."""

    votes: int
    ties: int
    units: int  # that are named
    without_unit: int  # votes that name none, and may be one person's
    arms: tuple[Strength, ...]
    first_shown: float | None  # the chance that the first shown wins, of equals
    first_shown_interval: Interval | None
    clustered: bool  # whether intervals allow for votes of one unit being alike
    trouble: str | None = None  # why there are no strengths


@dataclass(frozen=True, slots=True)
class Change:
    """One revision: when, by what, why, and what it changed."""

    number: int
    phase: int
    time: float
    source: str
    state: str
    changes: tuple[str, ...]
    reason: str
