"""Preference: how much of each skill a request wants. Knows names and numbers, not adapters or
HTTP.

A preference lives on a grid of 0.001, so that equal wishes are equal values and name the same
merge. The reserved name `base` stands for the base model itself, a skill that changes nothing:
`base=1` is the base model, `math=0.7, base=0.3` is seven tenths of math and nothing else.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal

import http_sf

from dynmerge.errors import PreferenceError

GRID = 1000
BASE = "base"
RAW_LIMIT = 2.0
MAX_ENTRIES = 256
MAX_TEXT = 16_384
SKILL_NAME = re.compile(r"[a-z*][a-z0-9_.*-]{0,63}")
_NO_NAME = "is not a skill name: up to 64 of a-z 0-9 _ . * -, the first a letter or *"
_MEMBER = re.compile(r"(?:^|,)\s*([a-z*][a-z0-9_.*-]*)")  # of the header's dictionary

HEADER = "X-Dynmerge-Preference"


@dataclass(frozen=True, slots=True)
class Preference:
    """Weights of skills in thousandths, sorted by name, none of them zero, never empty.

    Sums to 1000 for a preference (a point of the simplex); any other vector is *raw*: multipliers
    that are applied as they are. Equal objects are equal wishes.
    """

    thousandths: tuple[tuple[str, int], ...]
    # All names that were given, those at zero too: a name misspelt is an error at any weight.
    # Each with its column, where it was given in a text.
    named: tuple[tuple[str, int | None], ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def base_model(cls) -> "Preference":
        """The preference that changes nothing."""
        return cls(((BASE, GRID),))

    @classmethod
    def of(
        cls,
        weights: Mapping[str, float],
        *,
        normalize: bool = True,
        allow_negative: bool = False,
        source: str = "preference",
    ) -> "Preference":
        """The preference nearest to `weights` on the grid.

        With `normalize` the weights are non-negative and are divided by their sum; all zero is the
        base model. Without it they are multipliers with |w| <= 2, negative only where
        `allow_negative`. `source` names the field or header in errors. Raises PreferenceError.
        """
        return cls._of(weights, normalize, allow_negative, _Origin(source))

    @classmethod
    def parse(
        cls, text: str, *, allow_negative: bool = False, source: str = HEADER
    ) -> "Preference":
        """Read an RFC 9651 dictionary such as `math=0.7, code=0.3`; a bare key is 1.

        `;raw` after any member makes the whole vector multipliers instead of a preference.
        Raises PreferenceError that names `source` and the column, counted from 1.
        """
        origin = _Origin.of_text(source, text)
        members = _dictionary(text, origin)
        weights: dict[str, float] = {}
        raw = False
        for name, (value, parameters) in members.items():
            unknown = sorted(set(parameters) - {"raw"})
            if unknown or parameters.get("raw", True) is not True:
                raise origin.refusal(
                    f"{name!r} has the parameter {(unknown or ['raw'])[0]!r}; "
                    "the only one known is a bare ;raw",
                    name,
                )
            raw = raw or "raw" in parameters
            weights[name] = _weight(name, value, origin)
        return cls._of(weights, not raw, allow_negative, origin)

    @classmethod
    def _of(
        cls, weights: Mapping[str, float], normalize: bool, allow_negative: bool, origin: "_Origin"
    ) -> "Preference":
        if not weights:
            raise origin.refusal(f"names no skill; for the base model say {BASE}=1 or SKILL=0")
        if len(weights) > MAX_ENTRIES:
            raise origin.refusal(
                f"names {len(weights)} skills, at most {MAX_ENTRIES} are taken",
                list(weights)[MAX_ENTRIES],
            )
        numbers = {name: _finite(name, weight, origin) for name, weight in weights.items()}
        for name, number in numbers.items():
            _check_range(name, number, normalize, allow_negative, origin)
        grid = _normalised(numbers, origin) if normalize else _multipliers(numbers, origin)
        kept = tuple(sorted((name, value) for name, value in grid.items() if value))
        named = tuple((name, origin.column(name)) for name in numbers)
        return cls(kept or cls.base_model().thousandths, named)

    @property
    def is_base(self) -> bool:
        """Whether this asks for the base model exactly."""
        return all(name == BASE for name, _ in self.thousandths)

    @property
    def is_raw(self) -> bool:
        """Whether these are multipliers rather than a point of the simplex."""
        values = [value for _, value in self.thousandths]
        return sum(values) != GRID or min(values) < 0

    @property
    def skills(self) -> tuple[str, ...]:
        """The skills named, without `base`."""
        return tuple(name for name, _ in self.thousandths if name != BASE)

    @property
    def weights(self) -> dict[str, float]:
        """Name -> weight, `base` among them; `of` reads them back, without `normalize` if raw."""
        return {name: value / GRID for name, value in self.thousandths}

    def vector(self, skills: Iterable[str]) -> list[float]:
        """The weights in the order of `skills`, zero where unlisted."""
        weights = self.weights
        return [weights.get(skill, 0.0) for skill in skills]

    def require(self, known: Iterable[str], source: str = "preference") -> None:
        """Raise PreferenceError unless every skill named is one of `known`."""
        known = sorted(known)
        columns = dict(self.named)
        for skill in sorted({*columns, *self.skills} - {BASE}):
            if skill not in known:
                reason = f"no skill named {skill!r} (known: {', '.join(known)})"
                raise _refusal(source, columns.get(skill), reason)

    def __str__(self) -> str:
        """The canonical text: what `parse` reads back to this very preference."""
        text = ", ".join(f"{name}={value / GRID:.10g}" for name, value in self.thousandths)
        return text + ";raw" if self.is_raw else text


def check_skill_name(name: str, source: str = "skill name") -> None:
    """Raise PreferenceError unless `name` can be a key of the preference header."""
    if not SKILL_NAME.fullmatch(name):
        raise PreferenceError(f"{source} {name!r} {_NO_NAME}", source)


@dataclass(frozen=True, slots=True)
class _Origin:
    """The field or header that weights came in and, of a text, where each name starts in it."""

    source: str
    columns: Mapping[str, int] | None = None  # counted from 1; None where there is no text

    @classmethod
    def of_text(cls, source: str, text: str) -> "_Origin":
        """Of a name that stands there twice, the last place counts."""
        if len(text) > MAX_TEXT:
            reason = f"is {len(text)} characters, at most {MAX_TEXT} are taken"
            raise _refusal(source, MAX_TEXT + 1, reason)
        return cls(source, {match[1]: match.start(1) + 1 for match in _MEMBER.finditer(text)})

    def column(self, name: str | None) -> int | None:
        """Where `name` stands; a text that does not have it is meant as a whole."""
        return None if self.columns is None else self.columns.get(name or "", 1)

    def refusal(self, reason: str, name: str | None = None) -> PreferenceError:
        """The error that gives `reason` at the place of `name`."""
        return _refusal(self.source, self.column(name), reason)


def _refusal(source: str, column: int | None, reason: str) -> PreferenceError:
    place = source if column is None else f"{source}, column {column}"
    return PreferenceError(f"{place}: {reason}", source)


def _dictionary(text: str, origin: _Origin) -> Mapping[str, tuple[object, Mapping[str, object]]]:
    try:
        data = text.encode("ascii")
    except UnicodeEncodeError as error:
        reason = f"{text[error.start]!r} is not ASCII"
        raise _refusal(origin.source, error.start + 1, reason) from None

    def duplicate(key: str, _context: str) -> None:
        raise origin.refusal(f"{key!r} stands there twice", key)

    try:
        return http_sf.parse(data, tltype="dictionary", on_duplicate_key=duplicate)  # type: ignore[return-value]
    except http_sf.StructuredFieldError as error:
        reason = str(error).split(" at position ")[0]
        hint = "Write a list such as: math=0.7, code=0.3"
        raise _refusal(origin.source, (error.position or 0) + 1, f"{reason}. {hint}") from None


def _weight(name: str, value: object, origin: _Origin) -> float:
    if value is True:
        return 1.0
    if isinstance(value, (int, Decimal)) and not isinstance(value, bool):
        return float(value)
    raise origin.refusal(
        f"the weight of {name!r} is not a number with at most three decimals", name
    )


def _finite(name: str, weight: object, origin: _Origin) -> float:
    if not SKILL_NAME.fullmatch(name):
        raise origin.refusal(f"{name!r} {_NO_NAME}", name)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise origin.refusal(f"the weight of {name!r} is not a number", name)
    try:
        number = float(weight)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise origin.refusal(f"the weight of {name!r} is not finite", name)
    return number


def _check_range(
    name: str, number: float, normalize: bool, allow_negative: bool, origin: _Origin
) -> None:
    if not normalize and abs(number) > RAW_LIMIT:
        raise origin.refusal(
            f"the raw weight of {name!r} is {number:g}; "
            f"it must lie within -{RAW_LIMIT:g} .. {RAW_LIMIT:g}",
            name,
        )
    if number < 0 and normalize:
        raise origin.refusal(
            f"the weight of {name!r} is negative ({number:g}); a preference is not. "
            "Multipliers take ;raw or normalize=false",
            name,
        )
    if number < 0 and not allow_negative:
        raise origin.refusal(
            f"the raw weight of {name!r} is negative ({number:g}); this server does not allow that",
            name,
        )


def _normalised(numbers: Mapping[str, float], origin: _Origin) -> dict[str, int]:
    """Largest remainders, so that the thousandths sum to 1000 whatever the order of the skills."""
    largest = max(numbers.values())
    if largest == 0:
        return {}
    scaled = {name: number / largest for name, number in numbers.items()}
    total = math.fsum(scaled.values())
    shares = {name: number / total * GRID for name, number in scaled.items()}
    # Whole but for rounding is whole: 0.29 * 1000 must not lose a thousandth.
    whole = {
        name: round(share) if abs(share - round(share)) < 1e-6 else math.floor(share)
        for name, share in shares.items()
    }
    left = GRID - sum(whole.values())
    # Remainders that are equal but for rounding are equal: the name decides, not the last bit.
    by_remainder = sorted(shares, key=lambda name: (round(whole[name] - shares[name], 6), name))
    for name in by_remainder[: max(left, 0)]:
        whole[name] += 1
    for name, number in numbers.items():
        if number and not whole[name]:
            raise origin.refusal(
                f"the weight of {name!r} is {shares[name] / GRID:.2g} of the whole, "
                "less than the grid's 0.001; leave it out or raise it",
                name,
            )
    return whole


def _multipliers(numbers: Mapping[str, float], origin: _Origin) -> dict[str, int]:
    if BASE in numbers:
        raise origin.refusal(
            f"{BASE!r} takes no raw weight; multipliers leave the base model as it is", BASE
        )
    grid = {name: round(number * GRID) for name, number in numbers.items()}
    for name, number in numbers.items():
        if number and not grid[name]:
            raise origin.refusal(
                f"the raw weight of {name!r} is {number:g}, less than the grid's 0.001", name
            )
    return grid
