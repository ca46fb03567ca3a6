"""History: an experiment's revisions as what each of them changed. Pure."""

import json
from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import Any

from dynmerge_server.experiments.course import Course, declared
from dynmerge_server.experiments.records import Revision
from dynmerge_server.experiments.report.results import Change

BROKEN = ": broken"  # what follows it in a guardrail's reason is a level
SHOWN = 100  # characters of a value


def changes(course: Course, hidden: Collection[str]) -> tuple[Change, ...]:
    """All revisions, the first without changes.

    Of guardrails of `hidden` metrics it is not said at which level they were broken.
    """
    tables = [declared(revision).table() for revision in course.revisions]
    changed = [(), *(tuple(_changed(old, new)) for old, new in pairwise(tables))]
    return tuple(
        Change(
            revision.number,
            revision.phase,
            revision.time,
            revision.source,
            table["state"],
            what,
            _reason(revision, hidden),
        )
        for revision, table, what in zip(course.revisions, tables, changed, strict=True)
    )


def _reason(revision: Revision, hidden: Collection[str]) -> str:
    told, broken, _ = revision.reason.partition(BROKEN)
    by_guardrail = revision.source == "guardrail" and broken
    if by_guardrail and any(told.startswith(f"{metric} in ") for metric in hidden):
        return told + broken
    return revision.reason


def _changed(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            yield f"{name}: {_text(old.get(name))} to {_text(new.get(name))}"


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
