"""Asked: the settings of `dynmerge calibrate` as a person gave them, and the Plan that they are."""

from dataclasses import dataclass, replace
from typing import Any

from dynmerge.bank.bank import FactorBank
from dynmerge.calibration.calibrate import GAUSS_NEWTON, METHODS, check_plan
from dynmerge.calibration.plan import DEFAULT_FORM, Objective, Plan, published
from dynmerge.errors import CalibrationError, ConfigError
from dynmerge.preference import Preference

CLOSED = ("tuned", "regmean")  # methods that train nothing and have no form to choose
PUBLISHED = ("adamerging", "tara-a", "tara-b")


@dataclass(frozen=True, slots=True)
class Asked:
    """None is the default of what was asked."""

    method: str
    objective: Objective | None = None
    form: str | None = None
    at: str | None = None
    published: bool = False
    steps: int | None = None
    batch: int | None = None
    rate: float | None = None
    mu: float | None = None
    pull: float | None = None
    seed: int | None = None

    @property
    def drawn_by(self) -> int:
        """The seed of all that is drawn."""
        return self.seed or 0

    def plan(self, bank: FactorBank) -> Plan:
        """The plan for `bank`. Raises CalibrationError, ConfigError and PreferenceError.

        What would be ignored is refused.
        """
        if self.method not in METHODS:
            raise CalibrationError(
                f"--method: nothing is learned for {self.method!r} (known: {', '.join(METHODS)})"
            )
        plan = self._published(bank) if self.published else self._plan(bank)
        check_plan(plan, bank)
        return plan

    def _published(self, bank: FactorBank) -> Plan:
        if self.method not in PUBLISHED:
            raise ConfigError(f"--published is for {', '.join(PUBLISHED)}; not for {self.method}")
        for option, given, own in (
            ("--objective", self.objective, "entropy"),
            ("--form", self.form, "fixed"),
        ):
            if given not in (None, own):
                raise ConfigError(f"--published is {option} {own}; {given} is another")
        return replace(published(self.method, self._at(bank), self.drawn_by), **self._training())

    def _plan(self, bank: FactorBank) -> Plan:
        form, objective = self.form or DEFAULT_FORM, self.objective or "distil"
        if self.method in CLOSED:
            self._refuse(self.method, {"form": self.form, "at": self.at, **self._training()})
            return Plan(self.method, form, objective, seed=self.drawn_by)
        if form == GAUSS_NEWTON:
            self._refuse(form, {"at": self.at, **self._training()})
            return Plan(self.method, form, objective, seed=self.drawn_by)
        if form != "fixed" and self.at is not None:
            raise ConfigError(f"--at is for --form fixed; {form} serves every preference")
        at = self._at(bank) if form == "fixed" else None
        return Plan(self.method, form, objective, at, seed=self.drawn_by, **self._training())

    @staticmethod
    def _refuse(closed: str, options: dict[str, Any]) -> None:
        for option, given in options.items():
            if given is not None:
                raise ConfigError(f"--{option} is not for {closed}, which trains nothing")

    def _training(self) -> dict[str, Any]:
        """Those settings of a training that were given."""
        names = ("steps", "batch", "rate", "mu", "pull")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _at(self, bank: FactorBank) -> tuple[float, ...]:
        """The one preference, (tasks,): the uniform one where none is named."""
        if self.at is None:
            return tuple(1 / len(bank.names) for _ in bank.names)
        wish = Preference.parse(self.at, source="--at")
        wish.require(bank.names, source="--at")
        vector = wish.vector(bank.names)
        raw = wish.is_raw or ";raw" in self.at.replace(" ", "")  # where it sums to 1, too
        if raw or abs(sum(vector) - 1) > 1e-6:
            raise ConfigError("--at names a preference: weights of skills, without base or ;raw")
        return tuple(vector)
