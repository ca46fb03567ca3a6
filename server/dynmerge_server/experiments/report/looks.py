"""Looks: the primary metric as it came to be, at moments spread evenly over the run. Pure.

A look takes the units that had come by then with all that is known of them now.
"""

import numpy as np

from dynmerge_server.experiments.report.compare import difference
from dynmerge_server.experiments.report.results import Estimate, Look
from dynmerge_server.experiments.report.samples import Sample, samples
from dynmerge_server.experiments.report.table import Column, Table

LOOKS = 30


def looks(table: Table, column: Column | None, alpha: float) -> tuple[Look, ...]:
    """At most LOOKS of them, the last with all units; `alpha` is of all arms together.

    Without a column there are units only.
    """
    if not len(table.time):
        return ()
    first, last = float(table.time[0]), float(table.time[-1])
    moments = np.unique(np.linspace(first, last, LOOKS))
    ends = np.searchsorted(table.time, moments, side="right")
    ends[-1] = len(table.time)
    level = alpha / (len(table.arms) - 1)
    return tuple(
        Look(
            float(moment),
            tuple(int(n) for n in np.bincount(table.arm[:end], minlength=len(table.arms))),
            _differences(samples(table, column, int(end)), table.control, level) if column else (),
        )
        for moment, end in zip(moments, ends, strict=True)
    )


def _differences(
    arms: tuple[Sample | None, ...], control: int, alpha: float
) -> tuple[Estimate | None, ...]:
    """Of all arms but the control, in their order; None where a look is too early."""
    others = arms[:control] + arms[control + 1 :]
    return tuple(difference(arms[control], arm, alpha) for arm in others)
