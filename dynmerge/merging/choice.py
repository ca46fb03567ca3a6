"""Choice of a method: from the text of a header, field or flag to a MethodChoice, or an error that
names what is known.
"""

from collections.abc import Mapping
from functools import cache
from typing import cast

import http_sf

from dynmerge.errors import MethodError
from dynmerge.merging.methods import AFTER, CALIBRATION, METHODS, SCALE, STEPS, Method, Step
from dynmerge.recipe import MethodChoice, Value

HEADER = "X-Dynmerge-Method"
DEFAULT = "linear"


def parse_method(text: str, source: str = HEADER) -> MethodChoice:
    """Read an RFC 9651 item such as `ties;density=0.2`. Raises MethodError naming the choices."""
    twice: list[str] = []
    try:
        item = http_sf.parse(
            text.encode("ascii"),
            tltype="item",
            on_duplicate_key=lambda key, _context: twice.append(key),
        )
    except (http_sf.StructuredFieldError, UnicodeEncodeError):
        raise MethodError(
            f"{source}: {text[:80]!r} is not a method; write one such as linear;scale=0.8, "
            "in lower case, numbers with at most three decimals",
            source,
        ) from None
    value, given = cast("tuple[object, dict[str, object]]", item)
    if twice:
        raise MethodError(f"{source}: the parameter {twice[0]!r} stands there twice", source)
    if not isinstance(value, http_sf.Token):
        reason = f"{text[:80]!r} is not a method: its name is a bare word"
        raise MethodError(f"{source}: {reason}", source)
    return choose(str(value), given, source)


def choose(name: str, given: Mapping[str, object], source: str) -> MethodChoice:
    """The choice of method `name` with defaults filled in.

    Raises MethodError on a name or parameter that is not known, or a value that is not allowed.
    """
    before, merger, after = parts_of(name, source)
    full = "+".join(part for part in (before, merger, after) if part)
    rows: list[Method | Step] = [METHODS[merger]]
    rows += [STEPS[part] for part in (before, after) if part]
    known = {parameter.name: parameter for row in rows for parameter in row.parameters}
    known[SCALE.name] = SCALE
    for key in given:
        if key not in known:
            raise MethodError(
                f"{source}: {full} has no parameter {key!r} (it takes: {', '.join(known)})", source
            )
    values = [
        (key, parameter.check(given.get(key, parameter.default), full, source))
        for key, parameter in sorted(known.items())
    ]
    wrong = METHODS[merger].check(dict(values))
    if wrong:
        raise MethodError(f"{source}: {full}: {wrong}", source)
    return MethodChoice(full, ".".join(str(row.version) for row in rows), tuple(values))


@cache
def default_method() -> MethodChoice:
    """What serves where nobody chose."""
    return parse_method(DEFAULT)


def parts_of(name: str, source: str = HEADER) -> tuple[str, str, str]:
    """Calibration, merger and what comes after; empty where there is none."""
    parts = name.split("+")
    before = parts.pop(0) if parts[0] == CALIBRATION else ""
    after = parts.pop() if len(parts) > 1 and parts[-1] == AFTER else ""
    merger = parts.pop(0) if parts else DEFAULT
    if parts or merger not in METHODS:
        raise MethodError(f"{source}: {_unknown(name)}", source)
    if after and not METHODS[merger].takes_svc:
        raise MethodError(f"{source}: {merger} has no directions for {AFTER} to tell apart", source)
    return before, merger, after


def settled(method: MethodChoice) -> tuple[Method, dict[str, Value]]:
    """A choice's row of METHODS, and all its values: those given and those the name settles."""
    _, merger, _ = parts_of(method.name)
    row = METHODS[merger]
    return row, {**dict(method.parameters), **row.fixed}


def _unknown(name: str) -> str:
    return (
        f"no method {name[:80]!r} (known: {', '.join(METHODS)}; "
        f"before any of them {CALIBRATION}+, after it +{AFTER})"
    )
