"""The configuration gate: adapter_config.json -> LoraSettings, or a refusal. Opens no weights.

Every setting of PEFT's LoraConfig is honoured (a field of LoraSettings), inert (it cannot change
what a trained adapter does) or refused; a setting nobody here knows is refused unless it is empty.
"""

import json
import math
import stat
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import pydantic
from pydantic import FiniteFloat, PositiveInt

from dynmerge.adapters.pattern import Pattern, shown
from dynmerge.errors import AdapterError

CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20

# They act in training only, or say who made the adapter; the tensors on disk decide the rest:
# fan_in_fan_out (factors are (r, d_in) and (d_out, r) for Linear and Conv1D alike) and
# ensure_weight_tying (it concerns embeddings, whose tensors are refused).
INERT = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)

# Empty or false means not used; anything else is refused with this reason.
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "use_dora": "DoRA rescales the base weight, which no low-rank update can express",
        "kasa_config": "KaSA changes the base weights",
        "use_qalora": "QALoRA pools the layer's input",
        "use_bdlora": "BD-LoRA stores block-diagonal factors",
        "arrow_config": "Arrow routes every token among adapters",
        "alora_invocation_tokens": "activated LoRA applies to part of the prompt only",
        "monteclora_config": "MonteCLoRA adds sampled updates",
        "velora_config": "VeLoRA keeps projections beside the factors",
        "megatron_config": "Megatron layers are not Transformers layers",
        "layer_replication": "the base model would have to grow layers",
        "target_parameters": "updates of bare parameters, such as fused experts, are not supported",
        "trainable_token_indices": "it changes token embeddings, which all skills share",
        "modules_to_save": "it replaces whole modules of the base model, which all skills share",
        "lora_bias": "a bias in lora_B is not part of a low-rank update",
    }
)

_INIT_HINT = (
    "changes the base weights in training; convert the adapter with PEFT's"
    " save_pretrained(..., path_initial_model_for_weight_conversion=...) to a plain LoRA"
)
_HARMLESS_INIT = ("gaussian", "eva", "orthogonal", "mica")
_TASKS = (None, "CAUSAL_LM")


Number = TypeVar("Number", int, float)


