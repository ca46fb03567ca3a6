"""Lab: one server's experiments with what their routes and keeper need, in `app.state.lab`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from anyio import CapacityLimiter
from starlette.requests import Request

from dynmerge.errors import ConfigError, RequestError, UnknownExperiment
from dynmerge_server.config import ExperimentsConfig, read_toml
from dynmerge_server.experiments.course import Course
from dynmerge_server.experiments.declaration import Experiment, parse_all
from dynmerge_server.experiments.entry import check_arms
from dynmerge_server.experiments.flags import Flags
from dynmerge_server.experiments.live import Experiments
from dynmerge_server.experiments.log import Log
from dynmerge_server.preferences import Preferences

TABLE = "experiments"  # of the declarations' file


@dataclass(frozen=True, slots=True)
class Lab:
    """Experiments, the way to what is served now, and where declarations are read."""

    experiments: Experiments
    preferences: Callable[[], Preferences]
    config: ExperimentsConfig
    flags: Flags | None = None
    # One report at a time: it reads all that there is of an experiment.
    reports: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))

    def close(self) -> None:
        """Write what waits, and ask no more flags."""
        self.log.close()
        if self.flags is not None:
            self.flags.close()

    @property
    def path(self) -> Path:
        """Where the log is."""
        assert self.config.log is not None  # without it there is no lab
        return self.config.log.path

    @property
    def log(self) -> Log:
        """What happened."""
        return self.experiments.log

    def read_file(self) -> None:
        """Make the file's declarations count, and keep what of them cannot, to be shown.

        Raises ConfigError naming the file, after which none counts; LogError.
        """
        path = self.config.file
        if path is None:
            return
        declared = declarations(path)
        try:
            notes = self.experiments.declare_all(declared)
        except RequestError as error:
            raise ConfigError(f"{path.name}: {error}") from None
        self.experiments.file_error = f"{path.name}: {'; '.join(notes)}" if notes else None


def open_lab(config: ExperimentsConfig, preferences: Callable[[], Preferences]) -> Lab | None:
    """The lab of a server, its file read; None where it has no log. Raises ConfigError.

    `preferences` gives those of the bank that is served.
    """
    if config.log is None:
        if config.file is not None:
            raise ConfigError("experiments.file needs experiments.log, where they are kept")
        return None

    def check(course: Course) -> None:
        check_arms(preferences(), course)

    flags = Flags.of(config.flags) if config.flags else None
    lab = Lab(Experiments(Log(config.log), check, flags), preferences, config, flags)
    try:
        lab.read_file()
    except ConfigError:
        lab.close()
        raise
    return lab


def lab(request: Request) -> Lab:
    """The lab of the application a request came to. Raises UnknownExperiment: it has none."""
    found = request.app.state.lab
    if found is None:
        raise UnknownExperiment("this server has no experiments: give [experiments.log] a path")
    assert isinstance(found, Lab)
    return found


def declarations(path: Path) -> dict[str, Experiment]:
    """The experiments that a file declares. Raises ConfigError naming the file and the key."""
    tables = read_toml(path)
    if unknown := sorted(set(tables) - {TABLE}):
        raise ConfigError(f"{path.name}: no table named {unknown[0]} (known: {TABLE})")
    try:
        return parse_all(tables.get(TABLE, {}))
    except RequestError as error:
        raise ConfigError(f"{path.name}: {error}") from None
