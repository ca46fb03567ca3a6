"""Banks of adapters that were trained another way: jointly, or from OSRM's start."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dynmerge.bank.bank import FactorBank
from dynmerge.calibration import draws
from dynmerge.calibration.teachers import alone
from dynmerge.evaluation.scores import Score, score
from dynmerge.student import Student
from study.bench import BATCH, Bench, Made, by, under

Carried = Callable[[FactorBank, str], Made]  # a bank and the skill that is asked


def other_scores(bench: Bench, name: str) -> dict[str, Score]:
    """Every skill's test examples under one of CARRIED."""
    kind, _, _ = name.partition("-")
    bank, found = bench.others[kind](), {}
    student = Student(bench.student.model, bank)
    try:
        for skill in bench.bank.names:
            with under(student, CARRIED[name](bank, skill)):
                found[skill] = score(bench.splits["test"][skill], BATCH)
    finally:
        student.close()
    return found


def _merged(method: str) -> Carried:
    return lambda bank, skill: by(bank, method)(draws.centre(len(bank.names)))


CARRIED: Mapping[str, Carried] = {
    "joint": lambda bank, skill: alone(bank, 0),
    "osrm-single": lambda bank, skill: alone(bank, bank.names.index(skill)),
    "osrm-mean": _merged("linear"),
    "osrm-p4": _merged("linear;p=4"),
}
