"""`dynmerge methods`: the merge methods by name, with what they take."""

from dynmerge.cli.console import line
from dynmerge.merging.methods import METHODS


def run() -> None:
    """Print every method, and under it its parameters with their defaults and what is allowed."""
    for name, method in METHODS.items():
        line(f"{name:12}{method.summary}")
        for parameter in method.parameters:
            default = parameter.default
            stated = f";{parameter.name}={default if isinstance(default, str) else f'{default:g}'}"
            line(f"{'':12}{stated:20}{parameter.allowed}: {parameter.meaning}")
