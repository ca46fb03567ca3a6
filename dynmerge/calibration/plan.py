"""Plan: what a calibration is asked to learn, and how: all that decides its result but the data."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from dynmerge.errors import CalibrationError

Objective = Literal["distil", "entropy", "labels"]
DEFAULT_FORM = "ratio"

# What a step of 1 means, by table: `ratio` is a logarithm, `fixed`, `bubbles` and `gain` move what
# multiplies an update. Of a core every entry moves at once, in units of the entries' own size.
UNITS: Mapping[str, float] = {
    "ratio": 1.0,
    "gain": 0.2,
    "fixed": 0.2,
    "bubbles": 0.15,
    "tables": 0.05,
}
# What holds a method's tables near their start where nobody says: a core is free in every entry.
PULLS: Mapping[str, float] = {"core": 0.001}
MAX_SEED = 2**64 - 1  # torch.Generator takes no more
LARGEST = sys.float_info.max


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings of one calibration.

    `at` is the one preference (tasks,) that form `fixed` is found for. Gaps f_i - z_i are divided
    by the gap that the start leaves, if `normalise`; `mu` is smooth Tchebycheff's, in those units.
    `rate` is the step size, in units of a table's own scale; `decay` is AdamW's; `pull` is the
    weight of the tables' mean squared distance from their start, the method's own where none is
    given. The held-out score is taken every `check` steps; `patience` checks without a better one
    end it. Raises CalibrationError for a value that none of them takes.
    """

    method: str
    form: str = DEFAULT_FORM
    objective: Objective = "distil"
    at: tuple[float, ...] | None = None
    steps: int = 100
    batch: int = 8
    rate: float = 0.15
    decay: float = 0.0
    mu: float = 1.0
    normalise: bool = True
    pull: float | None = None
    check: int = 25
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            known = ", ".join(get_args(Objective))
            raise CalibrationError(f"no objective {self.objective!r} (known: {known})")
        if self.pull is None:
            object.__setattr__(self, "pull", PULLS.get(self.method, 0.0))
        for name in ("steps", "batch", "check", "patience"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise CalibrationError(f"{name} is {value!r}, not a whole number from 1")
        if type(self.seed) is not int or not 0 <= self.seed <= MAX_SEED:
            raise CalibrationError(f"seed is {self.seed!r}, not a whole number from 0 to 2**64 - 1")
        for name in ("rate", "decay", "pull"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value <= LARGEST):
                raise CalibrationError(f"{name} is {value!r}, not a number from 0")
        if not (_is_number(self.mu) and 0 < self.mu <= LARGEST):
            raise CalibrationError(f"mu is {self.mu!r}, not a number above 0")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def published(method: str, at: tuple[float, ...], seed: int = 0) -> Plan:
    """TARA's own settings (arXiv:2603.26299 and its code): one preference, entropy, mu = 1.

    Every gap counts as it is, and there the scalarisation hardly trades off: nearly a plain sum.
    """
    return Plan(
        method,
        form="fixed",
        objective="entropy",
        at=at,
        steps=500,
        batch=16,
        rate=1e-3 / UNITS["fixed"],  # 1e-3 for a coefficient
        decay=0.01,
        mu=1.0,
        normalise=False,
        pull=0.0,
        check=50,
        patience=10,
        seed=seed,
    )
