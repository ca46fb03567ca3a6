"""Verdict: what a report says in the end, by the primary metric's sequences and nothing else."""

from dynmerge_server.experiments.report.results import (
    Comparison,
    MetricResult,
    SampleRatio,
    Verdict,
)

MISMATCH = (
    "Sample ratio mismatch: arms do not have the units that the weights promise them, so some were "
    "lost or counted twice. No difference is shown until that is explained."
)
UNDECLARED = "No primary metric is declared, so nothing is decided."


def verdict(ratio: SampleRatio, primary: MetricResult | None, control: str) -> Verdict:
    """Which arm is better, or why that is not said."""
    if ratio.red:
        return Verdict("mismatch", MISMATCH)
    if primary is None:
        return Verdict("undeclared", UNDECLARED)
    if primary.trouble:
        return Verdict("few", f"Nothing can be compared: {primary.trouble}.")
    ready = [each for each in primary.comparisons if each.too_few is None]
    if not ready:
        whys = "; ".join(f"{each.arm}: {each.too_few}" for each in primary.comparisons)
        return Verdict("few", f"Not enough units yet to compare with {control}. {whys}.")
    sides = {each.arm: _side(each, primary.better == "higher") for each in ready}
    better = tuple(arm for arm, side in sides.items() if side > 0)
    worse = tuple(arm for arm, side in sides.items() if side < 0)
    if not better and not worse:
        return Verdict("none", f"No difference in {primary.name} is shown yet.")
    said = [f"{_names(better)} better than {control}"] if better else []
    said += [f"{control} is better than {' and '.join(worse)}"] if worse else []
    return Verdict("better", f"By {primary.name}, {'; '.join(said)}.", better, worse)


def _side(comparison: Comparison, higher: bool) -> int:
    """1 for better than the control, -1 for worse, 0 where neither is shown."""
    found = comparison.difference
    if found is None or not found.sequence.excludes_zero:
        return 0
    return 1 if (found.value > 0) == higher else -1


def _names(arms: tuple[str, ...]) -> str:
    return f"{arms[0]} is" if len(arms) == 1 else f"{' and '.join(arms)} are"
