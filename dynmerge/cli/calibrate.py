"""`dynmerge calibrate`: texts -> a new version of the bank that carries what was learned, or one
that no longer does.

A training that is stopped goes on where it was: its state lies in a hidden folder beside the bank
until it ends.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dynmerge.bank.bank import FactorBank
from dynmerge.bank.calibration import Calibration
from dynmerge.bank.storage import (
    add_calibration,
    check_writable,
    drop_calibration,
    edited_place,
    load_bank,
)
from dynmerge.calibration.calibrate import GAUSS_NEWTON, calibrate
from dynmerge.calibration.plan import Plan
from dynmerge.calibration.train import Training
from dynmerge.cli.asked import CLOSED, Asked
from dynmerge.cli.console import Step, line, note, progress_bar, table
from dynmerge.cli.student import examples_for, open_student
from dynmerge.engines.transformers.model import LoadedModel
from dynmerge.errors import BankError, CalibrationError, ConfigError, StateError
from dynmerge.student import Student
from dynmerge.texts.examples import Examples
from dynmerge.texts.rows import Row, check_labels, check_rows, read_texts
from dynmerge.texts.sampled import sample_answers, sample_texts

STATE = "state.pt"
DIGEST_BYTES = 32  # of SHA-256, before what torch.save wrote
# Of the rows without a file of their own, every fourth is held out.
HELD_OUT_EVERY = 4
SAMPLES = 128


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to learn and from what, as it was asked for. `samples` are made where no file is."""

    asked: Asked
    texts: Mapping[str, Path]
    held_out: Mapping[str, Path]
    labels: Mapping[str, Sequence[str]]
    samples: int | None
    base: str | None
    again: bool


def run(folder: Path, wanted: Wanted) -> None:
    """Learn, write the new version of the bank, and say what it gained."""
    bank = load_bank(folder)
    for option, named in (("--texts", wanted.texts), ("--held-out", wanted.held_out)):
        _check_known(bank, named, option)
    _check_known(bank, wanted.labels, "--labels")
    plan = wanted.asked.plan(bank)
    files = _read(bank, wanted)
    _check_used(bank, wanted, plan, files)
    check_writable(folder)
    student, loaded = open_student(folder, bank, wanted.base)
    with progress_bar() as start:
        texts, held_out = _examples(student, loaded, wanted, files, start("reading texts"))
        kept = _StateFolder.of(folder, bank, plan, texts, held_out)
        if wanted.again:
            kept.clear()
        found = _learned(student, texts, held_out, plan, kept, start("calibrating"))
    student.close()
    written = add_calibration(folder, found)
    kept.clear()
    _say(found, written.digest)
    line(str(folder))


def _learned(
    student: Student,
    texts: Mapping[str, Examples],
    held_out: Mapping[str, Examples],
    plan: Plan,
    kept: "_StateFolder",
    step: Step,
) -> Calibration:
    """What `calibrate` finds, from where it was stopped if it was."""
    report = _Reporter(kept, step)
    try:
        state = report.going_on_from(kept.read())
        return calibrate(student, texts, held_out, plan, report, state, step)
    except StateError as error:
        raise StateError(f"{kept.file}: {error}: --again starts afresh") from error
    except CalibrationError:
        if report.ended:  # and is no better than `linear`: nothing to go on from
            kept.clear()
        raise
    except KeyboardInterrupt:
        if report.kept_at:
            note(f"stopped at step {report.kept_at}: the same command goes on from there")
        raise


def drop(folder: Path, methods: Sequence[str]) -> None:
    """Write the bank without what was learned for `methods`, once it is known to carry them all."""
    bank = load_bank(folder)
    for method in methods:
        bank.calibration(method)
    for method in dict.fromkeys(methods):
        written = drop_calibration(folder, method)
        line(f"dropped {method}")
        line(f"bank    {written.digest[:12]}")
    line(str(folder))


