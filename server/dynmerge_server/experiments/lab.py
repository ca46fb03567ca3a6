"""Lab: one server's experiments with what their routes and keeper need, in `app.state.lab`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request

from dynmerge.errors import ConfigError, DynmergeError
from dynmerge_server.config import ExperimentsConfig, read_toml
from dynmerge_server.experiments.course import Course
from dynmerge_server.experiments.declaration import parse_all
from dynmerge_server.experiments.entry import check_arms
from dynmerge_server.experiments.live import ArmFlags, Experiments
from dynmerge_server.experiments.log import Log
from dynmerge_server.preferences import Preferences

TABLE = "experiments"  # of the declarations' file


@dataclass(frozen=True, slots=True)
class Lab:
    """Experiments, the way to what is served now, and where declarations are read."""

    experiments: Experiments
    preferences: Callable[[], Preferences]
    config: ExperimentsConfig

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
        """Make the file's declarations count; all or none. Raises ConfigError naming the file."""
        path = self.config.file
        if path is None:
            return
        try:
            self.experiments.declare_all(parse_all(_declarations(path)))
        except ConfigError:
            raise
        except DynmergeError as error:
            raise ConfigError(f"{path.name}: {error}") from None


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

    lab = Lab(Experiments(Log(config.log), check, _flags(config)), preferences, config)
    try:
        lab.read_file()
    except ConfigError:
        lab.log.close()
        raise
    return lab


def lab(request: Request) -> Lab:
    """The lab of the application a request came to. Raises HTTPException where it has none."""
    found = request.app.state.lab
    if found is None:
        raise HTTPException(404, "This server has no experiments: give [experiments.log] a path")
    assert isinstance(found, Lab)
    return found


def _declarations(path: Path) -> object:
    tables = read_toml(path)
    if unknown := sorted(set(tables) - {TABLE}):
        raise ConfigError(f"{path.name}: no table named {unknown[0]} (known: {TABLE})")
    return tables.get(TABLE, {})


def _flags(config: ExperimentsConfig) -> ArmFlags | None:
    if config.flags is None:
        return None
    from dynmerge_server.experiments.flags import Flags

    return Flags.of(config.flags)
