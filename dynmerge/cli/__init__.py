"""The `dynmerge` command: its words and options. What a command does is in a module of its own,
imported when it runs, because torch and the server take seconds to load.

Results go to stdout, progress and errors to stderr. Exit code 2: refused, for the reason given.
"""

import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from dynmerge import __version__
from dynmerge.cli.console import printable
from dynmerge.errors import DynmergeError

app = typer.Typer(
    help="Serve many LoRA skills of one base model as one model whose mix each request chooses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Engine(str, Enum):
    """What runs the model."""

    embedded = "embedded"
    vllm = "vllm"


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


MAX_SEED = 2**63 - 1  # torch takes twice that

BankFolder = Annotated[Path, typer.Argument(metavar="BANK", help="The folder of a bank.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: a DynmergeError becomes one line on stderr and exit code 2.

    Ctrl-C exits with 130: Typer sees to that.
    """
    try:
        app(arguments)
    except DynmergeError as error:
        print("error:", printable(str(error)), file=sys.stderr)
        sys.exit(2)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def build(
    base: Annotated[str, typer.Argument(help="The base model: a folder or a Hugging Face id.")],
    *,
    adapter: Annotated[
        list[str],
        typer.Option(
            "--adapter",
            "-a",
            metavar="NAME=SOURCE",
            help="A skill's name and its PEFT adapter, a folder or a Hugging Face id. Repeat it.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="BANK", help="The folder to write.")
    ],
    trust_base: Annotated[
        bool,
        typer.Option("--trust-base", help="Take adapters that say they are for another base."),
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the bank that is there.")
    ] = False,
    soup_weights: Annotated[
        Path | None,
        typer.Option(
            "--soup-weights",
            metavar="FILE",
            help="Learned weights for the method lora-soups: JSON, layer -> skill -> weight.",
        ),
    ] = None,
) -> None:
    """Build a bank: adapters of one base model, ready to be merged on request."""
    from dynmerge.cli.build import run

    sources = named_sources(adapter)
    run(base, sources, output, trust_base=trust_base, replace=replace, soups=soup_weights)


@app.command()
def inspect(
    bank: BankFolder,
    *,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it too: .png, .svg or .pdf.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Also what merging has to expect: docs/diagnostics.md.")
    ] = False,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SKILL=FILE",
            help="With --full: a skill's examples, .jsonl or .txt, one option for every skill;"
            " the base model is loaded and its sensitivity to the merge measured.",
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model; by default what the bank was built on.")
    ] = None,
) -> None:
    """Say what a bank holds: its skills, how alike they are, what a merge costs."""
    from dynmerge.cli.inspect import run

    if not full and (texts or base):
        raise typer.BadParameter(
            "it belongs to --full", param_hint="--texts" if texts else "--base"
        )
    if base and not texts:
        raise typer.BadParameter("it belongs to --texts", param_hint="--base")
    examples = named_sources(texts or [], hint="--texts", form="SKILL=FILE")
    run(bank, json=json, plot=plot, full=full, texts=examples, base=base)


@app.command()
def export(
    bank: BankFolder,
    *,
    preference: Annotated[
        str, typer.Option("--preference", "-p", help='Such as "math=0.7, code=0.3".')
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="The adapter's new folder.")
    ],
    method: Annotated[
        str | None,
        typer.Option(
            "--method", "-m", help="See `dynmerge methods`; by default what the bank serves."
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="At most this rank; by default all of the merge.")
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option("--uniform", help="One rank for all modules, for servers that need that."),
    ] = False,
) -> None:
    """Write one merge as an ordinary PEFT adapter, for any server that loads LoRA."""
    from dynmerge.cli.export import run

    run(bank, preference, output, method=method, rank=rank, uniform=uniform)


@app.command()
def push(
    bank: BankFolder,
    *,
    preference: Annotated[
        str, typer.Option("--preference", "-p", help='Such as "math=0.7, code=0.3".')
    ],
    to: Annotated[str, typer.Option(metavar="URL", help="The vLLM server's, http://HOST:PORT.")],
    method: Annotated[
        str | None,
        typer.Option(
            "--method", "-m", help="See `dynmerge methods`; by default what the bank serves."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="At most this rank, for vLLM's --max-lora-rank; by default all."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Its model name there; by default the merge's own.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where its files are kept. vLLM must see them under the same path. By default"
            " BANK-merges, beside the bank.",
        ),
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(metavar="VARIABLE", help="The environment variable with the server's key."),
    ] = None,
) -> None:
    """Have a running vLLM load one merge as an ordinary adapter. It need not know dynmerge."""
    from dynmerge.cli.push import run

    run(
        bank,
        preference,
        to,
        method=method,
        rank=rank,
        name=name,
        folder=folder,
        api_key_env=api_key_env,
    )


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
            metavar="SKILL=FILE", help="What guards it; by default every fourth of its texts."
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
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of all that is drawn.")] = 0,
    samples: Annotated[
        int, typer.Option(min=8, help="How many texts a skill without a file makes up.")
    ] = 128,
    base: Annotated[
        str | None, typer.Option(help="The base model; by default what the bank was built on.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Start afresh where one was stopped half-way.")
    ] = False,
) -> None:
    """Learn from texts how to merge a bank's skills, and write a new version of the bank."""
    if drop:
        from dynmerge.cli.calibrate import drop as drop_calibrations

        _check_alone(context, "drop")
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
    base: Annotated[
        str | None, typer.Option(help="The base model; by default what the bank was built on.")
    ] = None,
) -> None:
    """Measure every skill under methods and preferences, with intervals and figures."""
    from dynmerge.cli.evaluate import Wanted, run

    wanted = Wanted(methods or [], preferences or ["uniform", "corners"], samples, seed, batch)
    run(bank, tasks, output, base, wanted)


@app.command()
def methods() -> None:
    """List the merge methods and their parameters."""
    from dynmerge.cli.methods import run

    run()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    bank: BankFolder,
    *,
    engine: Annotated[
        Engine, typer.Option(help="What runs the model. vllm takes any flag of `vllm serve` too.")
    ] = Engine.embedded,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A TOML file; options here win over it.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model; by default what the bank was built on.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="By default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="By default 8000.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda; not for vllm.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Such as float32 or bfloat16.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve other machines without an API key.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="With vllm: print its command instead of running it.")
    ] = False,
) -> None:
    """Serve a bank over HTTP as OpenAI's API does. DYNMERGE_API_KEY holds the key, if any."""
    if engine is Engine.vllm:
        from dynmerge.cli import serve_vllm

        if device is not None:
            raise typer.BadParameter("vLLM chooses it by its platform", param_hint="--device")
        wanted = serve_vllm.Wanted(bank, config, base, host, port, dtype, insecure)
        serve_vllm.run(wanted, context.args, show=show)
        return
    from dynmerge.cli.serve import run

    if context.args or show:
        unknown = context.args[0] if context.args else "--show"
        raise typer.BadParameter(f"{unknown} is for --engine vllm", param_hint="serve")
    chosen = {"device": device, "dtype": dtype}
    run(bank, config, base=base, host=host, port=port, engine=chosen, insecure=insecure)


def _check_alone(context: typer.Context, option: str) -> None:
    """Raise BadParameter where another option stands beside `option`: it would be ignored."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in ("bank", option) and source is not None and source.name != "DEFAULT":
            other = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"it stands alone, without {other}", param_hint=f"--{option}")


def named_sources(
    pairs: Sequence[str], *, hint: str = "--adapter", form: str = "NAME=SOURCE"
) -> dict[str, str]:
    """Skill name -> source, from `NAME=SOURCE` each."""
    sources: dict[str, str] = {}
    for pair in pairs:
        name, equals, source = pair.partition("=")
        if not (name and equals and source):
            raise typer.BadParameter(f"{pair!r} is not {form}", param_hint=hint)
        if name in sources:
            raise typer.BadParameter(f"{name!r} is named twice", param_hint=hint)
        sources[name] = source
    return sources
