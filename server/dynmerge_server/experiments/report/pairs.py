"""Pairs: how strong arms are by votes on two answers side by side (Bradley and Terry 1952).

The log-odds that the first shown wins are its strength less the other's, and a term for being
first. A tie is half a win for each. Pure; knows no log.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.special import expit
from statsmodels.genmod.families import Binomial
from statsmodels.genmod.generalized_linear_model import GLM

from dynmerge_server.experiments.records import POSITIONS, TIE
from dynmerge_server.experiments.report.results import Interval, Pairs, Strength
from dynmerge_server.experiments.report.source import Floats

Vote = tuple[str, str, str, str]  # the first arm, the second, what was voted, the unit or ""

POINTS = dict(zip(POSITIONS, (1.0, 0.0), strict=True)) | {TIE: 0.5}  # of the first shown
MIN_UNITS = 10  # for intervals that allow for votes of one unit being alike

NEVER = "the control was in no comparison yet"
APART = "arms were not all compared with each other, not even through others, in both orders"
TIED = "all votes are ties so far"
ONE_SIDED = "votes go one way only so far, so that strengths have no bounds: more votes are needed"


@dataclass(frozen=True, slots=True, eq=False)
class Votes:
    """Votes as numbers. Columns of `shown` are arms, 1 where first and -1 where second."""

    arms: tuple[str, ...]
    shown: Floats  # (votes, arms)
    points: Floats  # of the first shown
    units: NDArray[np.intp]  # a vote without one has a number of its own
    named: int  # units
    without_unit: int  # votes

    @classmethod
    def of(cls, votes: Sequence[Vote], arms: Sequence[str]) -> "Votes":
        """Of arms that are known."""
        place = {arm: index for index, arm in enumerate(arms)}
        kept = [vote for vote in votes if vote[0] in place and vote[1] in place]
        shown = np.zeros((len(kept), len(arms)))
        rows = np.arange(len(kept))
        shown[rows, [place[first] for first, *_ in kept]] += 1
        shown[rows, [place[second] for _, second, *_ in kept]] -= 1
        points = np.array([POINTS[said] for _, _, said, _ in kept])
        numbers = {unit: index for index, unit in enumerate({unit for *_, unit in kept if unit})}
        units = [numbers.get(unit, len(numbers) + row) for row, (*_, unit) in enumerate(kept)]
        without_unit = sum(not unit for *_, unit in kept)
        named = len(numbers)
        return cls(tuple(arms), shown, points, np.array(units, np.intp), named, without_unit)

    @property
    def each(self) -> NDArray[np.intp]:
        """Comparisons of each arm."""
        counted: NDArray[np.intp] = np.abs(self.shown).sum(axis=0).astype(np.intp)
        return counted

    @property
    def wins(self) -> Floats:
        """Of each arm."""
        first, second = self.shown > 0, self.shown < 0
        won: Floats = self.points @ first + (1 - self.points) @ second
        return won


@dataclass(frozen=True, slots=True)
class Term:
    """One number of a fit, with its interval."""

    value: float
    low: float
    high: float


NOTHING = Term(0.0, 0.0, 0.0)  # the control's, as all others are against it


@dataclass(frozen=True, slots=True)
class Fit:
    """Terms of the arms but the control, then that for being first."""

    terms: tuple[Term, ...]
    clustered: bool


def pairs(given: Sequence[Vote], arms: Sequence[str], control: str, alpha: float) -> Pairs | None:
    """What votes say of arms; intervals of all arms together are wrong at most `alpha` of the time.

    None where there is no vote.
    """
    votes = Votes.of(given, arms)
    if not len(votes.points):
        return None
    counts = dict(zip(arms, votes.each, strict=True))
    met = [arm for arm in arms if counts[arm] and arm != control]
    columns = [votes.shown[:, list(arms).index(arm)] for arm in met]
    design = np.column_stack([*columns, np.ones(len(votes.points))])
    trouble = NEVER if not counts[control] else _trouble(design, votes.points)
    fit = None if trouble else _fit(design, votes, alpha / max(len(met), 1))
    found = dict(zip([*met, control], [*fit.terms[:-1], NOTHING], strict=True)) if fit else {}
    bias = fit.terms[-1] if fit else None
    return Pairs(
        len(votes.points),
        int(np.sum(votes.points == POINTS[TIE])),
        votes.named,
        votes.without_unit,
        tuple(
            _strength(arm, int(counts[arm]), float(won), found.get(arm))
            for arm, won in zip(arms, votes.wins, strict=True)
        ),
        float(expit(bias.value)) if bias else None,
        Interval(float(expit(bias.low)), float(expit(bias.high))) if bias else None,
        fit is not None and fit.clustered,
        trouble,
    )


def _strength(arm: str, comparisons: int, wins: float, term: Term | None) -> Strength:
    if term is None:
        return Strength(arm, comparisons, wins)
    interval = None if term is NOTHING else Interval(term.low, term.high)
    return Strength(arm, comparisons, wins, term.value, interval, float(expit(term.value)))


def _trouble(design: Floats, points: Floats) -> str | None:
    """Why there is no best fit, or not only one."""
    rows = np.unique(np.column_stack([design, points]), axis=0)
    terms, said = rows[:, :-1], rows[:, -1]
    if np.linalg.matrix_rank(terms) < terms.shape[1]:
        return APART
    # One-sided: some direction makes no vote less likely, and one more (Albert and Anderson 1984).
    signed = terms * np.sign(said - 0.5)[:, None]
    decided = said != POINTS[TIE]
    if not decided.any():
        return TIED
    found = linprog(
        -signed[decided].sum(axis=0),
        A_ub=-signed[decided],
        b_ub=np.zeros(decided.sum()),
        A_eq=terms[~decided] if not decided.all() else None,
        b_eq=np.zeros((~decided).sum()) if not decided.all() else None,
        bounds=(-1, 1),
    )
    return ONE_SIDED if -found.fun > 1e-6 else None


def _fit(design: Floats, votes: Votes, alpha: float) -> Fit:
    clustered = votes.named >= max(MIN_UNITS, 2 * design.shape[1])
    how = {"cov_type": "cluster", "cov_kwds": {"groups": votes.units}} if clustered else {}
    fitted = GLM(votes.points, design, family=Binomial()).fit(**how)
    ends = fitted.conf_int(alpha)
    terms = (Term(*map(float, each)) for each in zip(fitted.params, *ends.T, strict=True))
    return Fit(tuple(terms), clustered and not votes.without_unit)
