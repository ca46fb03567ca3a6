"""Proposals: preferences worth trying next, as text, as JSON, and as an experiment that tries them.

Everything here says that it is no test. Knows no model and no log.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynmerge.preference import Preference
from dynmerge_server.experiments.declaration import Arm, Experiment, Metric

LEVEL = 0.95  # of the intervals
BEST = "best"  # the arm of the best preference so far


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a preference is thought to bring, by all that was seen; the interval is of LEVEL."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ({self.low:.4g} to {self.high:.4g})"

    def table(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"mean": self.mean, "interval": [self.low, self.high], "level": LEVEL}


@dataclass(frozen=True, slots=True)
class Tried:
    """A preference that units had, in one arm or several (`experiment/arm`)."""

    preference: Preference
    arms: tuple[str, ...]
    units: int
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Proposal:
    """A preference to try. Of the improvement on the best that is to be expected, `exploit` is the
    share that is there if the estimates are true, the rest there only because they may be wrong.
    """

    preference: Preference
    estimate: Estimate
    exploit: float

    @property
    def why(self) -> str:
        """The two shares in words."""
        return f"exploit {self.exploit:.0%}, explore {1 - self.exploit:.0%}"


@dataclass(frozen=True, slots=True)
class Proposals:
    """What came out, the best first tried as control; `base` is the experiment that is followed."""

    base: Experiment
    name: str  # for the next experiment
    metric: Metric
    method: str | None  # to declare with each arm; None is the server's own
    skills: tuple[str, ...]
    experiments: tuple[str, ...]
    seed: int
    best: Tried
    proposals: tuple[Proposal, ...]
    tried: tuple[Tried, ...]
    left_out: tuple[str, ...] = ()  # arms, each with the reason

    @property
    def note(self) -> str:
        """What must stand above every number."""
        chosen = "large" if self.metric.better == "higher" else "small"
        return (
            "optimisation, not a test: the estimates below are shrunk and chosen for being "
            f"{chosen}; declare an experiment to compare them"
        )

    def table(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "object": "optimisation",
            "note": self.note,
            "metric": self.metric.name,
            "better": self.metric.better,
            "experiments": list(self.experiments),
            "skills": list(self.skills),
            "seed": self.seed,
            "best": _tried(self.best),
            "proposals": [
                {
                    "preference": str(each.preference),
                    **each.estimate.table(),
                    "exploit": each.exploit,
                    "explore": 1 - each.exploit,
                }
                for each in self.proposals
            ],
            "tried": [_tried(each) for each in self.tried],
            "left_out": list(self.left_out),
            "toml": self.toml(),
        }

    def __str__(self) -> str:
        """For people."""
        best = self.best
        lines = [
            self.note,
            "",
            f"{self.metric.name} ({self.metric.better} is better), intervals of {LEVEL:.0%}, by "
            f"{sum(each.units for each in self.tried)} units of {', '.join(self.experiments)}",
            f"best so far  {best.preference}: {best.estimate}; {best.units} units of "
            f"{', '.join(best.arms)}",
            *(
                f"proposal {number}   {each.preference}: {each.estimate}; {each.why}"
                for number, each in enumerate(self.proposals, 1)
            ),
            *(f"left out: {reason}" for reason in self.left_out),
        ]
        return "\n".join(lines)

    def experiment(self) -> Experiment:
        """A draft that compares the proposals with the best so far, watched as the last one was."""
        base = self.base
        preferences = {BEST: self.best.preference} | {
            f"p{number}": each.preference for number, each in enumerate(self.proposals, 1)
        }
        return Experiment(
            self.name,
            {arm: Arm(str(given), method=self.method) for arm, given in preferences.items()},
            traffic=base.traffic,
            unit=base.unit,
            namespace=base.namespace,
            holdout=base.holdout,
            primary=base.primary,
            metrics=base.metrics,
            guardrails=base.guardrails,
            plan=base.plan,
            alpha=base.alpha,
            state="draft",
        )

    def toml(self) -> str:
        """That draft for the file of experiments."""
        table = self.experiment().table()
        arms = table.pop("arms")
        del table["name"], table["weights"]  # the table's own name; all alike
        estimates = [self.best.estimate, *(each.estimate for each in self.proposals)]
        return "\n".join(
            [
                f"# {self.note}",
                f"[experiments.{self.name}]",
                *(f"{key} = {_toml(value)}" for key, value in table.items()),
                "",
                f"[experiments.{self.name}.arms]",
                *(
                    f"{arm} = {_toml(arms[arm])}  # {estimate}"
                    for arm, estimate in zip(arms, estimates, strict=True)
                ),
                "",
            ]
        )


def _tried(tried: Tried) -> dict[str, Any]:
    return {
        "preference": str(tried.preference),
        **tried.estimate.table(),
        "arms": list(tried.arms),
        "units": tried.units,
    }


def _toml(value: object) -> str:
    """On one line. TOML's strings, numbers and booleans are JSON's but for one character."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + " }"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
