"""SRM: whether arms have as many units as the weights promise them (sample ratio mismatch). Pure.

Where they have not, units were lost or counted twice, and what is left cannot be compared.
"""

from collections.abc import Sequence

from scipy import stats

from dynmerge_server.experiments.report.results import SampleRatio

RED = 0.001


def sample_ratio(units: Sequence[int], weights: Sequence[float]) -> SampleRatio:
    """By a chi-square test of units of each arm against weights that sum to 1."""
    total = sum(units)
    expected = tuple(total * weight for weight in weights)
    open_ = [(n, e) for n, e in zip(units, expected, strict=True) if e > 0]
    if sum(n for n, _ in open_) < total:
        return SampleRatio(tuple(units), expected, 0.0, True)  # units where none can be
    if total == 0 or len(open_) < 2:
        return SampleRatio(tuple(units), expected, None, False)
    p = float(stats.chisquare([n for n, _ in open_], [e for _, e in open_]).pvalue)
    return SampleRatio(tuple(units), expected, p, p < RED)
