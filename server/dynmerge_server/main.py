"""serve: a bank folder and a configuration become a listening server."""

import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dynmerge.adapters.base_model import BaseModel
from dynmerge.bank.storage import load_bank, read_manifest
from dynmerge.engines.transformers.engine import TransformersEngine
from dynmerge.errors import BaseModelError
from dynmerge.runtime import Runtime
from dynmerge_server.app import create_app
from dynmerge_server.config import SamplingDefaults, ServerConfig, explain
from dynmerge_server.experiments.keeper import kept
from dynmerge_server.listener import close_all, listen, make_server, shown

logger = logging.getLogger("dynmerge.server")


def serve(bank_folder: Path, config: ServerConfig) -> None:
    """Serve a bank until a signal ends it; prints `ready http://HOST:PORT` once it answers.

    Raises BankError, BaseModelError or ConfigError for what cannot be served.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    sockets = listen(config.host, config.port)  # before the model, whose loading takes long
    try:
        runtime, sampling = open_runtime(bank_folder, config)
        try:
            config = replace(config, sampling=config.sampling.over(sampling))
            app = create_app(runtime, config)
            with kept(app.state.lab):
                make_server(app, config, partial(_announce, config.host)).run(sockets)
            app.state.serving.prompts.close()
        finally:
            runtime.close()
    finally:
        close_all(sockets)


def open_runtime(bank_folder: Path, config: ServerConfig) -> tuple[Runtime, SamplingDefaults]:
    """A bank's runtime on the base model it was built on, and how that model is best sampled.

    Raises BankError when the base model found is another one.
    """
    manifest = read_manifest(bank_folder)
    source = config.base or manifest.base.source
    if source is None:
        raise BaseModelError(
            f"the bank does not say where its base model {manifest.base.name} is: give --base"
        )
    base = BaseModel.open(source)
    bank = load_bank(bank_folder)
    engine = TransformersEngine.from_base(base, bank, config.engine)
    runtime = Runtime(
        bank, engine, cache_bytes=config.cache_bytes, prepared_bytes=config.prepared_bytes
    )
    return runtime, sampling_of(base.folder)


def sampling_of(folder: Path) -> SamplingDefaults:
    """What a model's generation_config.json recommends, if anything; vLLM reads it too."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return SamplingDefaults()
    names = SamplingDefaults.__dataclass_fields__
    try:
        said: dict[str, Any] = json.loads(path.read_bytes())
        chosen = {name: said[name] for name in names if said.get(name) is not None}
        return TypeAdapter(SamplingDefaults).validate_python(chosen)
    except ValidationError as error:
        raise BaseModelError(f"its generation_config.json: {explain(error)}") from None
    except (OSError, ValueError, AttributeError) as error:
        raise BaseModelError(f"its generation_config.json cannot be read: {error}") from error


def _announce(host: str, port: int) -> None:
    print(f"ready http://{shown(host, port)}", flush=True)
