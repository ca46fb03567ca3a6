"""Commands of serving: methods and serve."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from dynmerge.cli.app import app
from dynmerge.cli.options import BankFolder, Base


class Engine(str, Enum):
    """What runs the model."""

    embedded = "embedded"
    vllm = "vllm"


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
    base: Base = None,
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
