"""App: what the commands are registered with."""

from typing import Annotated

import typer

from dynmerge import __version__

app = typer.Typer(
    help="Serve many LoRA skills of one base model as one model whose mix each request chooses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
