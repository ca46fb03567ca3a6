"""Plans: the settings of the study's calibrations, one place for all."""

from __future__ import annotations

from dataclasses import replace

from dynmerge.calibration.plan import Objective, Plan

FEW_STEPS = 40


def at_centre(method: str, objective: Objective) -> Plan:
    """Free coefficients at the uniform preference, in fewer steps than a map needs."""
    return replace(reference_plan(method, objective), steps=FEW_STEPS, check=FEW_STEPS // 2)


def reference_plan(method: str, objective: Objective = "distil") -> Plan:
    """Free coefficients at one preference, in as many steps as a map for all."""
    return Plan(method, "fixed", objective)


def for_all(method: str, form: str = "ratio", rate: float | None = None) -> Plan:
    """A map for every preference, distilled: what `dynmerge calibrate` does unless told."""
    plan = Plan(method, form)
    return plan if rate is None else replace(plan, rate=rate)
