"""Tables: what docs/quality.md shows of a suite's estimates, as markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from dynmerge.evaluation.bootstrap import Estimate, Interval, combined, difference, mean
from dynmerge.evaluation.front import hypervolume, monotonicity
from dynmerge.evaluation.simplex import even_grid
from study.methods import FORM_ROWS, ROWS
from study.places import grid_skills, places
from study.run import FIRST, GRID, GRID_ROWS, GRID_STEPS
from study.suite import DEFAULT, Suite

DIFFERENCES = (
    ("Pico over the mean", "pico", "mean"),
    ("mean with its norm restored over the mean", "mean-gamma", "mean"),
    ("Pico over tuned Task Arithmetic", "pico", "tuned"),
    ("tuned Pico over tuned Task Arithmetic", "pico-tuned", "tuned"),
    ("the default over tuned Task Arithmetic", DEFAULT, "tuned"),
    ("the default over the joint adapter", DEFAULT, "joint"),
    ("TARA-A's map over one weight per task and module's", "tara-a-map", "adamerging-map"),
    ("the free core's map over it", "core-map", "adamerging-map"),
    ("TARA-A over it, both for the centre alone", "tara-a-distil", "adamerging-distil"),
    ("TARA-B over it, both for the centre alone", "tara-b-distil", "adamerging-distil"),
    ("the free core over it, both for the centre alone", "core-distil", "adamerging-distil"),
    (
        "one weight per task under it, both for the centre alone",
        "per-task-distil",
        "adamerging-distil",
    ),
    ("TARA-A by entropy over tuned", "tara-a-entropy", "tuned"),
    ("TARA-A by labels over TARA-A by distillation", "tara-a-labels", "tara-a-distil"),
    ("OSRM's adapters over the others, by `linear`", "osrm-mean", "mean"),
    ("OSRM's adapters over the others, by `linear;p=4`", "osrm-p4", "linear-p4"),
)
GAPS = (DEFAULT, "adamerging-map", "core-map", "tara-a-distil", "core-distil")


def methods_table(suite: Suite) -> str:
    """Accuracy at the uniform preference, by task, and the average over the seeds there are."""
    rows = []
    for method in suite.methods():
        seeds = suite.seeds_of(method)
        average = suite.average(method, seeds) if seeds else None
        if average is None:
            continue
        tuned = suite.average("tuned", seeds)
        over = signed(difference(average, tuned).interval()) if tuned is not None else ""
        by_task = [task_mean(suite, method, task, seeds) for task in suite.tasks]
        known = {**ROWS, **FORM_ROWS}
        data = known[method].data if method in known else ""
        rows.append([method, data, *by_task, str(len(seeds)), brackets(average.interval()), over])
    return markdown(["method", "data", *suite.tasks, "seeds", "average", "over tuned"], rows)


def task_mean(suite: Suite, method: str, task: str, seeds: Sequence[int]) -> str:
    """The mean over seeds."""
    found = [suite.estimate(method, task, seed) for seed in seeds]
    values = [one.value for one in found if one is not None]
    return f"{sum(values) / len(values):.3f}"


def preferences_table(suite: Suite) -> str:
    """Preference-weighted accuracy of what is measured away from the centre, first seed."""
    seed, wanted = FIRST[suite.name], places(len(suite.tasks))
    rows = []
    for method in suite.methods("mixed"):
        found = [suite.weighted(method, at, seed) for at in wanted]
        present = [one for one in found if one is not None]
        average = f"{mean(present).value:.3f}" if len(present) == len(found) else ""
        rows.append(
            [method, *("" if one is None else f"{one.value:.3f}" for one in found), average]
        )
    return markdown(["method", *wanted, "average"], rows)


def regret_table(suite: Suite) -> str:
    """What a map loses to coefficients optimised for each preference alone, over all places."""
    rows = []
    for method in ("tara-a", "core"):
        found = [
            everywhere(suite, name) for name in (f"{method}-map", f"{method}-for-each", "mean")
        ]
        served, each, linear = found
        if served is None or each is None or linear is None:
            continue
        lost = combined([each, served, linear], gap_lost)
        rows.append(
            [
                method,
                *(brackets(one.interval()) for one in (linear, served, each)),
                signed(difference(each, served).interval()),
                brackets(lost.interval()),
            ]
        )
    head = ["method", "linear", "its map", "for each alone", "regret, points", "of the gap"]
    return markdown(head, rows)


def everywhere(suite: Suite, method: str) -> Estimate | None:
    """The mean over places of the weighted accuracy, first seed."""
    found = [suite.weighted(method, at, FIRST[suite.name]) for at in places(len(suite.tasks))]
    present = [one for one in found if one is not None]
    return mean(present) if len(present) == len(found) else None


def gap_lost(each: Tensor) -> Tensor:
    """(optimised - map) / (optimised - linear), of those three."""
    return (each[..., 0] - each[..., 1]) / (each[..., 0] - each[..., 2])


def fronts_table(suite: Suite) -> str:
    """What each method's grid of preferences reaches: its hypervolume, and how monotone it is."""
    seed, skills = FIRST[suite.name], grid_skills(suite.tasks)
    grid = even_grid(skills, GRID_STEPS)
    rows, first = [], None
    for name in GRID_ROWS:
        found = [
            {skill: suite.estimate(f"{GRID}{name}", skill, seed, str(one)) for skill in skills}
            for one in grid
        ]
        points = present_points(found)
        if points is None:
            continue
        volume, steps = hypervolume(points), monotonicity(grid, points)
        over = "" if first is None else signed(difference(volume, first).interval())
        first = first or volume
        within = f"{steps.within}/{steps.steps}"
        rows.append([name, brackets(volume.interval()), over, within, f"{steps.as_measured}"])
    head = ["method", "hypervolume", "over the first (x 100)"]
    return markdown([*head, "steps that keep it, within", "as measured"], rows)


