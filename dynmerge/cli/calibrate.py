"""`dynmerge calibrate`: texts -> a new version of the bank that carries what was learned.

A training that is stopped goes on where it was: its state lies in a hidden folder beside the bank
until it ends.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dynmerge.bank.bank import FactorBank
from dynmerge.bank.calibration import Calibration
from dynmerge.bank.storage import add_calibration, load_bank
from dynmerge.calibration.calibrate import METHODS, calibrate
from dynmerge.calibration.examples import Examples
from dynmerge.calibration.language import examples_of
from dynmerge.calibration.plan import Objective, Plan, published
from dynmerge.calibration.rows import Row, read_texts
from dynmerge.calibration.sampled import sample_answers, sample_texts
from dynmerge.calibration.student import Student
from dynmerge.calibration.train import Training
from dynmerge.cli.console import Step, line, progress_bar, table
from dynmerge.cli.student import open_student
from dynmerge.engines.transformers.model import LoadedModel
from dynmerge.errors import BankError, CalibrationError, ConfigError
from dynmerge.preference import Preference

STATE = "state.pt"
# Of the rows without a file of their own, every fourth is held out.
HELD_OUT_EVERY = 4


@dataclass(frozen=True, slots=True)
class Asked:
    """The settings as they were asked for; None is the default of what was asked."""

    method: str
    objective: Objective
    form: str
    at: str | None
    published: bool
    steps: int | None
    batch: int | None
    rate: float | None
    mu: float | None
    seed: int

    def plan(self, bank: FactorBank) -> Plan:
        """The plan for `bank`. Raises CalibrationError, ConfigError and PreferenceError."""
        if self.method not in METHODS:
            raise CalibrationError(
                f"--method: nothing is learned for {self.method!r} (known: {', '.join(METHODS)})"
            )
        given = {"steps": self.steps, "batch": self.batch, "rate": self.rate, "mu": self.mu}
        changes: dict[str, Any] = {key: v for key, v in given.items() if v is not None}
        if self.published:
            return replace(published(self.method, self._at(bank), self.seed), **changes)
        at = self._at(bank) if self.form == "fixed" else None
        if at is None and self.at is not None:
            raise ConfigError(f"--at is for --form fixed; {self.form} serves every preference")
        return Plan(self.method, self.form, self.objective, at, seed=self.seed, **changes)

    def _at(self, bank: FactorBank) -> tuple[float, ...]:
        """The one preference, (tasks,): the uniform one where none is named."""
        if self.at is None:
            return tuple(1 / len(bank.names) for _ in bank.names)
        wish = Preference.parse(self.at, source="--at")
        wish.require(bank.names, source="--at")
        vector = wish.vector(bank.names)
        if wish.is_raw or abs(sum(vector) - 1) > 1e-6:
            raise ConfigError("--at names a preference: weights of skills, without base or ;raw")
        return tuple(vector)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to learn and from what, as it was asked for. `samples` are made where no file is."""

    asked: Asked
    texts: Mapping[str, Path]
    held_out: Mapping[str, Path]
    labels: Mapping[str, Sequence[str]]
    samples: int
    base: str | None
    again: bool


def run(folder: Path, wanted: Wanted) -> None:
    """Learn, write the new version of the bank, and say what it gained."""
    bank = load_bank(folder)
    for option, named in (("--texts", wanted.texts), ("--held-out", wanted.held_out)):
        _check_known(bank, named, option)
    _check_known(bank, wanted.labels, "--labels")
    plan = wanted.asked.plan(bank)
    student, loaded = open_student(folder, bank, wanted.base)
    with progress_bar() as start:
        texts, held_out = _examples(student, loaded, wanted, start("reading texts"))
        kept = _StateFolder.of(folder, bank, plan, texts, held_out)
        if wanted.again:
            kept.clear()
        found = calibrate(
            student, texts, held_out, plan, _Reporter(kept, start("calibrating")), kept.read()
        )
    student.close()
    written = add_calibration(folder, found)
    kept.clear()
    _say(found, written.digest)
    line(str(folder))


def files(sources: Mapping[str, str]) -> dict[str, Path]:
    """Skill -> the file of its texts."""
    return {name: Path(source) for name, source in sources.items()}


