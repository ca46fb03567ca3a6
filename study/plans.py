"""Plans: the settings of the study's calibrations, one place for all."""

from __future__ import annotations

from dynmerge.calibration.plan import Objective, Plan

FIXED_STEPS, MAP_STEPS = 40, 100


def at_centre(method: str, objective: Objective) -> Plan:
    """Free coefficients at the uniform preference. An empty `at` stands for that of the bench."""
    return reference_plan(method, (), objective)


def reference_plan(method: str, at: tuple[float, ...], objective: Objective = "distil") -> Plan:
    """Free coefficients at one preference."""
    rate = 0.03
    return Plan(
        method,
        "fixed",
        objective,
        at=at,
        steps=FIXED_STEPS,
        rate=rate,
        check=20,
        patience=9,
        mu=1.0,
    )


def for_all(method: str, form: str = "ratio", rate: float = 0.15, pull: float = 0.0) -> Plan:
    """A map for every preference, distilled."""
    return Plan(
        method, form, "distil", steps=MAP_STEPS, rate=rate, pull=pull, check=25, patience=9, mu=1.0
    )