class LoraSettings(pydantic.BaseModel, strict=True, frozen=True, extra="ignore"):
    """The settings that decide what an adapter's tensors mean: PEFT's names, PEFT's meaning."""

    r: PositiveInt
    lora_alpha: FiniteFloat
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, FiniteFloat] | None = None
    use_rslora: bool = False
    base_model_name_or_path: str | None = None

    @cached_property
    def _ranks(self) -> list[tuple[Pattern, int]]:
        return [(_suffix(name), rank) for name, rank in (self.rank_pattern or {}).items()]

    @cached_property
    def _alphas(self) -> list[tuple[Pattern, float]]:
        return [(_suffix(name), alpha) for name, alpha in (self.alpha_pattern or {}).items()]

    def rank(self, module: str) -> int:
        """The rank the configuration states for `module`."""
        return _first_match(self._ranks, module, self.r)

    def scaling(self, module: str) -> float:
        """Its alpha / r, or alpha / sqrt(r) for rsLoRA, by the alpha and rank of `module`."""
        rank = self.rank(module)
        alpha = _first_match(self._alphas, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str, *, output_embedding: bool = False) -> bool:
        """Whether PEFT would put this adapter on the linear layer `module`."""
        if _named_by(self.exclude_modules or [], module):
            return False
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            return not output_embedding
        if isinstance(self.target_modules, str) or module in self.target_modules:
            return _named_by(self.target_modules, module)  # full names hold in every layer
        return _named_by(self.target_modules, module) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        layers = self.layers_to_transform
        if layers is None or layers == []:
            return True
        index = self._layer_index(module)
        return index == layers if isinstance(layers, int) else index in layers

    def _layer_index(self, module: str) -> int | None:
        names = (
            [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        )
        # Lazy: the first number after a container's name is the layer; later ones are within it.
        stated = [rf"(?:^|.*?\.){name}\.(?P<index>\d+)\." for name in names or () if name]
        for pattern in stated or [r".*?\.[^.]*\.(?P<index>\d+)\."]:
            found = Pattern.of(pattern).match(module)
            if found:
                index = found["index"]
                return None if index is None else int(index)
        return None


def read_settings(folder: Path) -> LoraSettings:
    """What `folder`'s adapter_config.json says, if all of it can be honoured; else AdapterError."""
    fields = _read_json(folder / CONFIG)
    _check_kind(fields)
    _check_refused(fields)
    _check_init(fields.get("init_lora_weights"))
    settings = _validated(fields)
    _check_layers(settings)
    return settings


def read_file(path: Path, limit: int) -> bytes:
    """All of an ordinary file of at most `limit` bytes; FileNotFoundError if there is none."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would never end
            raise AdapterError(f"its {path.name} is no ordinary file")
        if status.st_size > limit:
            raise AdapterError(f"its {path.name} is larger than {limit} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise AdapterError(f"its {path.name} cannot be read: {exc.strerror}") from exc


def _read_json(path: Path) -> dict[str, object]:
    try:
        fields = json.loads(read_file(path, MAX_CONFIG_BYTES))
    except FileNotFoundError as exc:
        raise AdapterError(f"it has no {CONFIG}: it is no PEFT adapter") from exc
    except (ValueError, RecursionError) as exc:
        raise AdapterError(f"its {CONFIG} is not JSON") from exc
    if not isinstance(fields, dict):
        raise AdapterError(f"its {CONFIG} is not a JSON object")
    return fields


def _check_kind(fields: Mapping[str, object]) -> None:
    kind, task = fields.get("peft_type"), fields.get("task_type")
    if kind != "LORA":
        raise AdapterError(f"`peft_type` is {shown(kind)}; only 'LORA' can be served")
    if task not in _TASKS:
        raise AdapterError(f"`task_type` is {shown(task)}; only 'CAUSAL_LM' can be served")
    bias = fields.get("bias", "none")
    if bias != "none":
        raise AdapterError(f"`bias` is {shown(bias)}: trained biases are not a low-rank update")


def _check_refused(fields: Mapping[str, object]) -> None:
    known = {
        *LoraSettings.model_fields,
        *INERT,
        "peft_type",
        "task_type",
        "bias",
        "init_lora_weights",
    }
    for field, value in fields.items():
        if field in known or not value:
            continue
        if field in REFUSED:
            raise AdapterError(f"`{field}` is set: {REFUSED[field]}")
        raise AdapterError(f"unknown setting {shown(field)}: refused rather than ignored")


def _check_init(init: object) -> None:
    if init is None or isinstance(init, bool):
        return
    name = init.lower() if isinstance(init, str) else ""
    if name.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise AdapterError(f"`init_lora_weights` is {shown(init)}, which {_INIT_HINT}")
    if name not in _HARMLESS_INIT:
        raise AdapterError(
            f"`init_lora_weights` is {shown(init)}: unknown, and it may change the base"
        )


def _validated(fields: Mapping[str, object]) -> LoraSettings:
    try:
        return LoraSettings.model_validate(fields)
    except pydantic.ValidationError as exc:
        problem = exc.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise AdapterError(f"its {CONFIG}, setting {shown(field)}: {problem['msg']}") from exc


def _check_layers(settings: LoraSettings) -> None:
    by_layer = settings.layers_to_transform is not None
    if isinstance(settings.target_modules, str) and (by_layer or settings.layers_pattern):
        raise AdapterError(
            "`layers_to_transform` and `layers_pattern` mean nothing beside a `target_modules` that"
            " is one regular expression"
        )
    if settings.layers_pattern and not by_layer:
        raise AdapterError("`layers_pattern` is set without `layers_to_transform`")


def _suffix(name: str) -> Pattern:
    """PEFT's reading of a key of rank_pattern or alpha_pattern: trailing components of a name.

    Of overlapping keys the file's first counts, as when PEFT loads it. PEFT sorts what it saves.
    """
    return Pattern.of(rf"(.*\.)?({name})$")


def _first_match(table: Sequence[tuple[Pattern, Number]], module: str, default: Number) -> Number:
    return next((value for pattern, value in table if pattern.match(module)), default)


def _named_by(names: str | Sequence[str], module: str) -> bool:
    """PEFT's reading of target_modules: one regular expression, or trailing parts of names."""
    if isinstance(names, str):
        return Pattern.of(names).fullmatch(module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)
