"""Recipe: everything that determines a merge. Its digest is the merge's name everywhere."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from dynmerge.preference import Preference

Value = float | str


@dataclass(frozen=True, slots=True)
class MethodChoice:
    """A merge method and all its parameters: defaults filled in, validated, sorted by name.

    `version` is that of each of its parts.
    """

    name: str
    version: str
    parameters: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        """As in the `X-Dynmerge-Method` header: `ties;density=0.2`."""
        return ";".join([self.name, *(f"{key}={_text(value)}" for key, value in self.parameters)])


@dataclass(frozen=True)
class Recipe:
    """Preference, method and bank. Same digest, same weights, but for rounding between machines.

    `bank` is the bank's digest: over the base model's fingerprint, the adapters' content and the
    calibration. `method.version` rises when a method's code changes what it returns.
    """

    preference: Preference
    method: MethodChoice
    bank: str

    @property
    def is_base(self) -> bool:
        """Whether this is the base model, whatever the method."""
        return self.preference.is_base

    @cached_property
    def digest(self) -> str:
        """The merge's name: 32 hexadecimal digits, the same on every machine."""
        fields = {
            "bank": self.bank,
            "method": [self.method.name, self.method.version, list(self.method.parameters)],
            "preference": self.preference.thousandths,
        }
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _text(value: Value) -> str:
    return format(value, ".10g") if isinstance(value, float) else str(value)