def labels(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Skill -> its labels, from `A,B,..`."""
    return {name: [word.strip() for word in words.split(",")] for name, words in sources.items()}


def _check_known(bank: FactorBank, named: Mapping[str, object], option: str) -> None:
    for name in named:
        if name not in bank.names:
            raise ConfigError(f"{option}: no skill named {name!r} (known: {', '.join(bank.names)})")


def _examples(
    student: Student, loaded: LoadedModel, wanted: Wanted, step: Step
) -> tuple[dict[str, Examples], dict[str, Examples]]:
    """Of every skill, what it learns from and what guards it."""
    texts: dict[str, Examples] = {}
    held_out: dict[str, Examples] = {}
    names = student.bank.names
    for done, name in enumerate(names, start=1):
        rows = _rows(student, loaded, wanted, name, wanted.texts.get(name))
        if name in wanted.held_out:
            kept = _rows(student, loaded, wanted, name, wanted.held_out[name])
        else:
            kept = rows[::HELD_OUT_EVERY]
            rows = [row for place, row in enumerate(rows) if place % HELD_OUT_EVERY]
        if not rows or not kept:
            raise ConfigError(f"--texts {name}: too few rows to hold some out")
        labels = wanted.labels.get(name)
        texts[name] = examples_of(loaded.model, loaded.tokenizer, rows, labels)
        held_out[name] = examples_of(loaded.model, loaded.tokenizer, kept, labels)
        step(done, len(names))
    return texts, held_out


def _rows(
    student: Student, loaded: LoadedModel, wanted: Wanted, name: str, file: Path | None
) -> list[Row]:
    """A file's rows; or, where there is none, rows that the skill's own adapter makes up.

    Prompts without an answer, and not for labels, are answered by the adapter.
    """
    seed, labelled = wanted.asked.seed, wanted.asked.objective == "labels"
    if file is None:
        if labelled:
            raise ConfigError(f"objective labels: --texts {name}=FILE is missing")
        return sample_texts(student, loaded.tokenizer, name, wanted.samples, seed)
    rows = read_texts(file)
    unanswered = [row for row in rows if row.prompt is not None and row.answer is None]
    if not unanswered or name in wanted.labels:
        return rows
    if labelled:
        raise ConfigError(f"{unanswered[0].place} has no answer, which objective labels needs")
    return sample_answers(student, loaded.tokenizer, name, rows, seed)


@dataclass(frozen=True, slots=True)
class _StateFolder:
    """Where a training keeps its state, under a name that says all that it depends on."""

    folder: Path

    @classmethod
    def of(
        cls,
        bank_folder: Path,
        bank: FactorBank,
        plan: Plan,
        texts: Mapping[str, Examples],
        held_out: Mapping[str, Examples],
    ) -> "_StateFolder":
        digests = [[name, texts[name].digest, held_out[name].digest] for name in bank.names]
        content = json.dumps([bank.factors_digest, asdict(plan), digests], sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()[:12]
        bank_folder = bank_folder.absolute()
        return cls(bank_folder.with_name(f".{bank_folder.name}.{plan.method}-{key}.training"))

    def read(self) -> Mapping[str, Any] | None:
        """The state that is there, if any."""
        path = self.folder / STATE
        if not path.is_file():
            return None
        try:
            state: Mapping[str, Any] = torch.load(path, weights_only=True)
        except Exception as error:  # whatever unpickling makes of a damaged file
            raise BankError(f"{path} cannot be read ({error}): --again starts afresh") from error
        return state

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the state; what is killed half-way leaves the old one."""
        self.folder.mkdir(exist_ok=True)
        partial = self.folder / f"{STATE}.partial"
        torch.save(dict(state), partial)
        os.replace(partial, self.folder / STATE)  # noqa: PTH105 - the same, and as elsewhere

    def clear(self) -> None:
        """Forget it."""
        shutil.rmtree(self.folder, ignore_errors=True)


class _Reporter:
    """After each check: the bar moves, the state is kept."""

    def __init__(self, kept: _StateFolder, step: Step) -> None:
        self._kept, self._step = kept, step

    def __call__(self, training: Training) -> None:
        self._kept.write(training.state())
        self._step(training.step, training.plan.steps)


def _say(found: Calibration, digest: str) -> None:
    line(f"method  {found.method}, form {found.form}, digest {found.digest[:12]}")
    line(f"bank    {digest[:12]}")
    record: Mapping[str, Any] = found.record
    line()
    if "checks" in record:
        rows = [(check["step"], check["loss"] or 0.0, check["score"]) for check in record["checks"]]
        table(("steps", "loss", "held-out score"), rows)
        if record["kept"] == "start":
            line("nothing learned was better on the held-out texts: the start was kept")
    else:
        table(("", "held-out score"), list(record["scores"].items()))
    line()
