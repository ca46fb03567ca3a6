"""Parameters: the numbers and words a method takes, each with its default and what is allowed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from dynmerge.errors import MethodError
from dynmerge.recipe import Value

Values = Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Number:
    """A number that a method takes: its default and the closed range it must lie in.

    `whole` takes no fractions; `infinite` also takes the word `inf`.
    """

    name: str
    default: float
    low: float
    high: float
    meaning: str
    whole: bool = False
    infinite: bool = False

    @property
    def allowed(self) -> str:
        """What may be given, in words."""
        words = f"{self.low:g} .. {self.high:g}" + (", inf" if self.infinite else "")
        return f"{words}, whole" if self.whole else words

    def check(self, value: object, method: str, source: str) -> Value:
        """`value` as a float within range, or MethodError naming both."""
        if self.infinite and (value == math.inf or str(value) == "inf"):
            return math.inf
        if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
            raise self._refusal(f"is a number within {self.allowed}", value, method, source)
        # Three decimals are what a header can say, and so what a reply can echo.
        exact = Decimal(value)
        if exact.is_finite() and not isinstance(value, int):
            exact = round(exact, 3)
        if not exact.is_finite() or not self._low <= exact <= self._high:
            raise self._refusal(f"must lie within {self.allowed}", value, method, source)
        if self.whole and exact != int(exact):
            raise self._refusal(f"must lie within {self.allowed}", value, method, source)
        return float(exact)

    @property
    def _low(self) -> Decimal:
        return round(Decimal(self.low), 3)

    @property
    def _high(self) -> Decimal:
        return round(Decimal(self.high), 3)

    def _refusal(self, rule: str, value: object, method: str, source: str) -> MethodError:
        given = "nothing" if value is True else str(value)[:40]
        return MethodError(f"{source}: {method};{self.name} {rule}, not {given}", source)


@dataclass(frozen=True, slots=True)
class Choice:
    """A word that a method takes, one of `choices`."""

    name: str
    default: str
    choices: tuple[str, ...]
    meaning: str

    @property
    def allowed(self) -> str:
        """What may be given, in words."""
        return "|".join(self.choices)

    def check(self, value: object, method: str, source: str) -> Value:
        """`value` as one of the choices, or MethodError naming them."""
        if str(value) not in self.choices:
            raise MethodError(
                f"{source}: {method};{self.name} is one of {self.allowed}, not {str(value)!r}",
                source,
            )
        return str(value)


Parameter = Number | Choice


def number(values: Values, name: str) -> float:
    """A parameter that is a number."""
    return float(values[name])


def word(values: Values, name: str) -> str:
    """A parameter that is a word."""
    return str(values[name])
