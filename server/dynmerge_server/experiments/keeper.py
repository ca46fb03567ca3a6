"""Keeper: one thread beside the requests that sees what changed: in the log, by other processes; in
the declarations' file; and whether a guardrail is broken.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from dynmerge.errors import ConfigError, DynmergeError
from dynmerge_server.experiments.declaration import Experiment
from dynmerge_server.experiments.lab import Lab
from dynmerge_server.experiments.reading import open_readonly
from dynmerge_server.experiments.writer import FILE_ERRORS

logger = logging.getLogger("dynmerge.experiments")

SECONDS = 1.0
Stamp = tuple[int, int, int] | None  # what tells a file from what it was
FAULTS = (DynmergeError, *FILE_ERRORS)

# An experiment's guardrails that are broken, each as a reason.
Broken = Callable[[Lab, Experiment], Sequence[str]]


class Keeper:
    """Looks every second until it is closed. What fails is logged, shown with the experiments, and
    tried again.
    """

    def __init__(self, lab: Lab, broken: Broken) -> None:
        self._lab = lab
        self._broken = broken
        self._read: Stamp | None = None  # of the file as it was read here; nothing yet
        self._seen = stamp(lab.config.file)
        self._guarded = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dynmerge-experiments", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more, and end the log."""
        self._over.set()
        self._thread.join()
        self._lab.close()

    def look(self) -> None:
        """Look once, at everything; one fault keeps nothing else from being looked at."""
        faults = [*self._attempt(self._lab.experiments.refresh), *self._attempt(self._look_at_file)]
        if time.monotonic() - self._guarded >= self._lab.config.guard_seconds:
            self._guarded = time.monotonic()
            now = time.time()
            for course in list(self._lab.experiments.courses.values()):
                experiment = course.experiment
                if experiment.guardrails and experiment.runs_at(now):
                    faults += self._attempt(partial(self._guard, experiment))
        self._lab.experiments.error = "; ".join(faults) or None

    def _run(self) -> None:
        while not self._over.wait(SECONDS):
            self.look()

    def _attempt(self, work: Callable[[], None]) -> list[str]:
        """What went wrong, without the log's path."""
        try:
            work()
        except Exception as error:  # the outermost handler of the thread
            logger.error("experiments: %s", error, exc_info=not isinstance(error, FAULTS))
            return [str(error).replace(str(self._lab.path), "the log")]
        return []

    def _look_at_file(self) -> None:
        """Read the file when it has changed, and not while somebody writes it."""
        before, self._seen = self._seen, stamp(self._lab.config.file)
        if self._seen != before or self._seen == self._read:
            return
        try:
            self._lab.read_file()
        except ConfigError as error:
            path = self._lab.config.file
            said = str(error).replace(str(path), path.name if path else "")
            self._lab.experiments.file_error = said
            logger.error("experiments stay as they are: %s", error)
        self._read = self._seen  # not where the log failed: then it is read again

    def _guard(self, experiment: Experiment) -> None:
        for reason in self._broken(self._lab, experiment)[:1]:
            logger.error("experiment %s is stopped: %s", experiment.name, reason)
            self._lab.experiments.turn(experiment.name, "stopped", "guardrail", reason)


@contextmanager
def kept(lab: Lab | None) -> Iterator[None]:
    """Keep a lab meanwhile, if there is one."""
    keeper = Keeper(lab, broken_guardrails) if lab else None
    try:
        yield
    finally:
        if keeper is not None:
            keeper.close()


def stamp(path: Path | None) -> Stamp:
    """When and as what a file was written; None where there is none."""
    try:
        found = path.stat() if path else None
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino) if found else None


def broken_guardrails(lab: Lab, experiment: Experiment) -> Sequence[str]:
    """By the statistics of the report."""
    from dynmerge_server.experiments.report.guardrails import broken

    with closing(open_readonly(lab.path)) as connection:
        return broken(connection, experiment.name)
