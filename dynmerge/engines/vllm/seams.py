"""Seams: everything of vLLM that dynmerge replaces or builds on, checked before it is touched.

vLLM is used as it is; one name is replaced (`register` in this package). What is listed here is
internal to vLLM and may change with a release: a name that is gone, or takes something else, is an
error that says so, never a guess.
"""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points, version
from typing import Any

from packaging.version import InvalidVersion, Version

from dynmerge.engines.vllm.config import KEY, PluginConfig
from dynmerge.errors import ConfigError

OLDEST, NEWEST = Version("0.30"), Version("0.34")  # the newest is the first that is not supported

RUNNER = "vllm.v1.worker.lora_model_runner_mixin"
REPLACED = "LRUCacheWorkerLoRAManager"
PLUGINS, ENDPOINTS = "VLLM_PLUGINS", "vllm.endpoint_plugins"


@dataclass(frozen=True, slots=True)
class Seam:
    """A name of vLLM and, where it is called or overridden, the parameters it takes."""

    module: str
    name: str
    parameters: tuple[str, ...]


_LAYERS = "vllm.lora.layers"
_REPLACE = ("source_layer", "lora_config", "packed_modules_list", "model_config")
SEAMS = (
    Seam(RUNNER, f"{REPLACED}.__init__", ("self", "vllm_config", "device", "embedding_modules")),
    Seam(RUNNER, f"{REPLACED}.create_lora_manager", ("self", "model", "vllm_config")),
    Seam(RUNNER, f"{REPLACED}.set_active_adapters", ("self", "requests", "mapping")),
    Seam(RUNNER, f"{REPLACED}.add_dummy_lora", ("self", "lora_request", "rank")),
    Seam(RUNNER, f"{REPLACED}.add_adapter", ("self", "lora_request")),
    Seam(RUNNER, f"{REPLACED}.remove_adapter", ("self", "adapter_id")),
    Seam(RUNNER, f"{REPLACED}.remove_all_adapters", ("self",)),
    Seam(RUNNER, f"{REPLACED}.list_adapters", ("self",)),
    Seam(RUNNER, f"{REPLACED}.get_dummy_lora_warmup_rank", ("self", "default_rank")),
    Seam(RUNNER, f"{REPLACED}.supports_tower_connector_lora", ("self",)),
    *(
        Seam(_LAYERS, f"{layer}.{method}", parameters)
        for layer in (
            "ColumnParallelLinearWithLoRA",
            "MergedColumnParallelLinearWithLoRA",
            "QKVParallelLinearWithLoRA",
            "MergedQKVParallelLinearWithLoRA",
            "RowParallelLinearWithLoRA",
            "ReplicatedLinearWithLoRA",
        )
        for method, parameters in (
            ("can_replace_layer", _REPLACE),
            ("create_lora_weights", ("self", "max_loras", "lora_config", "model_config")),
            ("_apply_lora_to_output", ("self", "x", "output")),
            ("slice_lora_a", ("self", "lora_a")),
            ("slice_lora_b", ("self", "lora_b")),
        )
    ),
    Seam("vllm.lora.utils", "_all_lora_classes", ()),
    Seam("vllm.lora.utils", "replace_submodule", ("model", "module_name", "new_module")),
    Seam("vllm.lora.utils", "process_packed_modules_mapping", ("model",)),
)


def check_seams() -> None:
    """Raise ConfigError unless this vLLM is one that dynmerge was made for."""
    if isinstance(getattr(import_module(RUNNER), REPLACED, None), _Choice):
        return  # it was checked when the name was replaced
    _check_version(_installed())
    for seam in SEAMS:
        _check(seam)


def replace_manager() -> None:
    """Make model runners ask `manager_of` for their LoRA manager."""
    runner = import_module(RUNNER)
    stock = getattr(runner, REPLACED)
    if not isinstance(stock, _Choice):
        setattr(runner, REPLACED, _Choice(stock))


class _Choice:
    """Stands where vLLM's class stood, and is called as it was."""

    def __init__(self, stock: Callable[..., Any]) -> None:
        self._stock = stock

    def __call__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's own manager, or ours where the configuration names a bank."""
        from dynmerge.engines.vllm.worker import Tenancy

        config = PluginConfig.read(vllm_config.additional_config)
        if config is None:
            return self._stock(vllm_config, *args, **kwargs)
        check_endpoint(os.environ.get(PLUGINS, ""))
        return Tenancy(config, vllm_config, *args, **kwargs)


def check_endpoint(plugins: str) -> None:
    """Raise ConfigError unless vLLM's server loads the plug-in's half of it.

    vLLM only logs one that it cannot load: requests would then be answered by the base model.
    """
    if KEY not in plugins.split(","):
        raise ConfigError(
            f"{PLUGINS} does not name {KEY}: without that vLLM's server would not read what "
            f"requests ask for. Set {PLUGINS}={KEY}"
        )
    halves = entry_points(group=ENDPOINTS, name=KEY)
    if not halves:
        raise ConfigError(f"the package dynmerge is not installed whole: it has no {ENDPOINTS}")
    try:
        for each in halves:
            each.load()
    except ImportError as error:
        raise ConfigError(f"dynmerge's part of vLLM's server cannot be loaded: {error}") from error


def _installed() -> str:
    return version("vllm")


def _check_version(installed: str) -> None:
    try:
        found = Version(Version(installed).base_version)  # a release candidate is what it becomes
    except InvalidVersion:
        raise ConfigError(f"dynmerge does not know vLLM {installed}: {_range()}") from None
    if not OLDEST <= found < NEWEST:
        raise ConfigError(f"dynmerge does not support vLLM {installed}: {_range()}")


def _range() -> str:
    return f"it takes >={OLDEST},<{NEWEST}"


def _check(seam: Seam) -> None:
    try:
        found: object = import_module(seam.module)
        for part in seam.name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        raise ConfigError(f"{_this_vllm()} has no {seam.module}.{seam.name}") from None
    _check_parameters(seam, found)


def _check_parameters(seam: Seam, found: object) -> None:
    if not callable(found):
        return  # a name that is read
    # A class method is bound, and its decorators hide what they wrap.
    taken = _parameters(found)
    wanted = tuple(name for name in seam.parameters if name != "self" or "self" in taken)
    anything = "kwargs" in taken
    if not anything and taken[: len(wanted)] != wanted:
        raise ConfigError(
            f"{_this_vllm()}: {seam.name} takes ({', '.join(taken)}), "
            f"where dynmerge knows ({', '.join(wanted)})"
        )


def _parameters(found: Callable[..., object]) -> tuple[str, ...]:
    return tuple(inspect.signature(found).parameters)


def _this_vllm() -> str:
    return f"vLLM {_installed()} is not as dynmerge knows it"
