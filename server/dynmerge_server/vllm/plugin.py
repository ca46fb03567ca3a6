"""The endpoint plugin: what vLLM's server loads by the entry point `vllm.endpoint_plugins`.

It is loaded where VLLM_PLUGINS names it. It adds a middleware and routes to vLLM's application,
then refuses to serve what dynmerge could not do right.
"""

import atexit
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

from dynmerge.adapters.base_model import BaseModel
from dynmerge.bank.outline import Outline
from dynmerge.bank.storage import read_manifest
from dynmerge.engines.vllm.config import CONTROL, KEY, PluginConfig
from dynmerge.engines.vllm.forms import FORMS, Form
from dynmerge.engines.vllm.logs import speak_as_vllm
from dynmerge.errors import ConfigError, DynmergeError
from dynmerge_server.config import ServerConfig
from dynmerge_server.errors import SchemaError, on_error
from dynmerge_server.experiments.keeper import Keeper, broken_guardrails
from dynmerge_server.experiments.lab import open_lab
from dynmerge_server.experiments.routes import ROUTES as EXPERIMENT_ROUTES
from dynmerge_server.vllm.metrics import Metrics, collapse
from dynmerge_server.vllm.middleware import MergeMiddleware
from dynmerge_server.vllm.residents import Residents
from dynmerge_server.vllm.routes import ROUTES
from dynmerge_server.vllm.served import Served, Terms
from dynmerge_server.vllm.settings import read_settings
from dynmerge_server.vllm.skills import Skills
from dynmerge_server.vllm.state import Door
from dynmerge_server.vllm.turn import take_turns
from dynmerge_server.vllm.versions import Versions
from dynmerge_server.vllm.workers import Answer, Workers


class Plugin:
    """dynmerge in vLLM's API server, as vLLM's EndpointPlugin."""

    name = "dynmerge"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the middleware, innermost, and the routes, before vLLM's."""
        app.add_middleware(MergeMiddleware)
        app.router.routes[:0] = [*ROUTES, *EXPERIMENT_ROUTES]
        for kind in (DynmergeError, SchemaError):
            app.add_exception_handler(kind, on_error)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Open the bank and let vLLM's handlers find merges. Raises ConfigError or BankError."""
        from vllm.lora.request import LoRARequest

        speak_as_vllm()
        vllm_config = engine_client.vllm_config
        plugin = _configured(vllm_config)
        _check(vllm_config, args)
        names = tuple(path.name for path in state.openai_serving_models.base_model_paths)
        config = read_settings(plugin.settings, names, _api_keys(args))
        state.dynmerge = await _open(engine_client, plugin, config, names)
        state.lab = state.dynmerge.lab
        if state.lab is not None:
            # vLLM has no hook for its end.
            atexit.register(Keeper(state.lab, broken_guardrails).close)
        collapse(engine_client, lambda: state.dynmerge.versions.outline.names)
        take_turns(state.openai_serving_models, LoRARequest)


def make() -> Plugin:
    """The plugin."""
    return Plugin()


def _configured(vllm_config: Any) -> PluginConfig:
    plugin = PluginConfig.read(vllm_config.additional_config)
    if plugin is None:
        raise ConfigError(
            "dynmerge is in VLLM_PLUGINS but has no bank: give vLLM "
            f"""--additional-config '{{"{KEY}": {{"bank": "FOLDER"}}}}'"""
        )
    return plugin


def _check(vllm_config: Any, args: Namespace) -> None:
    """Raise ConfigError where vLLM was started so that merges could not be served."""
    from vllm import envs

    if vllm_config.lora_config is None:
        raise ConfigError("merges run where vLLM has LoRA: give it --enable-lora")
    extension = vllm_config.parallel_config.worker_extension_cls
    if extension != CONTROL:
        given = f"not {extension}" if extension else "which is missing"
        raise ConfigError(f"the workers need --worker-extension-cls {CONTROL}, {given}")
    root = args.root_path or ""
    if root and ("/v1/".startswith(root) or not root.startswith("/") or root.endswith("/")):
        # vLLM's own check of API keys takes such a root off the front of other paths too.
        raise ConfigError(f"--root-path {root!r}: give one such as /models, or none")
    if args.lora_modules or vllm_config.lora_config.default_mm_loras:
        raise ConfigError(
            "vLLM's own adapters do not run beside dynmerge: put what --lora-modules names into "
            "the bank"
        )
    if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        raise ConfigError(
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING is for vLLM's own adapters, which do not run beside "
            "dynmerge: unset it, and set adapter_root in the settings to load skills"
        )


def _api_keys(args: Namespace) -> Sequence[str]:
    from vllm import envs

    return [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]


async def _open(
    engine: Any, plugin: PluginConfig, config: ServerConfig, names: tuple[str, ...]
) -> Door:
    from vllm.v1.engine.exceptions import EngineDeadError

    vllm_config, core = engine.vllm_config, engine.engine_core
    workers = Workers(engine, EngineDeadError)
    room = _share(await workers.ask("dynmerge_stats"), core.client_count)
    outline = Outline.of_manifest(read_manifest(plugin.bank))
    model, most = vllm_config.model_config, vllm_config.lora_config.max_loras
    own_rank = plugin.slots(outline, model.dtype.itemsize, most).own_rank
    terms = Terms(config, names, model.max_model_len, room, own_rank)
    offer = partial(Served.of, terms=terms)
    residents = Residents(room, core.client_index, core.client_count)
    versions = Versions(plugin.bank, workers, offer, core.client_index, residents.forget)
    await versions.open()
    return Door(
        versions,
        residents,
        workers,
        Metrics(names[0]),
        _skills(plugin, config, versions, model),
        open_lab(config.experiments, lambda: versions.served.preferences),
    )


def _share(stats: Sequence[Answer], count: int) -> dict[Form, int]:
    """This process's part of the slots that all workers have: nobody counts over all processes."""
    room = {form: min(each["slots"][form][1] for each in stats) // count for form in FORMS}
    if not room["diagonal"]:
        raise ConfigError(f"{count} API processes share --max-loras: give at least {count}")
    return room


def _skills(
    plugin: PluginConfig, config: ServerConfig, versions: Versions, model: Any
) -> Skills | None:
    if config.adapter_root is None:
        return None
    if not config.adapter_root.is_dir():
        raise ConfigError(f"adapter_root: there is no folder {config.adapter_root}")
    base = partial(BaseModel.open, model.model, revision=model.revision)
    return Skills(versions, config.adapter_root, base, trust_base=plugin.trust_base)