def present_points(
    found: Sequence[Mapping[str, Estimate | None]],
) -> list[dict[str, Estimate]] | None:
    """The same, if nothing is missing."""
    if any(one is None for point in found for one in point.values()):
        return None
    return [{skill: one for skill, one in point.items() if one} for point in found]


def aims_table(suite: Suite) -> str:
    """The aims that the study was held to, and what was found, on the seeds that both have."""
    rows = []
    for words, first, second in DIFFERENCES:
        seeds = [seed for seed in suite.seeds_of(first) if seed in suite.seeds_of(second)]
        pair = suite.average(first, seeds), suite.average(second, seeds)
        if pair[0] is not None and pair[1] is not None:
            found = signed(difference(pair[0], pair[1]).interval())
            rows.append([words, found, str(len(seeds))])
    for method in GAPS:
        closed = gap_closed(suite, method)
        if closed is not None:
            words = f"share of the gap from tuned to single that {method} closes"
            rows.append([words, brackets(closed), str(len(suite.seeds_of(method)))])
    return markdown(["question", "points of accuracy, or share", "seeds"], rows)


def cost_table(suite: Suite) -> str:
    """What the suite's rows took."""
    rows = len({(method, seed) for method, _, _, seed in suite.cells})
    return f"{rows} rows in {suite.seconds / 3600:.1f} CPU-hours, one thread each."


def gap_closed(suite: Suite, method: str) -> Interval | None:
    """(method - tuned) / (single - tuned), over the seeds that the method has."""
    seeds = suite.seeds_of(method)
    found = [suite.average(name, seeds) for name in (method, "tuned", "single")]
    if any(one is None for one in found):
        return None
    present = [one for one in found if one is not None]
    ratio: Callable[[Tensor], Tensor] = lambda all: (  # noqa: E731 - one expression of three
        (all[..., 0] - all[..., 1]) / (all[..., 2] - all[..., 1])
    )
    return combined(present, ratio).interval()


def brackets(interval: Interval) -> str:
    """`.812 [.801, .823]`."""
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def signed(interval: Interval) -> str:
    """A difference, in points."""
    value, low, high = (100 * x for x in (interval.value, interval.low, interval.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; empty without rows."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if not lines:
        return ""
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines])
