"""Commands of experiments: those that ask a running server, and those that read its log."""

from pathlib import Path
from typing import Annotated

import typer

from dynmerge.cli.app import app

group = typer.Typer(no_args_is_help=True, help="A/B experiments over preferences.")
app.add_typer(group, name="experiments")

Name = Annotated[str, typer.Argument(metavar="EXPERIMENT")]
Server = Annotated[
    str, typer.Option("--server", help="Of dynmerge; DYNMERGE_API_KEY holds its key, if any.")
]
LogFile = Annotated[Path, typer.Option("--log", metavar="FILE", help="The log of experiments.")]
HERE = "http://127.0.0.1:8000"


@group.command("list")
def list_(server: Server = HERE) -> None:
    """What a server runs, and how its log does."""
    from dynmerge.cli.experiments import show_all

    show_all(server)


@group.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="TOML with [experiments.NAME].")],
) -> None:
    """Read a file of declarations, and say what is wrong with it. Asks no server."""
    from dynmerge.cli.experiments import check_file

    check_file(file)


@group.command()
def start(name: Name, server: Server = HERE) -> None:
    """Give arms from now on."""
    from dynmerge.cli.experiments import post

    post(server, name, "start")


@group.command()
def pause(name: Name, server: Server = HERE) -> None:
    """Give no arms until it is started again; who had one will have it again."""
    from dynmerge.cli.experiments import post

    post(server, name, "pause")


@group.command()
def stop(name: Name, server: Server = HERE) -> None:
    """Give no arms any more, for good."""
    from dynmerge.cli.experiments import post

    post(server, name, "stop")


@group.command()
def ramp(
    name: Name,
    traffic: Annotated[float, typer.Argument(min=0, max=1, help="A share, such as 0.5.")],
    server: Server = HERE,
) -> None:
    """Change how many units take part; more moves nobody from their arm."""
    from dynmerge.cli.experiments import post

    post(server, name, "ramp", {"traffic": traffic})


@group.command()
def report(
    name: Name,
    log: LogFile,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one page with plots, too.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON instead of tables.")] = False,
) -> None:
    """What an experiment has shown so far."""
    from dynmerge.cli.experiments import show_report

    show_report(name, log, html, as_json=json)


@group.command()
def export(
    log: LogFile,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER")],
    experiment: Annotated[str | None, typer.Option(help="Only this one.")] = None,
) -> None:
    """Write exposures and outcomes as Parquet."""
    from dynmerge.cli.experiments import export_log

    export_log(log, output, experiment)


@group.command()
def forget(
    unit: Annotated[str, typer.Argument(metavar="UNIT", help="As requests name it.")],
    server: Server = HERE,
) -> None:
    """Delete all that a server's log has of a unit."""
    from dynmerge.cli.experiments import forget_unit

    forget_unit(server, unit)


@app.command()
def tune(
    name: Name,
    log: LogFile,
    also: Annotated[
        list[str] | None, typer.Option(help="Another experiment of the same metric; repeatable.")
    ] = None,
    skill: Annotated[
        list[str] | None, typer.Option(help="What may be mixed; by default what arms had.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=31, help="Proposals.")] = 3,
    seed: Annotated[int, typer.Option(help="The same seed, the same proposals.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The next experiment.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON instead of text.")] = False,
) -> None:
    """Propose the preferences to try next. Optimisation, not a test."""
    from dynmerge.cli.experiments import propose_next

    propose_next(name, log, also or (), skill, count, seed, output, as_json=json)
