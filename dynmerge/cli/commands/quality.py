"""Commands of quality: calibrate and evaluate."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from dynmerge.cli.app import app
from dynmerge.cli.options import BankFolder, Base, check_alone, named_sources

MAX_SEED = 2**63 - 1  # torch takes twice that


class Objective(str, Enum):
    """What a calibration learns."""

    distil = "distil"
    entropy = "entropy"
    labels = "labels"


class Form(str, Enum):
    """How what is learned depends on the preference."""

    ratio = "ratio"
    bubbles = "bubbles"
    fixed = "fixed"
    gauss_newton = "gauss-newton"


@app.command()
def calibrate(
    context: typer.Context,
    bank: BankFolder,
    *,
    method: Annotated[
        str | None,
        typer.Option("--method", "-m", help="tara-a, tara-b, core, adamerging, regmean or tuned."),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD",
            help="Instead of --method: forget what was learned for this one. Repeat it.",
        ),
    ] = None,
    objective: Annotated[
        Objective | None,
        typer.Option(
            help="What is learned: the skills' own predictions, which is the default, certainty, or"
            " answers."
        ),
    ] = None,
    form: Annotated[
        Form | None,
        typer.Option(
            help="How it follows a preference, by default ratio; fixed serves one, that of --at;"
            " gauss-newton is found without training."
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(metavar="PREFERENCE", help="Of --form fixed; by default all alike."),
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SKILL=FILE",
            help="A skill's prompts, with or without answers, .jsonl, or texts, .txt. Repeat it."
            " A skill without one makes its own up.",
        ),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SKILL=FILE",
            help="What guards it; by default a quarter of its texts. Not for tuned, which holds all"
            " of them out.",
        ),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SKILL=A,B,..", help="The answers of a skill that chooses among labels."
        ),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="TARA's own settings: docs/calibration.md.")
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="At most this many.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Examples of each skill a step.")] = None,
    rate: Annotated[float | None, typer.Option(min=0, max=1e3, help="The step size.")] = None,
    mu: Annotated[
        float | None, typer.Option(min=1e-6, max=1e6, help="Smooth Tchebycheff's.")
    ] = None,
    pull: Annotated[
        float | None, typer.Option(min=0, max=1e6, help="Of what is learned towards its start.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=MAX_SEED, help="Of all that is drawn; by default 0."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=8, help="How many texts a skill without a file makes up; by default 128."),
    ] = None,
    base: Base = None,
    again: Annotated[
        bool, typer.Option("--again", help="Start afresh where one was stopped half-way.")
    ] = False,
) -> None:
    """Learn from texts how to merge a bank's skills, and write a new version of the bank."""
    if drop:
        from dynmerge.cli.calibrate import drop as drop_calibrations

        check_alone(context, "drop")
        drop_calibrations(bank, drop)
        return
    if method is None:
        raise typer.BadParameter(
            "what to learn, or --drop METHOD to forget it, is missing", param_hint="--method"
        )
    from dynmerge.cli.asked import Asked
    from dynmerge.cli.calibrate import Wanted, labels_of, paths_of, run

    asked = Asked(
        method,
        None if objective is None else objective.value,
        None if form is None else form.value,
        at,
        published,
        steps,
        batch,
        rate,
        mu,
        pull,
        seed,
    )
    wanted = Wanted(
        asked,
        texts=paths_of(named_sources(texts or [], hint="--texts", form="SKILL=FILE")),
        held_out=paths_of(named_sources(held_out or [], hint="--held-out", form="SKILL=FILE")),
        labels=labels_of(named_sources(labels or [], hint="--labels", form="SKILL=A,B")),
        samples=samples,
        base=base,
        again=again,
    )
    run(bank, wanted)


@app.command()
def evaluate(
    bank: BankFolder,
    tasks: Annotated[
        Path,
        typer.Argument(
            metavar="TASKS.yaml", help="Skill -> file, and labels and limit: docs/evaluate.md."
        ),
    ],
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="What is written goes there.")
    ],
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            "-m",
            help="One, or several with commas between; or repeat it. By default what the bank"
            " serves.",
        ),
    ] = None,
    preferences: Annotated[
        list[str] | None,
        typer.Option(
            "--preferences",
            "-p",
            help='Such as "math=0.7, code=0.3", or uniform, corners, grid:STEPS (two or three'
            " skills). Repeat it. By default uniform and corners.",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=100, max=100_000, help="Resamplings for the intervals.")
    ] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamplings.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Examples that run at once.")] = 16,
    base: Base = None,
) -> None:
    """Measure every skill under methods and preferences, with intervals and figures."""
    from dynmerge.cli.evaluate import Wanted, run

    wanted = Wanted(methods or [], preferences or ["uniform", "corners"], samples, seed, batch)
    run(bank, tasks, output, base, wanted)
