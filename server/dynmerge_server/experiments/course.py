"""Course: one experiment over time, as its revisions; and what a change may change.

What was compared must stay what it was: once units have had arms, only what says how many take
part, what is watched and whether it runs may change. Pure; knows no log.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from operator import attrgetter
from typing import Any

from dynmerge.errors import ExperimentError, UnknownExperiment
from dynmerge_server.experiments.declaration import Experiment
from dynmerge_server.experiments.records import Revision

CHANGEABLE = frozenset(
    ("weights", "traffic", "ramp", "metrics", "guardrails", "plan", "state", "start", "stop")
)


@dataclass(frozen=True)
class Course:
    """All revisions of one experiment, the last of which counts. Never empty."""

    revisions: tuple[Revision, ...]

    @classmethod
    def all_of(cls, revisions: Sequence[Revision]) -> dict[str, "Course"]:
        """By experiment, in that order; each one's count by their number, whatever clocks say."""
        found: dict[str, list[Revision]] = {}
        for revision in revisions:
            found.setdefault(revision.experiment, []).append(revision)
        by_number = attrgetter("number")
        return {name: cls(tuple(sorted(all_, key=by_number))) for name, all_ in found.items()}

    @property
    def last(self) -> Revision:
        """The revision that counts."""
        return self.revisions[-1]

    @property
    def phase(self) -> int:
        """Of that revision."""
        return self.last.phase

    @cached_property
    def experiments(self) -> tuple[Experiment, ...]:
        """As declared by each revision. Raises ExperimentError on what this version cannot read."""
        return tuple(declared(each) for each in self.revisions)

    @property
    def experiment(self) -> Experiment:
        """As declared last."""
        return self.experiments[-1]

    def began(self, time: float) -> float | None:
        """When units could first have had arms; None where that was not by `time`."""
        ends = [each.time for each in self.revisions[1:]] + [time]
        for revision, experiment, end in zip(self.revisions, self.experiments, ends, strict=True):
            begin = revision.time
            if experiment.start is not None:
                begin = max(begin, experiment.start.timestamp())
            if begin <= min(end, time) and experiment.runs_at(begin):
                return begin
        return None

    def said_by(self, source: str) -> str | None:
        """The declaration that came last from a source; None where none did."""
        theirs = [each.declaration for each in self.revisions if each.source == source]
        return theirs[-1] if theirs else None

    def changed(self, new: Experiment, time: float, source: str, reason: str = "") -> Revision:
        """The revision that makes `new` count. Raises ExperimentError on what cannot change now."""
        old = self.experiment
        if old.state == "stopped":
            raise ExperimentError(f"experiment {old.name} is stopped, for good: declare a new one")
        phase = self.phase
        if self.began(time) is not None:
            _check_kept(old, new)
            phase += old.weights != new.weights
        return Revision(old.name, self.last.number + 1, phase, time, source, _text(new), reason)


def course_named(courses: Mapping[str, Course], name: str) -> Course:
    """One of them. Raises UnknownExperiment naming those there are."""
    if name not in courses:
        known = ", ".join(courses) or "none"
        raise UnknownExperiment(f"no experiment named {name[:80]!r} (known: {known})")
    return courses[name]


def first(experiment: Experiment, time: float, source: str) -> Revision:
    """The first revision of an experiment."""
    return Revision(experiment.name, 1, 0, time, source, _text(experiment))


def patched(experiment: Experiment, changes: Mapping[str, Any]) -> Experiment:
    """The experiment with other values under some keys. Raises ExperimentError naming the key.

    A traffic given without a ramp ends the ramp that there was; even weights stay even over other
    arms.
    """
    if "name" in changes and changes["name"] != experiment.name:
        raise ExperimentError(f"experiment {experiment.name}: its name stays")
    table = {**experiment.table(), **changes}
    if "traffic" in changes and "ramp" not in changes:
        table["ramp"] = ()
    if "arms" in changes and "weights" not in changes and len(set(table["weights"].values())) == 1:
        del table["weights"]
    return Experiment.parse(experiment.name, table)


def declared(revision: Revision) -> Experiment:
    """What a revision declares."""
    return Experiment.parse(revision.experiment, json.loads(revision.declaration))


def _text(experiment: Experiment) -> str:
    return json.dumps(experiment.table())  # in the order of arms, which is the hash's


def _check_kept(old: Experiment, new: Experiment) -> None:
    before, now = old.table(), new.table()
    for item in fields(Experiment):
        one, other = (json.dumps(each.get(item.name)) for each in (before, now))
        if item.name not in CHANGEABLE and one != other:
            raise ExperimentError(
                f"experiment {old.name} has begun: {item.name} cannot change any more (what can: "
                f"{', '.join(sorted(CHANGEABLE))}); stop it and declare a new one"
            )
    if old.state == "running" and new.state == "draft":
        raise ExperimentError(f"experiment {old.name} has begun: it can be paused or stopped")


def with_state(experiment: Experiment, state: str) -> Experiment:
    """The same in another state. One that is started by hand does not wait for its time."""
    at_once = replace(experiment, start=None) if state == "running" else experiment
    return patched(at_once, {"state": state})
