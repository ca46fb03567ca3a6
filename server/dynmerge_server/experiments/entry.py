"""Entry: the merge a request gets: what it says itself, else an arm, else the server's default."""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import http_sf
from starlette.datastructures import Headers

from dynmerge.errors import ExperimentError, RequestError
from dynmerge.recipe import Recipe
from dynmerge_server.experiments.course import Course
from dynmerge_server.experiments.live import Experiments, Placed, Units
from dynmerge_server.preferences import (
    EXPERIMENT_HEADER,
    UNIT_HEADER,
    Preferences,
    Said,
    Wish,
    joined,
)

SESSION_HEADER = "X-Session-ID"
MAX_UNIT = 512
EXPERIMENT = "experiment"  # the level that chose the preference


@dataclass(frozen=True, slots=True)
class Resolved:
    """A request's merge, which level chose its preference, and where it stands in experiments."""

    recipe: Recipe
    source: str
    placed: Placed | None = None


@dataclass(frozen=True, slots=True)
class Joining:
    """The experiment that a request asks for by name, and the arm, if it asks for one."""

    experiment: str
    arm: str | None


@dataclass(frozen=True, slots=True)
class Half:
    """One of the two answers of a comparison. Clients cannot say this themselves."""

    pair: str
    position: int  # 0 for the first shown
    experiment: str
    arm: str


PAIR: ContextVar[Half | None] = ContextVar("dynmerge_pair", default=None)


async def resolve(
    experiments: Experiments | None,
    preferences: Preferences,
    headers: Headers,
    wish: Wish,
    model: str | None,
) -> Resolved:
    """A request's merge. Raises RequestError for any mistake, also in what is overridden.

    Whoever says what to serve is in no experiment.
    """
    said = preferences.read(headers, wish, model)
    joining = _joining(headers, wish)
    if experiments is None:
        if joining:
            raise ExperimentError("this server has no experiments", EXPERIMENT_HEADER)
        return Resolved(preferences.recipe(said), said.source)
    units = units_of(headers, wish)
    if not joining and said.anything:
        return Resolved(preferences.recipe(said), said.source, experiments.outside(units))
    if not joining:
        return await _by_hash(experiments, preferences, units)
    if said.anything:
        message = f"{EXPERIMENT_HEADER} asks for an arm; say that, or what to serve, not both"
        raise ExperimentError(message, EXPERIMENT_HEADER)
    course = _course(experiments, joining.experiment)
    if joining.arm is not None:
        return _forced(experiments, preferences, course, joining.arm, units)
    if units.of(course.experiment.unit) is None:
        message = f"{EXPERIMENT_HEADER} names an experiment, and nothing names its unit"
        raise ExperimentError(message, UNIT_HEADER)
    return await _by_hash(experiments, preferences, units, joining.experiment)


def units_of(headers: Headers, wish: Wish) -> Units:
    """Whom a request may be counted as. Raises RequestError on a unit that nobody could mean."""
    given = headers.getlist(UNIT_HEADER)
    # Other languages hash characters where HTTP has bytes.
    if given and not (len(given) == 1 and given[0] and given[0].isascii()):
        message = f"{UNIT_HEADER} is one unit, of 1 to {MAX_UNIT} ASCII characters"
        raise RequestError(message, UNIT_HEADER)
    session = joined(headers, SESSION_HEADER) or None
    units = Units(given[0] if given else None, _decoded(session), wish.user or None)
    named = ((UNIT_HEADER, units.header), (SESSION_HEADER, units.session), ("user", units.user))
    for where, unit in named:
        if unit is not None and len(unit) > MAX_UNIT:
            raise RequestError(f"{where} names a unit, of 1 to {MAX_UNIT} characters", where)
    return units


def check_arms(preferences: Preferences, course: Course) -> None:
    """Raise RequestError where an arm cannot be served."""
    for arm in course.experiment.arms:
        _recipe(preferences, course, arm)


async def _by_hash(
    experiments: Experiments, preferences: Preferences, units: Units, only: str | None = None
) -> Resolved:
    while True:
        placed = await experiments.place(units, preferences.bank, only)
        if placed is None or placed.experiment is None or placed.arm is None:
            nothing = Said()
            return Resolved(preferences.recipe(nothing), nothing.source, placed)
        course = experiments.course(placed.experiment)
        try:
            return Resolved(_recipe(preferences, course, placed.arm), EXPERIMENT, placed)
        except RequestError as error:
            # Its skill was unloaded, say. Nobody asked for the arm, so nobody is refused; but the
            # others have nothing to be compared with, so they end too.
            experiments.fail(placed.experiment, preferences.bank, str(error))


def _forced(
    experiments: Experiments, preferences: Preferences, course: Course, arm: str, units: Units
) -> Resolved:
    experiment = course.experiment
    if arm not in experiment.arms:
        known = ", ".join(experiment.arms)
        raise ExperimentError(
            f"{EXPERIMENT_HEADER}: {experiment.name} has no arm {arm[:80]!r} (known: {known})",
            EXPERIMENT_HEADER,
        )
    unit = units.of(experiment.unit)
    hashed = experiments.log.hashed(unit) if unit else ""
    half = PAIR.get()
    placed = (
        Placed(hashed, "pair", experiment.name, arm, course.phase, half.pair, half.position)
        if half
        else Placed(hashed, "forced", experiment.name, arm, course.phase)
    )
    return Resolved(_recipe(preferences, course, arm), EXPERIMENT, placed)


def _recipe(preferences: Preferences, course: Course, arm: str) -> Recipe:
    experiment = course.experiment
    name = f"experiment {experiment.name}, arm {arm}"
    return preferences.recipe_of(experiment.arms[arm], name, (experiment.name, course.last.number))


def _course(experiments: Experiments, name: str) -> Course:
    try:
        return experiments.course(name)
    except ExperimentError as error:
        raise ExperimentError(f"{EXPERIMENT_HEADER}: {error}", EXPERIMENT_HEADER) from None


def _joining(headers: Headers, wish: Wish) -> Joining | None:
    """What the header or the body asks to join. Raises ExperimentError where they say too much."""
    in_header = joined(headers, EXPERIMENT_HEADER)
    if in_header is not None and wish.experiment is not None:
        message = f"{EXPERIMENT_HEADER} and the body's experiment both ask; give one of them"
        raise ExperimentError(message, EXPERIMENT_HEADER)
    text = wish.experiment if in_header is None else in_header
    if text is None:
        return None
    try:
        members: Any = http_sf.parse(
            text.encode("ascii"), tltype="dictionary", on_duplicate_key=_refuse
        )
        ((name, (arm, more)),) = members.items()
    except ValueError:  # no dictionary, not of one member, or not of ASCII
        name, arm, more = "", None, {}
    # A reply's header, fed back, may say that its arm was forced.
    if set(more) - {"forced"} or not (arm is True or isinstance(arm, http_sf.Token)):
        message = f"{EXPERIMENT_HEADER} is one experiment, or one and its arm, as in tone=B"
        raise ExperimentError(message, EXPERIMENT_HEADER)
    return Joining(name, None if arm is True else str(arm))


def _refuse(*_: object) -> None:
    raise ValueError("given twice")


def _decoded(value: str | None) -> str | None:
    """A header's text: UTF-8 where it is that, though HTTP's library took it for Latin-1."""
    try:
        return value.encode("latin-1").decode() if value else value
    except UnicodeError:
        return value
