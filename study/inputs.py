"""Inputs: what a row's numbers depend on, in two digests: its bench's, then its own.

Not the code: whoever changes what a method does measures its rows again (`study.run --again`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from dynmerge.calibration.plan import Plan
from study.bench import Bench
from study.methods import ALL_ROWS
from study.places import grid_skills, places
from study.plans import reference_plan
from study.suites import GRID, GRID_STEPS, OTHER_BANKS, REFERENCES, SUITES


def inputs_of(name: str, bench: Bench) -> str:
    """BENCH-ROW of one row on one bench, 16 hex digits each."""
    examples = [
        f"{split} {skill} {own.digest}"
        for split, skills in sorted(bench.splits.items())
        for skill, own in sorted(skills.items())
    ]
    settled = [bench.pace(one) if isinstance(one, Plan) else one for one in settings(name, bench)]
    ours = [bench.suite, str(bench.seed), bench.bank.digest, *examples]
    return f"{_digest(ours)}-{_digest(map(repr, settled))}"


def bench_of(inputs: str) -> str:
    """The part that all rows of one bench have in common."""
    return inputs.partition("-")[0]


def settings(name: str, bench: Bench) -> tuple[object, ...]:
    """What one row depends on besides its bench."""
    if name in OTHER_BANKS:
        kind, _, method = name.partition("-")
        return method, bench.others[kind]().digest
    if name in REFERENCES:
        return reference_plan(name.removesuffix("-for-each")), _everywhere(bench)
    row = ALL_ROWS.get(name.removeprefix(GRID))
    if row is None:
        return (name,)
    if name.startswith(GRID):
        return *row.settings, GRID_STEPS, grid_skills(bench.bank.names)
    scope = SUITES[bench.suite]
    away = name in scope.away and bench.seed == scope.seeds[0]
    return *row.settings, _everywhere(bench) if away else None


def _everywhere(bench: Bench) -> object:
    return {at: rho.tolist() for at, rho in places(len(bench.bank.names)).items()}


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
