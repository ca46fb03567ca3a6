"""Tables: what docs/quality.md shows of a suite's estimates, as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from dynmerge.evaluation.bootstrap import Estimate, Interval, combined, difference, mean
from dynmerge.evaluation.front import hypervolume, monotonicity
from dynmerge.evaluation.simplex import even_grid
from study.methods import ALL_ROWS, UNLABELLED
from study.places import CENTRE, grid_skills, places
from study.suite import DEFAULT, Suite, complete
from study.suites import GRID, GRID_STEPS, GRIDS, REFERENCES, SUITES

# What rows were given that are none of ALL_ROWS.
OTHER_DATA: Mapping[str, str] = {
    "joint": "all training labels",
    **dict.fromkeys(("osrm-single", "osrm-mean", "osrm-p4"), f"{UNLABELLED}, before training"),
    **dict.fromkeys(REFERENCES, UNLABELLED),
}
ALONE = ", both for the uniform preference alone"
DIFFERENCES = (
    ("Pico over the mean", "pico", "mean"),
    ("mean with its norm restored over the mean", "mean-gamma", "mean"),
    ("Pico over the mean with its norm restored", "pico", "mean-gamma"),
    ("Pico over tuned Task Arithmetic", "pico", "tuned"),
    ("tuned Pico over tuned Task Arithmetic", "pico-tuned", "tuned"),
    ("the default over tuned Task Arithmetic", DEFAULT, "tuned"),
    ("the default over the joint adapter", DEFAULT, "joint"),
    ("TARA-A's map over one weight per task and module's", "tara-a-map", "adamerging-map"),
    ("the free core's map over one weight per task and module's", "core-map", "adamerging-map"),
    (f"TARA-A over one weight per task and module{ALONE}", "tara-a-distil", "adamerging-distil"),
    (f"TARA-B over one weight per task and module{ALONE}", "tara-b-distil", "adamerging-distil"),
    (f"a free core over one weight per task and module{ALONE}", "core-distil", "adamerging-distil"),
    (f"one per task and module over one per task{ALONE}", "adamerging-distil", "per-task-distil"),
    ("TARA-A by entropy over tuned", "tara-a-entropy", "tuned"),
    ("TARA-A by labels over TARA-A by distillation", "tara-a-labels", "tara-a-distil"),
    ("a free core by labels over a free core by distillation", "core-labels", "core-distil"),
    ("what `--method tuned` finds over tuned Task Arithmetic", "tuned-norm", "tuned"),
    ("OSRM's adapters over the others, each alone", "osrm-single", "single"),
    ("OSRM's adapters over the others, by `linear`", "osrm-mean", "mean"),
    ("OSRM's adapters over the others, by `linear;p=4`", "osrm-p4", "linear-p4"),
)
AVERAGE = "average"
FORMS_COMPARED = ("affine", "bubbles", "product", "network")
ELSEWHERE = (
    ("the default over `linear`", DEFAULT, "mean"),
    ("the default over tuned Task Arithmetic", DEFAULT, "tuned"),
    ("the default over what `--method tuned` finds", DEFAULT, "tuned-norm"),
    ("the default over TSV-M at `p=6`", DEFAULT, "tsv-m-p6"),
    ("the default over one weight per task and module's map", DEFAULT, "adamerging-map"),
    ("the free core's map over the default", "core-map", DEFAULT),
    *(
        (f"one per task and module: ratio over {form}", "adamerging-map", f"adamerging-{form}")
        for form in FORMS_COMPARED
    ),
)
GAPS = (DEFAULT, "adamerging-map", "core-map", "tara-a-distil", "core-distil")


def methods_table(suite: Suite) -> str:
    """Accuracy at the uniform preference, by task, by seed, and their average."""
    rows = []
    for method in suite.methods():
        seeds = suite.seeds_of(method)
        average = suite.average(method, seeds)
        if average is None:
            continue
        tuned = suite.average("tuned", seeds)
        over = signed(difference(average, tuned).interval()) if tuned is not None else ""
        by_task = [task_mean(suite, method, task, seeds) for task in suite.tasks]
        data = ALL_ROWS[method].data if method in ALL_ROWS else OTHER_DATA.get(method, "")
        data = data.replace(UNLABELLED, SUITES[suite.name].texts)
        by_seed = " ".join(values_by_seed(suite, method, seeds))
        rows.append([method, data, *by_task, by_seed, str(average.interval()), over])
    return markdown(["method", "data", *suite.tasks, "by seed", "average", "over tuned"], rows)


def task_mean(suite: Suite, method: str, task: str, seeds: Sequence[int]) -> str:
    """The mean over seeds."""
    found = complete([suite.estimate(method, task, seed) for seed in seeds]) or []
    return f"{mean(found).value:.3f}"


def values_by_seed(suite: Suite, method: str, seeds: Sequence[int]) -> list[str]:
    """The average over tasks, seed by seed."""
    found = complete([suite.average(method, [seed]) for seed in seeds]) or []
    return [f"{one.value:.3f}" for one in found]


def preferences_table(suite: Suite) -> str:
    """Preference-weighted accuracy of what is measured away from the centre, first seed."""
    seed, wanted = SUITES[suite.name].seeds[0], places(len(suite.tasks))
    rows = []
    for method in suite.methods("mixed"):
        found = [suite.weighted(method, at, seed) for at in wanted]
        average = suite.everywhere(method, seed)
        cells = ["" if one is None else f"{one.value:.3f}" for one in (*found, average)]
        rows.append([method, *cells])
    return markdown(["method", *wanted, "average"], rows)


def regret_table(suite: Suite) -> str:
    """What a map loses to coefficients optimised for each preference alone, over all places."""
    rows, seed = [], SUITES[suite.name].seeds[0]
    for method in ("tara-a", "core"):
        names = ("mean", f"{method}-map", f"{method}-for-each")
        for where in (AVERAGE, CENTRE):
            found = weighted_at(suite, names, where, seed)
            if found is None:
                continue
            linear, served, each = found
            rows.append(
                [
                    *(method, where),
                    *(str(one.interval()) for one in found),
                    signed(difference(each, served).interval()),
                    str(combined([served, linear, each], gap_left).interval()),
                ]
            )
    head = ["method", "where", "linear", "its map", "for each alone", "regret, points"]
    return markdown([*head, "of the gap"], rows)


def weighted_at(suite: Suite, methods: Iterable[str], at: str, seed: int) -> list[Estimate] | None:
    """The methods' preference-weighted accuracies at one place, or their means over all; None if
    any was not measured there.
    """
    if at == AVERAGE:
        return complete([suite.everywhere(method, seed) for method in methods])
    return complete([suite.weighted(method, at, seed) for method in methods])


def elsewhere_table(suite: Suite) -> str:
    """Differences of preference-weighted accuracy over all places, and at the worst of them."""
    seed, rows = SUITES[suite.name].seeds[0], []
    for words, first, second in ELSEWHERE:
        found = {
            at: difference(*pair)
            for at in (AVERAGE, *places(len(suite.tasks)))
            if (pair := weighted_at(suite, (first, second), at, seed))
        }
        if AVERAGE in found:
            least = min(found, key=lambda at: found[at].value)
            told = f"{least}: {signed(found[least].interval())}"
            rows.append([words, signed(found[AVERAGE].interval()), told])
    return markdown(["question", "over the six preferences", "where it is least"], rows)


def fronts_table(suite: Suite) -> str:
    """What each method's grid of preferences reaches: its hypervolume, and how monotone it is."""
    seed, skills = SUITES[suite.name].seeds[0], grid_skills(suite.tasks)
    grid, rows, first = even_grid(skills, GRID_STEPS), [], None
    for name in GRIDS:
        found = [
            complete([suite.estimate(name, skill, seed, str(one)) for skill in skills])
            for one in grid
        ]
        points = [dict(zip(skills, point, strict=True)) for point in found if point is not None]
        if len(points) < len(grid):
            continue
        volume, steps = hypervolume(points), monotonicity(grid, points)
        over = "" if first is None else signed(difference(volume, first).interval())
        first = first or volume
        held = f"{steps.within}/{steps.steps}", str(steps.as_measured)
        rows.append([name.removeprefix(GRID), str(volume.interval()), over, *held])
    head = ["method", "hypervolume", "over the first (x 100)"]
    return markdown([*head, "steps that keep it, within", "as measured"], rows)


