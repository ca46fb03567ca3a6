"""METHODS: every merge rule by name, with its parameters and what it promises. Pure tensor
functions.

A method is a function of the bank, the weights of its tasks and its own parameters; it returns one
core per preference. Nothing here knows caches, engines or text formats other than the method
header's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import cast

import http_sf
import torch
from torch import Tensor

from dynmerge.bank.bank import FactorBank, FactorGroup
from dynmerge.errors import MethodError
from dynmerge.preference import Preference
from dynmerge.recipe import MethodChoice, Value

HEADER = "X-Dynmerge-Method"
DEFAULT = "linear"


@dataclass(frozen=True, slots=True)
class Number:
    """A number that a method takes: its default and the closed range it must lie in."""

    name: str
    default: float
    low: float
    high: float
    meaning: str

    @property
    def allowed(self) -> str:
        """What may be given, in words."""
        return f"{self.low:g} .. {self.high:g}"

    def check(self, value: object, method: str, source: str) -> Value:
        """`value` as a float within range, or MethodError naming both."""
        if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
            raise MethodError(f"{source}: {method};{self.name} is a number, not {value!r}", source)
        if not self.low <= value <= self.high:
            raise MethodError(
                f"{source}: {method};{self.name} must lie within {self.allowed}", source
            )
        # Three decimals are what a header can say, and so what a reply can echo.
        return round(float(value), 3)


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


MergeFunction = Callable[[FactorBank, Tensor, Mapping[str, Value]], Tensor]


@dataclass(frozen=True, slots=True)
class Method:
    """A row of METHODS. `version` rises when the code changes what it returns."""

    merge: MergeFunction
    version: int
    summary: str
    parameters: tuple[Number | Choice, ...] = ()

    def choose(self, name: str, given: Mapping[str, object], source: str) -> MethodChoice:
        """The choice with defaults filled in.

        MethodError on a parameter the method lacks or a value it does not take.
        """
        known = {parameter.name: parameter for parameter in self.parameters}
        for key in given:
            if key not in known:
                raise MethodError(
                    f"{source}: {name} has no parameter {key!r} "
                    f"(it takes: {', '.join(known) or 'none'})",
                    source,
                )
        values = [
            (key, parameter.check(given.get(key, parameter.default), name, source))
            for key, parameter in sorted(known.items())
        ]
        return MethodChoice(name, self.version, tuple(values))


def linear(bank: FactorBank, weights: Tensor, parameters: Mapping[str, Value]) -> Tensor:
    """Task Arithmetic: the exact weighted sum of deltas (PEFT's `cat`, not PEFT's `linear`).

    `weights` (..., tasks) float32 on the bank's device; returns flat cores (..., size). One batched
    product per module shape, for all preferences: C = left diag(w) right.
    Ilharco et al. 2023, arXiv:2212.04089.
    """
    scaled = float(parameters["scale"]) * weights

    def core(group: FactorGroup) -> Tensor:  # (..., members, p, q)
        directions = scaled[..., group.tasks]  # (..., K)
        return (group.left * directions[..., None, None, :]) @ group.right

    return bank.flatten([core(group) for group in bank.groups])


METHODS: Mapping[str, Method] = {
    "linear": Method(
        linear,
        version=1,
        summary="the exact weighted sum of the skills' updates (Task Arithmetic)",
        parameters=(
            Number("scale", default=1.0, low=0.0, high=4.0, meaning="multiplies every weight"),
        ),
    ),
}


def parse_method(text: str, source: str = HEADER) -> MethodChoice:
    """Read an RFC 9651 item such as `ties;density=0.2`. Raises MethodError naming the choices."""
    try:
        item = http_sf.parse(text.encode("ascii"), tltype="item")
    except (http_sf.StructuredFieldError, UnicodeEncodeError):
        raise MethodError(
            f"{source}: {text[:80]!r} is not a method; write one such as linear;scale=0.8", source
        ) from None
    value, given = cast("tuple[object, dict[str, object]]", item)
    name = str(value)
    if not isinstance(value, http_sf.Token) or name not in METHODS:
        raise MethodError(f"{source}: no method {name!r} (known: {', '.join(METHODS)})", source)
    return METHODS[name].choose(name, given, source)


@cache
def default_method() -> MethodChoice:
    """What serves where nobody chose."""
    return parse_method(DEFAULT)


def assemble(bank: FactorBank, preferences: Sequence[Preference], method: MethodChoice) -> Tensor:
    """Flat cores (preferences, size) in float32 on the bank's device, all in one batched step."""
    weights = torch.tensor(
        [preference.vector(bank.names) for preference in preferences], device=bank.device
    )
    return METHODS[method.name].merge(bank, weights, dict(method.parameters))
