"""Run the study: every row on every seed of every suite, two one-thread processes at a time.

    python -m study.run                       # what is not there yet
    python -m study.run --suite encoder --seed 0 --only pico,tuned --again

Results are kept row by row in the cache, so that a run that was stopped goes on where it was. A row
whose adapters, examples or settings changed is measured again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dynmerge.calibration import teachers
from dynmerge.evaluation.scores import Score
from dynmerge.evaluation.simplex import even_grid
from study.apart import run_apart
from study.bench import Bench, Made
from study.cells import Cell, read_cells, write_row
from study.inputs import inputs_of
from study.methods import ALL_ROWS, Row
from study.places import CENTRE, grid_skills, places
from study.plans import reference_plan
from study.suites import GRID, GRID_STEPS, GRIDS, OTHER_BANKS, REFERENCES, SUITES
from study.trained import trained

# A row's name and the bench -> its cells.
Measure = Callable[[str, Bench], Iterator[Cell]]


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=tuple(SUITES))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--only", help="these rows, with commas between")
    parser.add_argument("--again", action="store_true", help="also rows that are there")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    only = frozenset(options.only.split(",")) if options.only else frozenset(MEASURES)
    wanted = [
        (suite, seed)
        for suite, scope in SUITES.items()
        for seed in scope.seeds
        if options.suite in (None, suite) and options.seed in (None, seed)
    ]
    if not wanted:
        seeds = {name: scope.seeds for name, scope in SUITES.items()}
        parser.error(f"no suite has the seed {options.seed} (there are: {seeds})")
    if unknown := sorted(only - set(MEASURES)):
        parser.error(f"no row {unknown[0]!r} (there are: {', '.join(MEASURES)})")
    if len(wanted) == 1:
        torch.set_num_threads(1)
        run(*wanted[0], only, options.again)
        return
    extra = ["--only", options.only] if options.only else []
    if options.again:
        extra.append("--again")
    calls = [["--suite", suite, "--seed", str(seed), *extra] for suite, seed in wanted]
    run_apart("study.run", calls, options.jobs)


def run(suite: str, seed: int, only: frozenset[str], again: bool = False) -> None:
    """Every row that is not there yet under what it depends on now, one after the other."""
    bench = replace(open_bench(suite, seed), keep=not again)
    done = {(cell.method, cell.inputs) for cell in read_cells(suite, seed)}
    for name in filter(only.__contains__, SUITES[suite].rows(seed)):
        inputs = inputs_of(name, bench)
        if (name, inputs) in done and not again:
            continue
        started = time.process_time()
        cells = list(MEASURES[name](name, bench))
        seconds = round(time.process_time() - started, 1)
        write_row(suite, seed, [replace(cell, seconds=seconds, inputs=inputs) for cell in cells])
        centre = [cell.accuracy for cell in cells if cell.at == CENTRE]
        mean = sum(centre) / len(centre) if centre else float("nan")
        say = f"{suite} {seed} {name}: {mean:.4f} ({seconds:.0f} CPU-s)"
        print(say, file=sys.stderr, flush=True)


def open_bench(suite: str, seed: int) -> Bench:
    """The bench of one seed. Imported here: a suite loads its model and its packages."""
    if suite == "encoder":
        from study import encoder

        return encoder.bench(seed)
    from study import generative

    return generative.bench(seed)


def alone(name: str, bench: Bench) -> Iterator[Cell]:
    """Every skill under its own adapter."""
    for task, only in enumerate(torch.eye(len(bench.bank.names))):
        yield from scored(bench, name, CENTRE, teachers.alone(bench.bank, task), only, None)


def by_row(row: Row, name: str, bench: Bench) -> Iterator[Cell]:
    """One method at the centre, and elsewhere where that is asked for."""
    maker, chosen = row.make(bench)
    scope = SUITES[bench.suite]
    elsewhere = name in scope.away and bench.seed == scope.seeds[0]
    for where, rho in places(len(bench.bank.names)).items():
        if where == CENTRE or elsewhere:
            yield from scored(bench, name, where, maker(rho), rho, chosen)


def for_each(name: str, bench: Bench) -> Iterator[Cell]:
    """Coefficients optimised for one preference after the other."""
    plan = reference_plan(name.removesuffix("-for-each"))
    for where, rho in places(len(bench.bank.names)).items():
        found = trained(bench, plan, at=rho)
        yield from scored(bench, name, where, found.best.cores(rho), rho, {"checks": found.checks})


def on_grid(name: str, bench: Bench) -> Iterator[Cell]:
    """One method on an even grid between three skills; those alone count as their adapters."""
    maker, chosen = ALL_ROWS[name.removeprefix(GRID)].make(bench)
    skills = bench.bank.names
    three = torch.tensor([float(skill in grid_skills(skills)) for skill in skills])
    for preference in even_grid(grid_skills(skills), GRID_STEPS):
        made = maker(torch.tensor(preference.vector(skills)))
        yield from scored(bench, name, str(preference), made, three, chosen)


def of_other_bank(name: str, bench: Bench) -> Iterator[Cell]:
    """Adapters that were trained another way."""
    from study.other_banks import other_scores

    for skill, score in other_scores(bench, name).items():
        yield cell(name, CENTRE, skill, score, None)


def scored(
    bench: Bench, name: str, at: str, made: Made, rho: Tensor, chosen: object
) -> Iterator[Cell]:
    """Cells of the skills that `rho` does not leave out."""
    for skill, score in bench.test(made, rho).items():
        yield cell(name, at, skill, score, chosen)


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


MEASURES: Mapping[str, Measure] = {
    "single": alone,
    **{name: partial(by_row, row) for name, row in ALL_ROWS.items()},
    **dict.fromkeys(REFERENCES, for_each),
    **dict.fromkeys(GRIDS, on_grid),
    **dict.fromkeys(OTHER_BANKS, of_other_bank),
}


if __name__ == "__main__":
    main()