def aims_table(suite: Suite) -> str:
    """The aims that the study was held to, and what was found, on the seeds that both have."""
    rows = []
    for words, first, second in DIFFERENCES:
        seeds = [seed for seed in suite.seeds_of(first) if seed in suite.seeds_of(second)]
        whole = difference_of(suite, first, second, seeds)
        if whole is not None:
            each = complete([difference_of(suite, first, second, [seed]) for seed in seeds]) or []
            told = " ".join(f"{100 * one.value:+.1f}" for one in each)
            rows.append([words, signed(whole.interval()), told])
    for method in GAPS:
        seeds = suite.seeds_of(method)
        closed = gap_closed(suite, method, seeds)
        if closed is not None:
            each = complete([gap_closed(suite, method, [seed]) for seed in seeds]) or []
            words = f"share of the gap from tuned to single that {method} closes"
            rows.append(
                [words, str(closed.interval()), " ".join(f"{one.value:.2f}" for one in each)]
            )
    return markdown(["question", "points of accuracy, or share", "by seed"], rows)


def difference_of(suite: Suite, first: str, second: str, seeds: Sequence[int]) -> Estimate | None:
    """The first method's average less the second's."""
    pair = complete([suite.average(first, seeds), suite.average(second, seeds)])
    return difference(*pair) if pair else None


def cost_table(suite: Suite) -> str:
    """What the suite's rows took."""
    rows = len({(method, seed) for method, _, _, seed in suite.cells})
    return f"{rows} rows in {suite.seconds / 3600:.1f} CPU-hours, one thread each."


def gap_closed(suite: Suite, method: str, seeds: Sequence[int]) -> Estimate | None:
    """(method - tuned) / (single - tuned)."""
    found = complete([suite.average(name, seeds) for name in (method, "tuned", "single")])
    return combined(found, share_of_gap) if found else None


def share_of_gap(three: Tensor) -> Tensor:
    """(what - from) / (to - from), of those three."""
    return (three[..., 0] - three[..., 1]) / (three[..., 2] - three[..., 1])


def gap_left(three: Tensor) -> Tensor:
    """(to - what) / (to - from), of the same three."""
    return 1 - share_of_gap(three)


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
