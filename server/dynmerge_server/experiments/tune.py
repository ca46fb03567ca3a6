"""Tune: which preferences to try next, by what experiments have seen so far. Optimisation, no test.

A Gaussian process over the simplex of skills, with each arm's mean and the known variance of that
mean, and the batch of preferences with the most expected improvement on the arms there were:
qLogNEI (Ament et al. 2023, arXiv:2310.20708). Joint Thompson sampling explores more, and in
simulation needed about two rounds more. Reads the log and writes nothing; experiments of different
weeks are taken as one.
"""

import re
import sqlite3
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from itertools import count as counted
from math import sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dynmerge.errors import ConfigError, ExperimentError
from dynmerge.preference import Preference, check_skill_name
from dynmerge_server.experiments.course import Course
from dynmerge_server.experiments.declaration import MAX_ARMS, Metric
from dynmerge_server.experiments.proposals import LEVEL, Estimate, Proposal, Proposals, Tried
from dynmerge_server.experiments.report.source import PLACED, course_of, courses
from dynmerge_server.experiments.report.table import Table, compared

if TYPE_CHECKING:
    from torch import Tensor

LEAST_ARMS = 3
LEAST_UNITS = 2  # of an arm, for a variance
LEAST_WEIGHT = 0.005  # of a skill in a proposal; less is left out
SAME = 0.01  # two preferences none of whose weights differs by more are one to compare
DRAWS = 1024  # preferences that are considered, beside corners, edges and the centre
NEAR = 30.0  # how close to the best a quarter of them are: a Dirichlet's concentration
SAMPLES = 256  # of the posterior, for the improvement to be expected
LEAST_NOISE = 1e-5  # of the variance between arms; without any the fit is not stable
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)

Rows = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Observed:
    """One arm: how many units, the mean of their numbers, and that mean's variance."""

    arm: str  # as experiment/arm
    preference: Preference
    units: int
    mean: float
    variance: float


def propose(
    connection: sqlite3.Connection,
    experiment: str,
    *,
    experiments: Sequence[str] = (),
    count: int = 3,
    seed: int = 0,
    skills: Sequence[str] | None = None,
) -> Proposals:
    """`count` preferences to try after `experiment`, by its primary metric. One `seed`, one answer.

    `experiments` are others that inform, with the same primary metric. `skills` are what may be
    mixed (`base` among them); None is those that arms had. Raises ExperimentError where there is
    nothing to go by, UnknownExperiment, and ConfigError where BoTorch is not installed.
    """
    if not 1 <= count < MAX_ARMS:
        raise ExperimentError(f"count is {count}; it is from 1 to {MAX_ARMS - 1}", "count")
    family = [course_of(connection, name) for name in dict.fromkeys([experiment, *experiments])]
    metric = _primary(family)
    method = _method(connection, family)
    left_out: list[str] = []
    observed = _observed(connection, family, metric, left_out)
    names = _skills(observed, skills)
    _check_enough(observed, len(names), metric, left_out)
    surface = _Surface(observed, names, 1 if metric.better == "higher" else -1)
    tried = _tried(observed, surface)
    better = min if metric.better == "lower" else max
    best = better(tried, key=lambda each: each.estimate.mean)
    choices = _choices(names, tried, best.preference, np.random.default_rng(seed))
    chosen = surface.most_promising(choices, [each.preference for each in tried], count, seed)
    return Proposals(
        base=family[0].experiment,
        name=_next_name(experiment, courses(connection)),
        metric=metric,
        method=method if _declares_method(family) else None,
        skills=tuple(names),
        experiments=tuple(course.experiment.name for course in family),
        seed=seed,
        best=best,
        proposals=tuple(
            Proposal(each, surface.estimate(each), surface.exploit(each, best.preference))
            for each in chosen
        ),
        tried=tuple(tried),
        left_out=tuple(left_out),
    )


