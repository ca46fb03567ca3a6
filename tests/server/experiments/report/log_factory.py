"""Logs made on the spot, in the file that servers write."""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from dynmerge_server.experiments.course import Course, first
from dynmerge_server.experiments.declaration import Experiment
from dynmerge_server.experiments.reading import open_readonly
from dynmerge_server.experiments.records import Exposure, Finish, Outcome, Revision
from dynmerge_server.experiments.schema import connect, create

BEGAN = 1_800_000_000.0
DAY = 86_400.0


class LogFile:
    """A log at `path`, added to by records and read as reports read it."""

    def __init__(self, path: Path) -> None:
        create(path)
        self.path = path
        self._made = 0

    def declare(self, name: str, table: dict[str, Any], time: float = BEGAN) -> Course:
        course = Course((first(Experiment.parse(name, table), time, "file"),))
        self.add(course.revisions)
        return course

    def change(self, course: Course, time: float, reason: str = "", **values: Any) -> Course:
        new = replace(course.experiment, **values)
        revision = course.changed(new, time, "api", reason)
        self.add([revision])
        return Course((*course.revisions, revision))

    def expose(self, unit: str, arm: str | None, time: float = BEGAN + 1, **more: Any) -> Exposure:
        """One request; `more` are fields of Exposure and of Finish."""
        self._made += 1
        ended = {name: more.pop(name) for name in list(more) if name in FINISH}
        exposure = Exposure(
            **{
                "id": f"e{self._made}",
                "request_id": f"r{self._made}",
                "time": time,
                "unit": unit,
                "kind": "assigned",
                "preference": "sql",
                "method": "linear",
                "merge_id": "m",
                "experiment": "tone",
                "arm": arm,
                **more,
            }
        )
        self.add([exposure], [Finish(exposure.id, **{"status": 200, **ended})])
        return exposure

    def vote(self, exposure: Exposure, name: str, value: float, time: float = BEGAN + 2) -> None:
        self._made += 1
        outcome = Outcome(f"o{self._made}", exposure.request_id, time, name, "NUMERIC", value)
        self.add((), (), [(outcome, exposure.id)])

    def pair(self, arms: tuple[str, str], said: str, unit: str) -> None:
        """Two answers side by side, and which was better."""
        self._made += 1
        name = f"p{self._made}"
        for position, arm in enumerate(arms):
            self.expose(unit, arm, kind="pair", pair=name, position=position)
        vote = Outcome(f"{name}v", name, BEGAN + 3, "vote", "CATEGORICAL", category=said)
        self.add((), (), [(vote, name)])

    def add(
        self,
        records: Iterable[Revision | Exposure],
        finishes: Iterable[Finish] = (),
        outcomes: Iterable[tuple[Outcome, str]] = (),
    ) -> None:
        ended = {finish.exposure: astuple(finish)[1:] for finish in finishes}
        with self.writing() as connection:
            connection.execute("BEGIN")
            for record in records:
                if isinstance(record, Revision):
                    _insert(connection, "revisions", _names(Revision), astuple(record))
                else:
                    values = (*astuple(record), *ended.get(record.id, (None,) * len(FINISH)))
                    _insert(connection, "exposures", [*_names(Exposure), *FINISH], values)
            for outcome, exposure in outcomes:
                values = (*astuple(outcome), exposure)
                _insert(connection, "outcomes", [*_names(Outcome), "exposure"], values)
            connection.execute("COMMIT")

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        with closing(connect(self.path)) as connection:
            yield connection

    def open(self) -> sqlite3.Connection:
        return open_readonly(self.path)


def run_experiment(
    log: LogFile, units: int, rates: dict[str, float], rng: np.random.Generator, days: float = 14
) -> None:
    """Units that come evenly, each to any arm alike; each says whether it liked what it got."""
    arms = list(rates)
    exposures, finishes, outcomes = [], [], []
    for index in range(units):
        arm = arms[rng.integers(len(arms))]
        name, time = f"u{index}", BEGAN + days * DAY * index / units
        exposure = Exposure(
            f"x{index}", f"q{index}", time, name, "assigned", "sql", "linear", "m", "tone", arm
        )
        exposures.append(exposure)
        finishes.append(
            Finish(exposure.id, 200, "hit", 10, int(rng.integers(5, 50)), 0.1, rng.exponential())
        )
        liked = float(rng.random() < rates[arm])
        outcome = Outcome(f"y{index}", exposure.request_id, time + 60, "liked", "BOOLEAN", liked)
        outcomes.append((outcome, exposure.id))
    log.add(exposures, finishes, outcomes)


def _names(record: type) -> list[str]:
    return [item.name for item in fields(record)]


FINISH = [name for name in _names(Finish) if name != "exposure"]


def _insert(
    connection: sqlite3.Connection, table: str, names: Sequence[str], values: Sequence[Any]
) -> None:
    marks = ", ".join("?" * len(names))
    connection.execute(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})", values)
