"""Run the study: every row on every seed of every suite, two one-thread processes at a time.

    python -m study.run                       # what is not there yet, then the report
    python -m study.run --suite encoder --seed 0 --only pico,tuned

Results are kept row by row in the cache, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from dynmerge.evaluation.scores import Score
from dynmerge.evaluation.simplex import even_grid
from study.bench import Bench, Maker
from study.cells import Cell, cells_file, read_cells
from study.methods import ALL, FORM_ROWS, ROWS, Row, single, trained
from study.places import CENTRE, grid_skills, places
from study.plans import reference_plan

SUITES: Mapping[str, Sequence[int]] = {"encoder": (0, 1, 2), "generative": (20, 21, 22)}
GRID, GRID_STEPS = "grid:", 4
GRID_ROWS = ("mean", "linear-p4", "adamerging-rho-scaled", "tara-a-map")
# Adapters trained another way: for the generative suite there are none.
OTHERS = {"encoder": ("joint", "osrm-mean", "osrm-p4"), "generative": ()}
FIRST = {suite: seeds[0] for suite, seeds in SUITES.items()}
# A generative row costs fifty encoder's: these on every seed, all others on the first alone.
GENERATIVE = [
    "zero-shot",
    "mean",
    "mean-gamma",
    "linear-p4",
    "ratio-start",
    "tuned",
    "s-only",
    "pico",
    "pico-tuned",
    "tsv-m-p6",
    "adamerging-map",
    "tara-a-map",
    "core-map",
]
# And these away from the centre, where every preference costs as much again.
GENERATIVE_AWAY = ("mean", "tara-a-map", "adamerging-map", "core-map")
# These ask one question each, of the first encoder seed: what would another setting have gained?
ONCE = ("tara-a-tchebycheff", "tara-a-published", "tara-b-map", *FORM_ROWS)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=tuple(SUITES))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--only", help="these rows, with commas between")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    only = set(options.only.split(",")) if options.only else None
    wanted = [
        (suite, seed)
        for suite, seeds in SUITES.items()
        for seed in seeds
        if options.suite in (None, suite) and options.seed in (None, seed)
    ]
    if len(wanted) == 1:
        torch.set_num_threads(1)
        run(*wanted[0], only)
        return
    extra = ["--only", options.only] if options.only else []
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda pair: run_apart(*pair, extra), wanted))


def run_apart(suite: str, seed: int, extra: Sequence[str]) -> None:
    """One seed in a process of one thread."""
    command = [sys.executable, "-m", "study.run", "--suite", suite, "--seed", str(seed), *extra]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def run(suite: str, seed: int, only: set[str] | None) -> None:
    """Every row that is not there yet, one after the other."""
    rows = rows_of(suite, seed)
    done = {cell.method for cell in read_cells(suite, seed)}
    todo = [
        name
        for name in ("single", *rows, *OTHERS[suite], *references(suite, seed))
        if name not in done and (only is None or name in only)
    ]
    if not todo:
        return
    bench = open_bench(suite, seed)
    for name in todo:
        started = time.process_time()
        cells = list(measured(bench, name, rows))
        spent = time.process_time() - started
        with cells_file(suite, seed).open("a", encoding="utf-8") as file:
            for cell in cells:
                file.write(json.dumps(cell.to_json(spent)) + "\n")
        centre = [cell.accuracy for cell in cells if cell.at == CENTRE]
        mean = sum(centre) / len(centre) if centre else float("nan")
        print(f"{suite} {seed} {name}: {mean:.4f} ({spent:.0f} CPU-s)", file=sys.stderr, flush=True)


def rows_of(suite: str, seed: int) -> dict[str, Row]:
    """The rows measured on one seed."""
    every = {**ROWS, **FORM_ROWS}
    if suite == "generative":
        left_out = set(ONCE) if seed == FIRST[suite] else set(every) - set(GENERATIVE)
    else:
        left_out = set() if seed == FIRST[suite] else set(ONCE)
    return {name: row for name, row in every.items() if name not in left_out}


def open_bench(suite: str, seed: int) -> Bench:
    """The bench of one seed. Imported here: a suite loads its model and its packages."""
    if suite == "encoder":
        from study import encoder

        return encoder.bench(seed)
    from study import generative

    return generative.bench(seed)


def references(suite: str, seed: int) -> list[str]:
    """Rows of the encoder's first seed: optimised for one preference each, and fronts on a grid."""
    if (suite, seed) != ("encoder", FIRST["encoder"]):
        return []
    each = [f"{method}-for-each" for method in ("tara-a", "core")]
    return each + [f"{GRID}{name}" for name in GRID_ROWS]


def measured(bench: Bench, name: str, rows: Mapping[str, Row]) -> Iterator[Cell]:
    """The cells of one row."""
    if name == "single":
        for task, skill in enumerate(bench.bank.names):
            rho = torch.nn.functional.one_hot(torch.tensor(task), len(bench.bank.names)).float()
            found = bench.test(single(bench, task), rho)
            yield cell(name, CENTRE, skill, found[skill], None)
    elif name.endswith("-for-each"):
        for where, rho in places(len(bench.bank.names)).items():
            plan = reference_plan(name.removesuffix("-for-each"), tuple(rho.tolist()))
            best, _ = trained(bench, plan)
            for skill, score in bench.test(best.cores(rho), rho).items():
                yield cell(name, where, skill, score, None)
    elif name.startswith(GRID):
        yield from on_grid(bench, name, rows[name.removeprefix(GRID)])
    elif name in OTHERS[bench.suite]:
        from study.other_banks import other_scores

        for skill, score in other_scores(bench, name).items():
            yield cell(name, CENTRE, skill, score, None)
    else:
        row = rows[name]
        maker, chosen = row.make(bench)
        everywhere = (
            row.where == ALL
            and bench.seed == FIRST[bench.suite]
            and (bench.suite != "generative" or name in GENERATIVE_AWAY)
        )
        yield from at_preferences(bench, name, maker, chosen, everywhere)


def on_grid(bench: Bench, name: str, row: Row) -> Iterator[Cell]:
    """One method on an even grid between three skills; those alone count as their adapters."""
    maker, chosen = row.make(bench)
    names = bench.bank.names
    for preference in even_grid(grid_skills(names), GRID_STEPS):
        rho = torch.tensor(preference.vector(names))
        made = maker(rho)
        with_all = torch.tensor([float(one in grid_skills(names)) for one in names])
        for skill, score in bench.test(made, with_all).items():
            yield cell(name, str(preference), skill, score, chosen)


def at_preferences(
    bench: Bench, name: str, maker: Maker, chosen: object, everywhere: bool
) -> Iterator[Cell]:
    """One maker at the centre, or at all preferences."""
    for where, rho in places(len(bench.bank.names)).items():
        if where == CENTRE or everywhere:
            for skill, score in bench.test(maker(rho), rho).items():
                yield cell(name, where, skill, score, chosen)


def cell(method: str, at: str, task: str, score: Score, chosen: object) -> Cell:
    """A score as it is kept."""
    return Cell(
        method,
        at,
        task,
        [int(right) for right in score.right],
        [int(count) for count in score.counts],
        float(score.nats.sum()),
        chosen,
    )


if __name__ == "__main__":
    main()
