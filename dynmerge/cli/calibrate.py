"""`dynmerge calibrate`: texts -> a new version of the bank that carries what was learned, or one
that no longer does.

A training that is stopped goes on where it was.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynmerge.bank.bank import FactorBank
from dynmerge.bank.calibration import Calibration
from dynmerge.bank.storage import (
    add_calibration,
    check_writable,
    drop_calibration,
    load_bank,
    read_manifest,
)
from dynmerge.calibration.calibrate import GAUSS_NEWTON, UNTAUGHT, calibrate
from dynmerge.calibration.plan import Plan
from dynmerge.calibration.train import Training
from dynmerge.cli.asked import CLOSED, Asked
from dynmerge.cli.console import Step, line, note, progress_bar
from dynmerge.cli.gain import say_gain, say_serving
from dynmerge.cli.given import Given, Reading
from dynmerge.cli.state_folder import StateFolder
from dynmerge.cli.student import open_student
from dynmerge.errors import BankError, CalibrationError, ConfigError, StateError
from dynmerge.student import Student
from dynmerge.texts.examples import Examples

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
    bank, watch = _watched(folder)
    for option, named in (("--texts", wanted.texts), ("--held-out", wanted.held_out)):
        _check_known(bank, named, option)
    _check_known(bank, wanted.labels, "--labels")
    plan = wanted.asked.plan(bank)
    _check_files(bank, wanted, plan)
    given = _read(wanted, plan)
    _check_used(bank, wanted, plan, given)
    check_writable(folder)
    student, loaded = open_student(folder, bank, wanted.base)
    with progress_bar() as start:
        reading = Reading(student, loaded, given, wanted.samples or SAMPLES, wanted.asked.drawn_by)
        texts, held_out = _examples(reading, plan, start("reading texts"))
        kept = StateFolder.of(folder, bank, plan, texts, held_out)
        if wanted.again:
            kept.clear()
        with _naming_what_is_left(kept):
            report = _Reporter(kept, watch, start("calibrating"))
            found = _learned(student, texts, held_out, plan, report)
            written = add_calibration(folder, found)
    student.close()
    kept.clear()
    line(f"method  {found.method}, form {found.form}, digest {found.digest[:12]}")
    line(f"bank    {written.digest[:12]}")
    line()
    say_gain(found)
    line()
    say_serving(found, bank, written)
    line(str(folder))


@contextmanager
def _naming_what_is_left(kept: StateFolder) -> Iterator[None]:
    """Where the bank ends a training, say so of its state too."""
    try:
        yield
    except BankError as error:
        if not kept.file.exists():
            raise
        raise BankError(
            f"{error}; the same command goes on from {kept.folder} while the bank has the factors "
            "that it had at first: else delete that folder"
        ) from error


def _learned(
    student: Student,
    texts: Mapping[str, Examples],
    held_out: Mapping[str, Examples],
    plan: Plan,
    report: "_Reporter",
) -> Calibration:
    """What `calibrate` finds, from where it was stopped if it was."""
    kept = report.kept
    try:
        state = report.going_on_from(kept.read())
        return calibrate(student, texts, held_out, plan, report, state, report.step)
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


def _check_files(bank: FactorBank, wanted: Wanted, plan: Plan) -> None:
    """Raise ConfigError where a file is missing, or one is of no use."""
    labelled = plan.objective == "labels"
    for name in bank.names:
        if name not in wanted.texts and (labelled or name in wanted.labels):
            asks = "--objective labels" if labelled else f"--labels {name}"
            raise ConfigError(f"{asks} needs --texts {name}=FILE")
    if plan.method in UNTAUGHT and wanted.held_out:
        name = next(iter(wanted.held_out))
        raise ConfigError(
            f"--held-out is not for {plan.method}, which holds out all of --texts: give the rows of"
            f" --held-out {name} to --texts {name}"
        )


def _read(wanted: Wanted, plan: Plan) -> Given:
    """All files, before anything that takes long."""
    given = Given.read(wanted.texts, wanted.held_out, wanted.labels)
    for _, rows in given.files if plan.objective == "labels" else ():
        for row in rows:
            if row.prompt is not None and row.answer is None:
                raise ConfigError(f"{row.place} has no answer, which --objective labels needs")
    return given


def _check_used(bank: FactorBank, wanted: Wanted, plan: Plan, given: Given) -> None:
    """Refuse what would be ignored."""
    if wanted.samples is not None and given.texts.keys() == set(bank.names):
        raise ConfigError("--samples is for skills without --texts, and every skill has some")
    closed = plan.method if plan.method in CLOSED else plan.form
    if wanted.again and closed in (*CLOSED, GAUSS_NEWTON):
        raise ConfigError(f"--again is not for {closed}, which trains nothing")
    files_of = [(name, given.texts.get(name)) for name in bank.names]
    made_up = any(given.is_made_up(*each) for each in (*files_of, *given.held_out.items()))
    if wanted.asked.seed is not None and plan.method in CLOSED and not made_up:
        raise ConfigError(f"--seed: nothing is drawn for {closed}, all of whose texts are given")


def _examples(
    reading: Reading, plan: Plan, step: Step
) -> tuple[Mapping[str, Examples], Mapping[str, Examples]]:
    """What is learned from and what guards it; for a method that only the guard chooses, nothing
    and all there is.
    """
    return ({}, reading.whole(step)) if plan.method in UNTAUGHT else reading.apart(step)


class _Watch:
    """Whether the bank in `folder` still has the factors of `bank`; others may calibrate it too."""

    def __init__(self, folder: Path, bank: FactorBank, seen: str) -> None:
        self._folder, self._bank = folder, bank
        self._seen = seen  # the seal of the last description whose factors are known to be these

    def check(self) -> None:
        """Raise BankError where it has others. Tensors are read only where it was written anew."""
        now = read_manifest(self._folder).manifest_sha256
        if now == self._seen:
            return
        if load_bank(self._folder).coordinates_digest != self._bank.coordinates_digest:
            raise BankError(
                f"{self._folder} was replaced by a bank of other factors, which nothing learned "
                "here fits"
            )
        self._seen = now


def _watched(folder: Path) -> tuple[FactorBank, _Watch]:
    seen = read_manifest(folder).manifest_sha256  # first: what is loaded may be newer, never older
    bank = load_bank(folder)
    return bank, _Watch(folder, bank, seen)


class _Reporter:
    """After each check: the bar moves, the state is kept, the bank is looked after."""

    def __init__(self, kept: StateFolder, watch: _Watch, step: Step) -> None:
        self.kept, self.step = kept, step
        self._watch = watch
        self.kept_at = 0  # the step from which the same command goes on
        self.ended = False

    def going_on_from(self, state: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Say so, where there is a state."""
        if state and "step" in state:
            self.kept_at = state["step"]
            note(f"going on from step {self.kept_at} (--again starts afresh)")
        return state

    def __call__(self, training: Training) -> None:
        self.kept.write(training.state())
        self.kept_at = training.step
        self.step(training.step, training.plan.steps)
        self.ended = training.done
        self._watch.check()
