"""Assignment: the arm that an experiment's hash gives a unit, the same everywhere and for ever.

Knows no time, no log and no unit that was seen before: whether an experiment runs, how much traffic
it has now and who keeps an earlier arm is decided by those who ask.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from dynmerge_server.experiments.buckets import Range, chosen, place, ranges
from dynmerge_server.experiments.declaration import Experiment


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a unit falls. It has an arm if it is `assigned`, and only then."""

    kind: Literal["assigned", "holdout", "outside"]
    arm: str | None = None


HOLDOUT = Placement("holdout")
OUTSIDE = Placement("outside")


def arm_of(
    experiment: Experiment, unit: str, phase: int = 0, traffic: float | None = None
) -> Placement:
    """Namespace, then holdout, then arm, each by a hash of its own. No traffic is the declared one.

    The seeds are `namespace:NAME`, `holdout:NAME` and the experiment's own or else its name, which
    in a phase K after the first is followed by `:K`.
    """
    part = experiment.namespace
    if part and not part.start <= place(f"namespace:{part.name}", unit) < part.end:
        return OUTSIDE
    holdout = experiment.holdout
    if holdout and place(f"holdout:{holdout.name}", unit) < holdout.share:
        return HOLDOUT
    seed = experiment.seed or experiment.name
    where = place(f"{seed}:{phase}" if phase else seed, unit)
    share = experiment.traffic if traffic is None else traffic
    index = chosen(where, _parts(tuple(experiment.weights.values()), share))
    return OUTSIDE if index is None else Placement("assigned", list(experiment.arms)[index])


@lru_cache(1024)
def _parts(weights: tuple[float, ...], traffic: float) -> tuple[Range, ...]:
    return ranges(weights, traffic)
