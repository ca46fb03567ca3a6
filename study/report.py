"""Report: the study's cells -> docs/quality.json, its example-by-example record, and the tables of
docs/quality.md.

    python -m study.report

Nothing is chosen here: it reads what `study.run` measured.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from dynmerge.evaluation.bootstrap import Estimate
from study.cells import RECORD
from study.places import CENTRE
from study.suite import DEFAULT, Suite
from study.suites import SUITES
from study.tables import (
    aims_table,
    cost_table,
    elsewhere_table,
    fronts_table,
    methods_table,
    preferences_table,
    regret_table,
)

DOCS = Path(__file__).parents[1] / "docs"
ALIASES = {"default": DEFAULT}
TABLES = {
    "methods": methods_table,
    "preferences": preferences_table,
    "regret": regret_table,
    "elsewhere": elsewhere_table,
    "fronts": fronts_table,
    "aims": aims_table,
    "cost": cost_table,
}


def main() -> None:
    """Write everything."""
    suites = [suite for suite in map(Suite.read, SUITES) if suite.cells]
    quality = {suite.name: quality_of(suite) for suite in suites}
    (DOCS / "quality.json").write_text(json.dumps(quality, indent=1) + "\n", "utf-8")
    (DOCS / "quality-preferences.json").write_text(
        json.dumps({suite.name: preferences_of(suite) for suite in suites}, indent=1) + "\n",
        "utf-8",
    )
    examples = {suite.name: examples_of(suite) for suite in suites}
    packed = gzip.compress(json.dumps(examples, separators=(",", ":")).encode(), mtime=0)
    RECORD.write_bytes(packed)
    page = DOCS / "quality.md"
    text = page.read_text("utf-8") if page.is_file() else ""
    for suite in suites:
        for name, table_of in TABLES.items():
            table = table_of(suite)
            if table:
                text = replaced(text, f"{suite.name}-{name}", table)
    page.write_text(text, "utf-8")


def replaced(text: str, name: str, table: str) -> str:
    """The page with what stands between the marks of `name` put anew; at its end without marks."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    block = f"{begin}\n{table}\n{end}"
    if begin not in text:
        return f"{text.rstrip()}\n\n{block}\n"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return before + block + after


def quality_of(suite: Suite) -> dict[str, object]:
    """Method -> task -> seed -> accuracy and interval, at the uniform preference."""
    names = {name: name for name in suite.methods()} | ALIASES
    return {
        name: {
            task: {
                str(seed): stated(found)
                for seed in suite.seeds
                if (found := suite.estimate(method, task, seed)) is not None
            }
            for task in suite.tasks
        }
        for name, method in names.items()
        if method in suite.methods()
    }


def stated(estimate: Estimate) -> dict[str, object]:
    """As it is written down."""
    interval = estimate.interval()
    return {
        "accuracy": round(interval.value, 5),
        "interval": [round(interval.low, 5), round(interval.high, 5)],
    }


def preferences_of(suite: Suite) -> dict[str, object]:
    """Method -> preference -> task -> seed -> accuracy, away from the centre too."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for (method, at, task, seed), cell in suite.cells.items():
        place = found.setdefault(method, {}).setdefault(at, {}).setdefault(task, {})
        place[str(seed)] = round(cell.accuracy, 5)
    return {method: places for method, places in found.items() if set(places) != {CENTRE}}


def examples_of(suite: Suite) -> list[dict[str, object]]:
    """Every cell, example by example."""
    return [
        {
            "method": method,
            "at": at,
            "task": task,
            "seed": seed,
            "right": cell.right,
            "counts": cell.counts if max(cell.counts) > 1 else 1,
            "nats": round(cell.nats, 3),
            "chosen": cell.chosen,
            "seconds": cell.seconds,
            "inputs": cell.inputs,
        }
        for (method, at, task, seed), cell in suite.cells.items()
    ]


if __name__ == "__main__":
    main()
