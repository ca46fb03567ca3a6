"""Commands of banks: build, inspect, export, push."""

from pathlib import Path
from typing import Annotated

import typer

from dynmerge.cli.app import app
from dynmerge.cli.options import BankFolder, Base, MethodText, PreferenceText, named_sources


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
        bool,
        typer.Option(
            "--replace",
            help="Replace the bank that is there; what it learned for the same factors stays.",
        ),
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
    base: Base = None,
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
    preference: PreferenceText,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="The adapter's new folder.")
    ],
    method: MethodText = None,
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
    preference: PreferenceText,
    to: Annotated[str, typer.Option(metavar="URL", help="The vLLM server's, http://HOST:PORT.")],
    method: MethodText = None,
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