class _Surface:
    """The metric over the simplex, as far as it is known. Larger is better inside of here."""

    def __init__(self, observed: Sequence[Observed], skills: Sequence[str], sign: int) -> None:
        try:
            from botorch.models import SingleTaskGP
            from botorch.optim.fit import fit_gpytorch_mll_scipy
            from gpytorch.mlls import ExactMarginalLogLikelihood
        except ImportError:
            message = "BoTorch is not installed: pip install 'dynmerge[experiments]'"
            raise ConfigError(message) from None

        self._skills = skills
        self._sign = sign
        points = self._rows([each.preference for each in observed])
        means = points.new_tensor([[sign * each.mean] for each in observed])
        noise = points.new_tensor([[each.variance] for each in observed])
        floor = LEAST_NOISE * float(means.var())
        self._model = SingleTaskGP(points, means, noise.clamp_min(floor))
        # Not fit_gpytorch_mll, whose second attempts draw from the random numbers of everybody.
        fit_gpytorch_mll_scipy(ExactMarginalLogLikelihood(self._model.likelihood, self._model))
        self._model.eval()

    def estimate(self, preference: Preference) -> Estimate:
        """In the metric's own units."""
        mean, covariance = self._posterior([preference])
        middle, reach = self._sign * mean[0], Z * sqrt(max(covariance[0, 0], 0.0))
        return Estimate(float(middle), float(middle - reach), float(middle + reach))

    def exploit(self, preference: Preference, best: Preference) -> float:
        """The share of the expected improvement on `best` that certainty would leave."""
        mean, covariance = self._posterior([preference, best])
        gain = float(mean[0] - mean[1])
        variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
        if gain <= 0:
            return 0.0
        spread = sqrt(max(variance, 1e-300))
        standard = NormalDist()
        expected = gain * standard.cdf(gain / spread) + spread * standard.pdf(gain / spread)
        return min(gain / expected, 1.0)

    def most_promising(
        self, choices: Sequence[Preference], tried: Sequence[Preference], count: int, seed: int
    ) -> list[Preference]:
        """Those that promise the most over the tried, one chosen after the other."""
        import torch
        from botorch.acquisition.logei import qLogNoisyExpectedImprovement
        from botorch.optim.optimize import optimize_acqf_discrete
        from botorch.sampling.normal import SobolQMCNormalSampler

        sampler = SobolQMCNormalSampler(torch.Size([SAMPLES]), seed=seed)
        improvement = qLogNoisyExpectedImprovement(
            self._model, self._rows(tried), sampler, prune_baseline=False
        )
        rows = self._rows(choices)
        found, _ = optimize_acqf_discrete(improvement, min(count, len(choices)), rows)
        return [choices[int((rows == row).all(-1).nonzero()[0])] for row in found]

    def _posterior(self, preferences: Sequence[Preference]) -> tuple[Rows, Rows]:
        import torch
        from botorch.posteriors.gpytorch import GPyTorchPosterior

        with torch.no_grad():
            posterior = self._model.posterior(self._rows(preferences))
        assert isinstance(posterior, GPyTorchPosterior)  # as standardising keeps it
        distribution = posterior.distribution
        return distribution.mean.numpy(), distribution.covariance_matrix.numpy()

    def _rows(self, preferences: Sequence[Preference]) -> "Tensor":
        """(preferences, skills), float64."""
        import torch

        return torch.tensor(
            [each.vector(self._skills) for each in preferences], dtype=torch.float64
        )


def _primary(family: Sequence[Course]) -> Metric:
    metrics = {course.experiment.name: course.experiment.primary for course in family}
    for name, metric in metrics.items():
        if metric is None:
            raise ExperimentError(f"experiment {name} has no primary metric to tune by")
    first, *others = metrics.items()
    for name, metric in others:
        if metric != first[1]:
            raise ExperimentError(
                f"experiments {first[0]} and {name} have different primary metrics, "
                f"{_metric(first[1])} and {_metric(metric)}: tune by experiments that share one"
            )
    assert first[1] is not None
    return first[1]


def _metric(metric: Metric | None) -> str:
    return f"{metric.name} ({metric.better} is better)" if metric else "none"


def _method(connection: sqlite3.Connection, family: Sequence[Course]) -> str | None:
    """The one method that all arms were merged by; None where nobody was served yet."""
    found: dict[str, str] = {}
    for course in family:
        name = course.experiment.name
        for arm, method in connection.execute(
            f"SELECT DISTINCT arm, method FROM exposures WHERE experiment = ? AND {PLACED}", (name,)
        ):
            found.setdefault(str(method), f"{name}/{arm}")
    if len(found) > 1:
        listed = ", ".join(f"{method} ({arm})" for method, arm in sorted(found.items()))
        raise ExperimentError(f"arms were merged by different methods: {listed}; tune by one")
    return next(iter(found), None)


def _declares_method(family: Sequence[Course]) -> bool:
    return any(arm.method is not None for each in family for arm in each.experiment.arms.values())


def _observed(
    connection: sqlite3.Connection, family: Sequence[Course], metric: Metric, left_out: list[str]
) -> list[Observed]:
    """All arms of which there is a mean; the others go to `left_out`."""
    found: list[tuple[str, Preference, Rows]] = []
    now = time.time()
    for course in family:
        table = compared(connection, course, [metric], now)
        _check_ratio(course, table)
        served = _served(connection, course.experiment.name)
        for index, arm in enumerate(table.arms):
            name = f"{course.experiment.name}/{arm}"
            texts = served.get(arm, [])
            values = table.columns[0].now[table.arm == index]
            values = values[~np.isnan(values)]
            if len(texts) > 1:
                left_out.append(f"{name} was served with different preferences: {'; '.join(texts)}")
            elif len(values) < LEAST_UNITS:
                left_out.append(f"{name} has {metric.name} of {len(values)} units")
            else:
                found.append((name, _preference(name, texts[0]), values))
    if not found:
        return []
    freedom = [len(values) - 1 for _, _, values in found]
    variances = [float(values.var(ddof=1)) for _, _, values in found]
    pooled = float(np.average(variances, weights=freedom))
    # Units that happen to agree do not make a mean certain: one more is counted as all units vary.
    return [
        Observed(
            name,
            preference,
            len(values),
            float(values.mean()),
            (free * variance + pooled) / (free + 1) / len(values),
        )
        for (name, preference, values), free, variance in zip(
            found, freedom, variances, strict=True
        )
    ]


