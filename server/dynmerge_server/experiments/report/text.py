"""Text: a report for a terminal. Nothing that came from outside is obeyed as markup."""

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dynmerge_server.experiments.report import words
from dynmerge_server.experiments.report.report import Report
from dynmerge_server.experiments.report.results import MetricResult, Pairs

COLORS = {"better": "bold green", "mismatch": "bold red"}


def text(report: Report) -> Group:
    """All of it, for a rich console."""
    return Group(*_parts(report))


def _parts(report: Report) -> Iterator[RenderableType]:
    yield _line(f"{report.experiment}: {report.state}, {words.when(report.time)}", "bold")
    yield _line(report.verdict.text, COLORS.get(report.verdict.decision, "bold"))
    yield _line(words.ratio(report.sample_ratio), "red" if report.sample_ratio.red else "")
    yield _line("Units", "bold")
    yield _units(report)
    for metric in report.metrics:
        yield from _metric(metric, report.control)
    yield from (_line(words.power(each, _rate(report))) for each in report.power)
    if report.guardrails:
        yield _line("Guardrails", "bold")
        for each in report.guardrails:
            yield _line(each.text, "bold red" if each.state == "broken" else "")
    if report.pairs:
        yield from _pairs(report.pairs)
    yield _line("History", "bold")
    yield _history(report)
    yield from (_line(f"* {each}") for each in (*report.notes, *report.caveats))


def _units(report: Report) -> Table:
    rows = [
        (
            arm + (" (control)" if arm == report.control else ""),
            f"{report.weights[arm]:.1%}",
            str(report.units[index]),
            f"{report.sample_ratio.expected[index]:.1f}",
            str(report.counts.requests[index]),
        )
        for index, arm in enumerate(report.arms)
    ]
    return _table(("arm", "weight", "units", "expected", "requests"), rows)


def _metric(metric: MetricResult, control: str) -> Iterator[RenderableType]:
    yield _line(f"{metric.name} ({metric.role}, {metric.better} is better)", "bold")
    means = [
        (
            each.arm,
            str(each.units),
            words.share(each.answered),
            words.number(each.mean, metric.rate),
        )
        for each in metric.arms
    ]
    yield _table(("arm", "units", "with a value", "mean"), means)
    sure = words.level(metric)
    rows = [
        (
            each.arm,
            words.gap(each.difference.value if each.difference else None, metric.rate),
            *words.tests(each, metric.rate),
            words.remark(each),
        )
        for each in metric.comparisons
    ]
    columns = (
        f"against {control}",
        "difference",
        f"sequence, {sure}",
        "p",
        f"fixed, {sure}",
        "p" if metric.role == "primary" else "p (Holm)",
        "relative, by the sequence",
        "",
    )
    yield _table(columns, rows)
    yield _line(words.corrected(metric))


def _pairs(pairs: Pairs) -> Iterator[RenderableType]:
    yield _line(f"Side by side: {words.voters(pairs)}", "bold")
    rows = [
        (
            each.arm,
            str(each.comparisons),
            f"{each.wins:g}",
            words.number(each.strength, False),
            words.span(each.interval, False),
            words.share(each.against_control),
        )
        for each in pairs.arms
    ]
    columns = ("arm", "comparisons", "wins", "strength", "interval", "wins against the control")
    yield _table(columns, rows)
    yield from (_line(each) for each in words.of_pairs(pairs))


def _history(report: Report) -> Table:
    rows = [
        (
            str(each.number),
            words.when(each.time),
            each.source,
            each.state,
            "; ".join(each.changes),
            each.reason,
        )
        for each in report.history
    ]
    return _table(("revision", "time", "by", "state", "changes", "reason"), rows)


def _rate(report: Report) -> bool:
    return bool(report.metrics) and report.metrics[0].rate


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    made = Table(box=None, pad_edge=False)
    for column in columns:
        made.add_column(Text(words.plain(column)), overflow="fold")
    for row in rows:
        made.add_row(*(Text(words.plain(cell)) for cell in row))
    return made


def _line(told: str, style: str = "") -> Text:
    return Text(words.plain(told), style)
