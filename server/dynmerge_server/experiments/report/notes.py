"""Notes: what a reader has to know of how numbers came to be, in sentences. Pure."""

from collections.abc import Iterator

import numpy as np
from scipy.stats import chi2_contingency

from dynmerge_server.experiments.report.results import Counts, Pairs
from dynmerge_server.experiments.report.srm import RED
from dynmerge_server.experiments.report.table import Column, Table
from dynmerge_server.experiments.report.words import when

CAVEATS = (
    "The verdict is by the confidence sequence, which holds however often somebody looks. The "
    "fixed interval holds for one look that was planned beforehand.",
    "Both hold for many units; below 100 in an arm nothing is decided.",
    "Arms share one machine, so latency is not independent between them: a slow arm makes the "
    "others slower.",
    "Times are compared over warm requests only, those whose merge was there; guardrails see all.",
    "Exploratory metrics are corrected for how many they are; they never decide.",
    "Feedback that is still to come may change a unit's number.",
)


def notes(table: Table, pairs: Pairs | None) -> tuple[str, ...]:
    """What is special about the units of one experiment."""
    left_out = _left_out(table.counts, len(table.arm))
    return (*left_out, *_placed(table), *_changed(table), *_answers(table), *_votes(pairs))


def _left_out(counts: Counts, units: int) -> Iterator[str]:
    if counts.two_arms:
        share = counts.two_arms / (counts.two_arms + units)
        yield (
            f"{counts.two_arms} units ({share:.2%}) were seen in more than one arm and are left "
            "out; check how units are named."
        )
    if counts.earlier:
        yield f"{counts.earlier} units came before the weights last changed and are left out."
    if counts.forced:
        yield f"{counts.forced} requests named their arm themselves and are left out."
    if counts.holdout:
        yield f"{counts.holdout} units are held out of all arms."


def _placed(table: Table) -> Iterator[str]:
    counts = table.counts
    flagged = len(table.arm) - sum(counts.assigned)
    if flagged:
        yield (
            f"{flagged} units were placed by your own flags, whose shares are not known here; "
            "the check of the sample ratio is of the others."
        )
    if sum(counts.cold):
        each = ", ".join(f"{arm} {n}" for arm, n in zip(table.arms, counts.cold, strict=True))
        yield f"Requests that waited for their merge: {each}."


def _changed(table: Table) -> Iterator[str]:
    for each in table.changed:
        yield (
            f"{each.arm} was served with {each.merges} different merges: since {when(each.since)}, "
            f"{each.requests} requests were not served with the first, so a preset, the default or "
            "the bank changed, and the arm has no one meaning."
        )


def _votes(pairs: Pairs | None) -> Iterator[str]:
    if pairs is not None and pairs.without_unit:
        yield (
            f"{pairs.without_unit} of {pairs.votes} votes named no unit; they may be one person's, "
            "and count as if each were of somebody else."
        )


def _answers(table: Table) -> Iterator[str]:
    for column in table.columns:
        if column.words:
            yield (
                f"{column.words} values of {column.metric.outcome} are words, which are left out: "
                "a metric needs numbers or booleans."
            )
        if _differs(table, column):
            yield (
                f"Arms differ in how many of their units have any value of {column.metric.name}: "
                "who has one may differ too, and the comparison with it."
            )


def _differs(table: Table, column: Column) -> bool:
    """Whether units of one arm answer more often, surely."""
    arms = [column.answered[table.arm == index] for index in range(len(table.arms))]
    counted = np.array([[each.sum(), (~each).sum()] for each in arms if len(each)])
    if len(counted) < 2 or not counted.sum(axis=0).all():
        return False
    return bool(chi2_contingency(counted).pvalue < RED)
