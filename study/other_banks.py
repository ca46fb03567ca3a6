"""Banks of adapters that were trained another way: jointly, or from OSRM's start."""

from __future__ import annotations

from dynmerge.calibration.teachers import alone
from dynmerge.evaluation.scores import Score, score
from dynmerge.student import Student
from study.bench import BATCH, Bench, Made, by, under


def other_scores(bench: Bench, name: str) -> dict[str, Score]:
    """`joint`: the one adapter; `osrm-mean`, `osrm-p4`: the linear merges of the others."""
    kind, _, method = name.partition("-")
    bank = bench.others[kind]()
    student = Student(bench.student.model, bank)
    made: Made = alone(bank, 0)
    if kind == "osrm":
        text = "linear" if method == "mean" else "linear;p=4"
        made = by(bank, text)(bench.centre)
    try:
        with under(student, made):
            return {skill: score(bench.splits["test"][skill], BATCH) for skill in bench.bank.names}
    finally:
        student.close()
