"""`dynmerge inspect`: what a bank holds, as tables, as JSON or as a picture."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

from dynmerge.bank.bank import FactorBank
from dynmerge.bank.inspection import BankReport, PairReport, inspect_bank, readable
from dynmerge.bank.storage import load_bank
from dynmerge.cli.console import line, progress_bar, table
from dynmerge.cli.diagnostics import say_diagnostics
from dynmerge.diagnostics.bank import Diagnostics, diagnose_bank
from dynmerge.merging.demands import default_for
from dynmerge.recipe import MethodChoice

if TYPE_CHECKING:
    from dynmerge.diagnostics.sensitivity import Sensitivity
    from dynmerge.texts.rows import Row

MAX_PAIRS = 12  # lines about pairs, those that differ most from chance


def run(
    folder: Path,
    *,
    json: bool,
    plot: Path | None,
    full: bool,
    texts: Mapping[str, str],
    base: str | None,
) -> None:
    """Print the report on the bank in `folder`, and draw it where asked.

    `full` adds what merging has to expect, and with `texts` (skill -> file) the sensitivity.
    """
    if plot is not None:
        # Imported where it is wanted, because matplotlib loads slowly.
        from dynmerge.bank.plot import check_picture, save_plot

        check_picture(plot)
        if full:
            check_picture(_second(plot))
    bank = load_bank(folder)
    rows = _rows(bank, texts) if texts else {}
    with progress_bar() as start:
        report = inspect_bank(bank, progress=start("comparing"))
        found = diagnose_bank(bank, progress=start("diagnosing")) if full else None
    sensitivity = _sensitivity(folder, bank, rows, base) if rows else None
    if json:
        print(_as_json(report, default_for(bank), found, sensitivity))
    else:
        _say(report)
        _say_learned(report, default_for(bank))
        if found is not None:
            say_diagnostics(found, sensitivity)
    if plot is None:
        return
    save_plot(report, plot)
    drawn = [plot]
    if found is not None:
        from dynmerge.diagnostics.figures import save_figures

        drawn.append(_second(plot))
        save_figures(found, sensitivity, drawn[-1])
    if not json:
        line()
        line(f"drawn   {', '.join(map(str, drawn))}")


def _second(plot: Path) -> Path:
    """Where the picture of what --full adds goes."""
    return plot.with_stem(f"{plot.stem}-full")


def _rows(bank: FactorBank, texts: Mapping[str, str]) -> dict[str, Sequence["Row"]]:
    """Skill -> the rows of its file: all files are read before anything that takes long."""
    from dynmerge.cli.student import check_skills
    from dynmerge.texts.rows import check_alike, check_answered, read_texts

    check_skills(bank, texts, source="--texts")
    found: dict[str, Sequence[Row]] = {name: read_texts(Path(file)) for name, file in texts.items()}
    for rows in found.values():
        check_alike(rows)
        check_answered(rows)
    return found


def _sensitivity(
    folder: Path, bank: FactorBank, rows: Mapping[str, Sequence["Row"]], base: str | None
) -> "Sensitivity":
    """The Jacobian of each skill's entropy on its texts, by the bank's base model."""
    from dynmerge.cli.student import examples_for, open_student
    from dynmerge.diagnostics.sensitivity import measure_sensitivity

    student, model = open_student(folder, bank, base)
    examples = {name: examples_for(model, name, own) for name, own in rows.items()}
    with progress_bar() as start:
        return measure_sensitivity(student, examples, progress=start("differentiating"))


def _as_json(
    report: BankReport,
    default: MethodChoice,
    found: Diagnostics | None,
    sensitivity: "Sensitivity | None",
) -> str:
    more: dict[str, object] = {"default_method": str(default)}
    if found is not None:
        more["diagnostics"] = asdict(found)
    if sensitivity is not None:
        more["sensitivity"] = asdict(sensitivity)
    return dumps({**asdict(report), **more}, indent=2)


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


def _say_learned(report: BankReport, default: MethodChoice) -> None:
    line()
    line(f"serves  {default} where nobody names a method")
    if report.calibrations:
        table(
            ("calibration", "form", "objective", "kept", "start", "best", "digest"),
            [
                (
                    each.method,
                    each.form,
                    *_told(each.objective, each.kept, each.start, each.best),
                    each.digest[:12],
                )
                for each in report.calibrations
            ],
        )


def _told(*values: object) -> list[object]:
    return ["-" if value is None else value for value in values]


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
