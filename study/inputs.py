"""Inputs: what a row's numbers depend on, as a digest: adapters, examples and the row's settings.

Not the code: whoever changes what a method does measures its rows again (`study.run --again`).
"""

from __future__ import annotations

import hashlib

from dynmerge.calibration.plan import Plan
from study.bench import Bench
from study.methods import FORM_ROWS, ROWS
from study.plans import reference_plan
from study.suites import GRID, GRID_STEPS, OTHER_BANKS, REFERENCES, SUITES


def inputs_of(name: str, bench: Bench) -> str:
    """16 hex digits for one row on one bench."""
    examples = [
        f"{split} {skill} {own.digest}"
        for split, skills in sorted(bench.splits.items())
        for skill, own in sorted(skills.items())
    ]
    settled = [bench.pace(one) if isinstance(one, Plan) else one for one in settings(name, bench)]
    known = [bench.suite, str(bench.seed), bench.bank.digest, *examples, *map(repr, settled)]
    return hashlib.sha256("\0".join(known).encode()).hexdigest()[:16]


def settings(name: str, bench: Bench) -> tuple[object, ...]:
    """What one row depends on besides its bench."""
    if name in OTHER_BANKS:
        kind, _, method = name.partition("-")
        return method, bench.others[kind]().digest
    if name in REFERENCES:
        return (reference_plan(name.removesuffix("-for-each")),)
    row = {**ROWS, **FORM_ROWS}.get(name.removeprefix(GRID))
    if row is None:
        return (name,)
    scope = SUITES[bench.suite]
    away = name in scope.away and bench.seed == scope.seeds[0]
    return (*row.settings, GRID_STEPS if name.startswith(GRID) else 0, away)