def paths_of(sources: Mapping[str, str]) -> dict[str, Path]:
    """Skill -> the file of its texts."""
    return {name: Path(source) for name, source in sources.items()}


def labels_of(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Skill -> its labels, from `A,B,..`."""
    return {name: [word.strip() for word in words.split(",")] for name, words in sources.items()}


def _check_known(bank: FactorBank, named: Mapping[str, object], option: str) -> None:
    for name in named:
        if name not in bank.names:
            raise ConfigError(f"{option}: no skill named {name!r} (known: {', '.join(bank.names)})")


@dataclass(frozen=True, slots=True)
class _Files:
    """Skill -> the rows of its file, where it has one."""

    texts: Mapping[str, Sequence[Row]]
    held_out: Mapping[str, Sequence[Row]]


def _read(bank: FactorBank, wanted: Wanted) -> _Files:
    """All files, before anything that takes long."""
    labelled = wanted.asked.objective == "labels"
    for name in bank.names:
        if name not in wanted.texts and (labelled or name in wanted.labels):
            asks = "--objective labels" if labelled else f"--labels {name}"
            raise ConfigError(f"{asks} needs --texts {name}=FILE")
    files = _Files(
        {name: read_texts(path) for name, path in wanted.texts.items()},
        {name: read_texts(path) for name, path in wanted.held_out.items()},
    )
    for name, labels in wanted.labels.items():
        check_labels(labels, f"--labels {name}")
    for name, rows in (*files.texts.items(), *files.held_out.items()):
        check_rows(rows, wanted.labels.get(name))
        for row in rows:
            if labelled and row.prompt is not None and row.answer is None:
                raise ConfigError(f"{row.place} has no answer, which --objective labels needs")
    for name in files.texts.keys() & files.held_out.keys():
        if files.texts[name] == files.held_out[name]:
            raise ConfigError(
                f"--held-out {name} has the rows of --texts {name}: it guards nothing"
            )
    return files


def _check_used(bank: FactorBank, wanted: Wanted, plan: Plan, files: _Files) -> None:
    """Refuse what would be ignored."""
    if wanted.samples is not None and files.texts.keys() == set(bank.names):
        raise ConfigError("--samples is for skills without --texts, and every skill has some")
    closed = plan.method if plan.method in CLOSED else plan.form
    if wanted.again and closed in (*CLOSED, GAUSS_NEWTON):
        raise ConfigError(f"--again is not for {closed}, which trains nothing")
    files_of = [(name, files.texts.get(name)) for name in bank.names]
    made_up = any(_is_made_up(wanted, *each) for each in (*files_of, *files.held_out.items()))
    if wanted.asked.seed is not None and plan.method in CLOSED and not made_up:
        raise ConfigError(f"--seed: nothing is drawn for {closed}, all of whose texts are given")


def _examples(
    student: Student, loaded: LoadedModel, wanted: Wanted, files: _Files, step: Step
) -> tuple[dict[str, Examples], dict[str, Examples]]:
    """Of every skill, what it learns from and what guards it."""
    texts: dict[str, Examples] = {}
    held_out: dict[str, Examples] = {}
    names = student.bank.names
    for done, name in enumerate(names, start=1):
        rows = _rows(student, loaded, wanted, name, files.texts.get(name))
        if name in files.held_out:
            kept = _rows(student, loaded, wanted, name, files.held_out[name])
        else:
            kept = rows[::HELD_OUT_EVERY]
            rows = [row for place, row in enumerate(rows) if place % HELD_OUT_EVERY]
        if not rows:
            raise ConfigError(f"--texts {name}: one row is too few to hold some out")
        labels = wanted.labels.get(name)
        texts[name] = examples_for(loaded, name, rows, labels)
        held_out[name] = examples_for(loaded, name, kept, labels)
        step(done, len(names))
    return texts, held_out


def _rows(
    student: Student, loaded: LoadedModel, wanted: Wanted, name: str, rows: Sequence[Row] | None
) -> Sequence[Row]:
    """A file's rows; or, where there is none, rows that the skill's own adapter makes up.

    Prompts without an answer, and not for labels, are answered by the adapter.
    """
    seed = wanted.asked.drawn_by
    if rows is None:
        return sample_texts(student, loaded.tokenizer, name, wanted.samples or SAMPLES, seed)
    if not _is_made_up(wanted, name, rows):
        return rows
    return sample_answers(student, loaded.tokenizer, name, rows, seed)


def _is_made_up(wanted: Wanted, name: str, rows: Sequence[Row] | None) -> bool:
    """Whether the skill says what its rows are, or some of their answers."""
    if rows is None:
        return True
    unanswered = any(row.prompt is not None and row.answer is None for row in rows)
    return unanswered and name not in wanted.labels


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
        content = json.dumps([bank.coordinates_digest, asdict(plan), digests], sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()[:12]
        bank_folder = edited_place(bank_folder)
        return cls(bank_folder.with_name(f".{bank_folder.name}.{plan.method}-{key}.training"))

    @property
    def file(self) -> Path:
        """The state itself."""
        return self.folder / STATE

    def read(self) -> Mapping[str, Any] | None:
        """The state that is there, if any. Raises StateError unless it is as it was written."""
        try:
            if not os.path.lexists(self.folder):
                return None
            if not self.folder.is_dir() or (self.file.exists() and not self.file.is_file()):
                raise StateError("something else is in its place")
            if not self.file.exists():
                return None
            kept = self.file.read_bytes()
        except OSError as error:
            raise StateError(f"cannot be read ({error.strerror})") from error
        content = kept[DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != kept[:DIGEST_BYTES]:
            raise StateError("it is not as it was written")
        state: Mapping[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
        return state

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the state; what is killed half-way leaves the old one."""
        content = io.BytesIO()  # torch.save hides what a disk says
        torch.save(dict(state), content)
        # Of two that learn the same at once, each has its own.
        partial = self.folder / f"{STATE}.{os.getpid()}.partial"
        try:
            self.folder.mkdir(exist_ok=True)
            with partial.open("wb") as file:
                file.write(hashlib.sha256(content.getbuffer()).digest())
                file.write(content.getbuffer())
            partial.replace(self.file)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise BankError(f"cannot keep the training's state: {error}") from error

    def clear(self) -> None:
        """Forget it, and whatever else is in its place."""
        if self.folder.is_dir() and not self.folder.is_symlink():
            shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.unlink(missing_ok=True)


class _Reporter:
    """After each check: the bar moves, the state is kept."""

    def __init__(self, kept: _StateFolder, step: Step) -> None:
        self._kept, self._step = kept, step
        self.kept_at = 0  # the step from which the same command goes on
        self.ended = False

    def going_on_from(self, state: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Say so, where there is a state."""
        if state and "step" in state:
            self.kept_at = state["step"]
            note(f"going on from step {self.kept_at} (--again starts afresh)")
        return state

    def __call__(self, training: Training) -> None:
        self._kept.write(training.state())
        self.kept_at = training.step
        self._step(training.step, training.plan.steps)
        self.ended = training.done


def _say(found: Calibration, digest: str) -> None:
    line(f"method  {found.method}, form {found.form}, digest {found.digest[:12]}")
    line(f"bank    {digest[:12]}")
    record: Mapping[str, Any] = found.record
    line()
    checks = record.get("checks")
    if checks:
        keys = ("step", "loss", "score")
        rows = [["-" if check[key] is None else check[key] for key in keys] for check in checks]
        table(("steps", "loss", "held-out score"), rows)
        if record["kept"] == "start":
            line("nothing learned was better on the held-out texts: the start was kept")
    else:
        table(("", "held-out score"), list(record["scores"].items()))
    line()
