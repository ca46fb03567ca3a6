"""`dynmerge methods`: the merge methods by name, with what they take."""

from dynmerge.cli.console import line
from dynmerge.merging.methods import AFTER, CALIBRATION, METHODS, SCALE, STEPS
from dynmerge.merging.parameters import Parameter

WIDTH = 17


def run() -> None:
    """Print every method, and under it its parameters with their defaults and what is allowed."""
    for name, method in METHODS.items():
        line(f"{name:{WIDTH}}{method.summary}")
        for parameter in method.parameters:
            _parameter(parameter)
    line("")
    line(f"Before a method {CALIBRATION}+, after it +{AFTER}, as in {CALIBRATION}+ties+{AFTER}:")
    for name, step in STEPS.items():
        line(f"{name:{WIDTH}}{step.summary}")
        for parameter in step.parameters:
            _parameter(parameter)
    line("")
    line("With all of them:")
    _parameter(SCALE)


def _parameter(parameter: Parameter) -> None:
    default = parameter.default
    stated = f";{parameter.name}={default if isinstance(default, str) else f'{default:g}'}"
    line(f"{'':{WIDTH}}{stated:20}{parameter.allowed}: {parameter.meaning}")
