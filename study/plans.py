"""Plans: the settings of the study's calibrations, one place for all."""

from __future__ import annotations

from dataclasses import replace

from dynmerge.calibration.plan import PULLS, Objective, Plan

FIXED_STEPS = 40


def at_centre(method: str, objective: Objective) -> Plan:
    """Free coefficients at the uniform preference. An empty `at` stands for that of the bench."""
    return reference_plan(method, (), objective)


def reference_plan(method: str, at: tuple[float, ...], objective: Objective = "distil") -> Plan:
    """Free coefficients at one preference."""
    return Plan(method, "fixed", objective, at=at, steps=FIXED_STEPS, check=FIXED_STEPS // 2)


def for_all(method: str, form: str = "ratio", rate: float | None = None) -> Plan:
    """A map for every preference, distilled: what `dynmerge calibrate` does unless told."""
    plan = Plan(method, form, pull=PULLS.get(method, 0.0))
    return plan if rate is None else replace(plan, rate=rate)
