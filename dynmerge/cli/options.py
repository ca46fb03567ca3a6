"""Options: what several commands take, and how NAME=SOURCE is read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer


def _named(base: str | None) -> str | None:
    if base is not None and not base.strip():
        raise typer.BadParameter("it names no model; leave it out for what the bank says")
    return base


BankFolder = Annotated[Path, typer.Argument(metavar="BANK", help="The folder of a bank.")]
Base = Annotated[
    str | None,
    typer.Option(help="The base model; by default what the bank was built on.", callback=_named),
]
PreferenceText = Annotated[
    str, typer.Option("--preference", "-p", help='Such as "math=0.7, code=0.3".')
]
MethodText = Annotated[
    str | None,
    typer.Option("--method", "-m", help="See `dynmerge methods`; by default what the bank serves."),
]


def check_alone(context: typer.Context, option: str) -> None:
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