def _check_ratio(course: Course, table: Table) -> None:
    """Raise ExperimentError where units were lost or counted twice: arms are then not alike."""
    try:
        from dynmerge_server.experiments.report.srm import sample_ratio
    except ImportError:
        raise ConfigError("SciPy is not installed: pip install 'dynmerge[experiments]'") from None

    weights = [course.experiment.weights[arm] for arm in table.arms]
    ratio = sample_ratio(table.counts.assigned, weights)
    if ratio.red:
        counted = ", ".join(
            f"{arm} {units} of {expected:.1f}"
            for arm, units, expected in zip(table.arms, ratio.units, ratio.expected, strict=True)
        )
        raise ExperimentError(
            f"experiment {course.experiment.name} has a sample ratio mismatch, units that were "
            f"lost or counted twice ({counted} expected): its arms cannot be ranked"
        )


def _served(connection: sqlite3.Connection, experiment: str) -> dict[str, list[str]]:
    """The preferences that were applied, by arm."""
    served: dict[str, list[str]] = {}
    for arm, preference in connection.execute(
        f"SELECT DISTINCT arm, preference FROM exposures WHERE experiment = ? AND {PLACED} "
        "ORDER BY arm, preference",
        (experiment,),
    ):
        served.setdefault(str(arm), []).append(str(preference))
    return served


def _preference(arm: str, text: str) -> Preference:
    preference = Preference.parse(text, allow_negative=True, source=f"arm {arm}")
    if preference.is_raw:
        raise ExperimentError(
            f"arm {arm} has the raw preference {text}: only a mix of skills, which sums to 1, can "
            "be tuned"
        )
    return preference


def _skills(observed: Sequence[Observed], given: Sequence[str] | None) -> list[str]:
    used = sorted({name for each in observed for name in each.preference.weights})
    if given is None:
        return used
    for name in given:
        check_skill_name(name, "skills")
    names = sorted(set(given))
    for each in observed:
        for name in each.preference.weights:
            if name not in names:
                raise ExperimentError(
                    f"arm {each.arm} has the skill {name}, which is not in skills: "
                    f"{', '.join(names)}",
                    "skills",
                )
    return names


def _check_enough(
    observed: Sequence[Observed], skills: int, metric: Metric, left_out: Sequence[str]
) -> None:
    different = len({each.preference for each in observed})
    needed = max(LEAST_ARMS, skills)
    more = f" (left out: {'; '.join(left_out)})" if left_out else ""
    if different < needed:
        raise ExperimentError(
            f"{different} different preferences have {metric.name} of {LEAST_UNITS} units or more, "
            f"and tuning {max(skills, 2)} skills needs {needed}{more}"
        )
    if len({each.mean for each in observed}) == 1 and not any(each.variance for each in observed):
        raise ExperimentError(f"{metric.name} is {observed[0].mean:g} for every unit of every arm")


def _tried(observed: Sequence[Observed], surface: _Surface) -> list[Tried]:
    """By preference, in the order in which they come."""
    arms: dict[Preference, list[Observed]] = {}
    for each in observed:
        arms.setdefault(each.preference, []).append(each)
    return [
        Tried(
            preference,
            tuple(each.arm for each in theirs),
            sum(each.units for each in theirs),
            surface.estimate(preference),
        )
        for preference, theirs in arms.items()
    ]


def _choices(
    skills: Sequence[str], tried: Sequence[Tried], best: Preference, rng: np.random.Generator
) -> list[Preference]:
    """Points of the simplex on the grid, each once, none of them as good as tried already."""
    points = [
        Preference.of(dict(zip(skills, row, strict=True))) for row in _points(skills, best, rng)
    ]
    there = np.array([each.preference.vector(skills) for each in tried])
    return [
        each
        for each in dict.fromkeys(points)
        if np.abs(there - each.vector(skills)).max(axis=1).min() > SAME
    ]


def _points(
    skills: Sequence[str], best: Preference, rng: np.random.Generator
) -> Iterator[list[float]]:
    """Corners, the centre, edges, then draws from everywhere, from near faces and near the best."""
    size = len(skills)
    corners = np.eye(size)
    edges = [
        share * one + (1 - share) * other
        for one, other in combinations(corners, 2)
        for share in (0.25, 0.5, 0.75)
    ]
    near = 0.5 + NEAR * np.array(best.vector(skills))
    draws = [
        rng.dirichlet(np.ones(size), DRAWS // 2),
        rng.dirichlet(np.full(size, 0.4), DRAWS // 4),
        rng.dirichlet(near, DRAWS // 4),
    ]
    for row in np.concatenate([corners, np.full((1, size), 1 / size), edges, *draws]):
        yield np.where(row < min(LEAST_WEIGHT, row.max()), 0.0, row).tolist()


def _next_name(experiment: str, known: Container[str]) -> str:
    stem = re.sub(r"-\d+$", "", experiment)[:56]
    return next(name for number in counted(2) if (name := f"{stem}-{number}") not in known)
