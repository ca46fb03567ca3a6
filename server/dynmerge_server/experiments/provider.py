"""DynmergeProvider: experiments as flags of OpenFeature, for a team's own services.

A service asks for the string flag of an experiment's name and gets the arm that the server gives
the same unit, found on the spot. Knows declarations only: no log, no later phase, and nobody who
keeps an earlier arm. Needs OpenFeature, so no request imports this.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from dynmerge.errors import ConfigError
from dynmerge_server.experiments.assignment import arm_of
from dynmerge_server.experiments.declaration import Experiment
from dynmerge_server.experiments.flags import MISSING
from dynmerge_server.experiments.lab import declarations

try:
    from openfeature.evaluation_context import EvaluationContext
    from openfeature.exception import ErrorCode
    from openfeature.flag_evaluation import FlagResolutionDetails, FlagValueType, Reason
    from openfeature.provider import AbstractProvider, Metadata
except ImportError:
    raise ConfigError(MISSING) from None

Value = TypeVar("Value")
Objects = Sequence[FlagValueType] | Mapping[str, FlagValueType]


class DynmergeProvider(AbstractProvider):
    """String flags by the names of experiments; the targeting key is the unit, the value its arm.

    SPLIT with the arm as variant; DEFAULT where the unit is in the holdout, in another part of the
    namespace or beyond the traffic; DISABLED while the experiment does not run. Arms are the
    server's only until an experiment's weights change after its start: of the phase that begins
    then it does not know.
    """

    def __init__(
        self, experiments: Mapping[str, Experiment], clock: Callable[[], float] = time.time
    ) -> None:
        """`experiments` is looked into each time. `clock` tells seconds since 1970."""
        super().__init__()
        self._experiments = experiments
        self._clock = clock

    @classmethod
    def of_file(cls, path: Path) -> "DynmergeProvider":
        """With what the server reads from the same file. Raises ConfigError."""
        return cls(declarations(path))

    def get_metadata(self) -> Metadata:
        """Its name."""
        return Metadata("dynmerge")

    def resolve_string_details(
        self,
        flag_key: str,
        default_value: str,
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[str]:
        """The arm of the experiment `flag_key`."""
        experiment = self._experiments.get(flag_key)
        unit = evaluation_context.targeting_key if evaluation_context else None
        if experiment is None:
            known = ", ".join(self._experiments) or "none"
            text = f"no experiment named {flag_key[:80]!r} (known: {known})"
            return _refused(default_value, ErrorCode.FLAG_NOT_FOUND, text)
        if experiment.flag is not None:
            text = f"the arms of {flag_key} are chosen by another flag, {experiment.flag}"
            return _refused(default_value, ErrorCode.GENERAL, text)
        if not unit:
            text = "the targeting key is the unit, and there is none"
            return _refused(default_value, ErrorCode.TARGETING_KEY_MISSING, text)
        now = self._clock()
        if not experiment.runs_at(now):
            return FlagResolutionDetails(default_value, reason=Reason.DISABLED)
        placed = arm_of(experiment, unit, traffic=experiment.traffic_at(now))
        if placed.arm is None:
            more = {"placement": placed.kind}
            return FlagResolutionDetails(default_value, reason=Reason.DEFAULT, flag_metadata=more)
        return FlagResolutionDetails(placed.arm, reason=Reason.SPLIT, variant=placed.arm)

    def resolve_boolean_details(
        self,
        flag_key: str,
        default_value: bool,
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[bool]:
        """Refused: an arm is a string."""
        return _no_string(default_value)

    def resolve_integer_details(
        self,
        flag_key: str,
        default_value: int,
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[int]:
        """Refused: an arm is a string."""
        return _no_string(default_value)

    def resolve_float_details(
        self,
        flag_key: str,
        default_value: float,
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[float]:
        """Refused: an arm is a string."""
        return _no_string(default_value)

    def resolve_object_details(
        self,
        flag_key: str,
        default_value: Objects,
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[Objects]:
        """Refused: an arm is a string."""
        return _no_string(default_value)


def _no_string(default: Value) -> FlagResolutionDetails[Value]:
    return _refused(default, ErrorCode.TYPE_MISMATCH, "an arm is a string")


def _refused(default: Value, code: ErrorCode, text: str) -> FlagResolutionDetails[Value]:
    return FlagResolutionDetails(default, code, text, Reason.ERROR)
