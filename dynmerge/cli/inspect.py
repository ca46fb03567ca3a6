"""`dynmerge inspect`: what a bank holds, as tables, as JSON or as a picture."""

from collections import Counter
from pathlib import Path

from dynmerge.bank.inspection import BankReport, PairReport, inspect_bank, readable
from dynmerge.bank.storage import load_bank
from dynmerge.cli.console import line, progress_bar, table

MAX_PAIRS = 12  # lines about pairs, those that differ most from chance


def run(folder: Path, *, json: bool, plot: Path | None) -> None:
    """Print the report on the bank in `folder`, and draw it where asked."""
    if plot is not None:
        # Imported where it is wanted, because matplotlib loads slowly.
        from dynmerge.bank.plot import check_picture, save_plot

        check_picture(plot)
    with progress_bar() as start:
        report = inspect_bank(load_bank(folder), progress=start("comparing"))
    if json:
        print(report.to_json())
    else:
        _say(report)
    if plot is not None:
        save_plot(report, plot)
        if not json:
            line()
            line(f"drawn   {plot}")


def _say(report: BankReport) -> None:
    size = report.bytes
    line(f"base    {report.base}, fingerprint {report.fingerprint[:12]}")
    line(f"digest  {report.digest[:12]}")
    merge = f"{readable(size.merge_bf16)} in bf16, {readable(size.merge_fp32)} in fp32"
    line(f"modules {len(report.modules)}, cores {_cores(report)}")
    line(f"bytes   {readable(size.factors)} of factors in fp32; one merge {merge}")
    line()
    table(
        ("skill", "rank", "modules", "norm", "effective rank", "digest", "source"),
        [
            (
                task.name,
                ", ".join(map(str, task.ranks)),
                task.modules,
                task.norm,
                task.effective_rank,
                task.digest[:12],
                task.provenance.get("source", ""),
            )
            for task in report.tasks
        ],
    )
    line()
    line(f"equal shares of all: effective rank {report.merge_effective_rank:.3f}")
    if report.pairs:
        _say_pairs(report)


def _cores(report: BankReport) -> str:
    """The shapes that occur, most frequent first."""
    shapes = Counter((module.p, module.q) for module in report.modules)
    return ", ".join(f"{p} x {q} ({count})" for (p, q), count in shapes.most_common())


def _say_pairs(report: BankReport) -> None:
    line()
    line("overlap minus chance (0: no more alike than random subspaces)")
    pairs = sorted(report.pairs, key=_distance, reverse=True)
    table(
        ("pair", "A: reads", "B: writes", "shared modules"),
        [
            (
                f"{pair.first}, {pair.second}",
                f"{pair.A.excess:+.3f}" if pair.A else "-",
                f"{pair.B.excess:+.3f}" if pair.B else "-",
                pair.modules,
            )
            for pair in pairs[:MAX_PAIRS]
        ],
    )
    if len(pairs) > MAX_PAIRS:
        line(f"and {len(pairs) - MAX_PAIRS} pairs nearer to chance: see --json")


def _distance(pair: PairReport) -> float:
    return max((abs(side.excess) for side in (pair.A, pair.B) if side), default=-1.0)
