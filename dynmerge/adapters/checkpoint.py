"""PEFT folder <-> Adapter. This file and gate.py alone know alpha, rsLoRA, patterns and key names.

An adapter is honoured entirely or refused with an AdapterError; nothing in it is ignored. Weights
are read as safetensors, never as pickles. Confining paths to a root is the server's part.
"""

import json
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.base_model import BaseModel
from dynmerge.adapters.gate import CONFIG, LoraSettings, read_file, read_settings
from dynmerge.adapters.hub import display_name, locate
from dynmerge.adapters.lowrank import LowRank
from dynmerge.adapters.pattern import shown
from dynmerge.errors import AdapterError

WEIGHTS = "adapter_model.safetensors"
MAX_WEIGHTS_BYTES = 16 << 30
_PREFIX = "base_model.model."
# Some tools leave the adapter's name in: `...lora_A.default.weight`.
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<name>\w+))?\.weight"
)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

Factors = Mapping[str, tuple[Tensor, Tensor]]  # module name -> A (r, d_in), B (d_out, r)


def load_adapter(
    folder: str | Path,
    base: BaseModel,
    *,
    trust_base: bool = False,
    option: str = "trust_base=True",
) -> Adapter:
    """The PEFT LoRA in `folder`, in float32, its scaling folded into B.

    `trust_base` admits an adapter whose settings name another base model; shapes must fit all the
    same; `option` is how the caller's user says so, for the error. Raises AdapterError, naming the
    adapter and the reason, if anything cannot be honoured.
    """
    folder = Path(folder)
    try:
        settings = read_settings(folder)
        if not trust_base:
            _check_base(settings, base, option)
        factors = _paired(_read_weights(folder))
        _check_modules(factors, settings, base)
        updates = {
            module: _update(module, A, B, settings, base.linears[module])
            for module, (A, B) in factors.items()
        }
    except AdapterError as reason:
        raise AdapterError(f"adapter {display_name(folder.absolute())!r}: {reason}") from reason
    return Adapter(updates, display_name(settings.base_model_name_or_path or base.name))


def save_adapter(
    adapter: Adapter, folder: str | Path, *, base_name: str, uniform: bool = False
) -> None:
    """Write `adapter` as a new PEFT folder with scaling 1: all of it, or nothing.

    Unequal ranks are stated in rank_pattern; `uniform` pads the factors with zeros to one rank
    instead, for servers that do not know rank_pattern. Raises AdapterError if `folder` exists or
    cannot be written.
    """
    folder = Path(folder).absolute()
    updates = {module: update for module, update in adapter.modules.items() if update.rank}
    if not updates:
        raise AdapterError(f"adapter {folder.name!r}: there is no module to save")
    check_new(folder)
    if uniform:
        rank = max(adapter.ranks)
        updates = {module: _padded(update, rank) for module, update in updates.items()}
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
        (partial / CONFIG).write_text(json.dumps(_config(updates, base_name), indent=2) + "\n")
        # save_file would make the file its owner's alone, whatever the umask says.
        content = safetensors.torch.save(_tensors(updates), {"format": "pt"})
        (partial / WEIGHTS).write_bytes(content)
        partial.rename(folder)
    except (OSError, SafetensorError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise AdapterError(f"adapter {folder.name!r} cannot be written: {reason}") from exc
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(folder: Path) -> None:
    """Raise AdapterError if there is something at `folder`; worth asking before a long merge."""
    if folder.exists():
        raise AdapterError(f"adapter {folder.name!r}: a file or folder of that name exists already")


def fetch_adapter(
    source: str | Path, *, revision: str | None = None, subfolder: str | None = None
) -> Path:
    """The local folder of an adapter given as a folder or a hub id, downloaded if need be."""
    inside = PurePosixPath(subfolder or "")
    if inside.is_absolute() or ".." in inside.parts:
        raise AdapterError(f"subfolder {shown(subfolder)} leaves the adapter's own folder")
    files = [str(inside / CONFIG), str(inside / "*.safetensors")]
    folder = locate(source, files, revision=revision, error=AdapterError) / inside
    if not folder.is_dir():
        raise AdapterError(f"adapter {display_name(source)!r} has no folder {shown(subfolder)}")
    return folder


def _check_base(settings: LoraSettings, base: BaseModel, option: str) -> None:
    stated = display_name(settings.base_model_name_or_path or base.name)
    if stated.lower() != base.name.lower():
        raise AdapterError(
            f"it was trained on {shown(stated)}, not on {base.name!r}; if these are the same"
            f" weights under two names, say {option}"
        )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        # A copy, not a mapping: a file changed in place later must not reach a loaded adapter.
        return safetensors.torch.load(read_file(folder / WEIGHTS, MAX_WEIGHTS_BYTES))
    except FileNotFoundError as exc:
        raise AdapterError(_no_weights(folder)) from exc
    except (SafetensorError, KeyError, ValueError) as exc:
        raise AdapterError(
            f"its {WEIGHTS} is no whole safetensors file: {shown(str(exc))}"
        ) from exc


def _no_weights(folder: Path) -> str:
    pickles = [
        path.name for path in folder.glob("adapter_model.*") if path.suffix != ".safetensors"
    ]
    if pickles:
        return (
            f"its weights are {shown(pickles[0])}, and dynmerge reads safetensors only: load it"
            " with PEFT and save_pretrained() it again"
        )
    return f"it has no {WEIGHTS}"


def _paired(tensors: Mapping[str, Tensor]) -> Factors:
    """Every module's A and B, if the tensors are nothing else."""
    found: dict[str, dict[str, Tensor]] = {}
    names = set()
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(_unexpected(key))
        names.add(match["name"])
        found.setdefault(match["module"], {})[match["factor"]] = tensor
    if not found:
        raise AdapterError(f"its {WEIGHTS} holds no tensors")
    if len(names) > 1:
        raise AdapterError(
            f"its tensors belong to several adapters: {shown(sorted(map(str, names)))}"
        )
    for module, factors in found.items():
        for factor in "AB":
            if factor not in factors:
                raise AdapterError(f"module {shown(module)} has no lora_{factor}")
    return {module: (factors["A"], factors["B"]) for module, factors in found.items()}


def _unexpected(key: str) -> str:
    if "lora_embedding_" in key:
        return f"tensor {shown(key)}: updates of embeddings are not supported"
    return f"unexpected tensor {shown(key)}: only {_PREFIX}<module>.lora_[AB].weight are served"


def _check_modules(factors: Factors, settings: LoraSettings, base: BaseModel) -> None:
    for module in factors:
        if module not in base.linears:
            raise AdapterError(f"{base.name!r} has no linear layer {shown(module)}")
        if module in base.embeddings:
            raise AdapterError(f"module {module!r}: updates of embeddings are not supported")
        if "experts" in module.split("."):
            raise AdapterError(f"module {module!r}: updates of single experts are not supported")
        if not settings.targets(module):
            raise AdapterError(
                f"it has weights for {module!r}, which its own settings do not target"
            )
    for module in base.linears:
        targeted = settings.targets(module, output_embedding=module in base.embeddings)
        if targeted and module not in factors:
            raise AdapterError(f"its settings target {module!r}, but it has no weights for it")


def _update(
    module: str, A: Tensor, B: Tensor, settings: LoraSettings, shape: tuple[int, int]
) -> LowRank:
    for label, factor in (("lora_A", A), ("lora_B", B)):
        if factor.dtype not in _DTYPES:
            raise AdapterError(f"module {module!r}: {label} is {factor.dtype}, not a float")
        if factor.ndim != 2 or not factor.numel():
            raise AdapterError(
                f"module {module!r}: {label} has shape {tuple(factor.shape)}; sharded training must"
                " gather the weights before saving"
            )
    if A.shape[0] != B.shape[1]:
        raise AdapterError(f"module {module!r}: lora_A has rank {A.shape[0]}, lora_B {B.shape[1]}")
    if A.shape[0] != settings.rank(module):
        raise AdapterError(
            f"module {module!r}: its settings say rank {settings.rank(module)}, its weights have"
            f" {A.shape[0]}"
        )
    if (B.shape[0], A.shape[1]) != shape:
        raise AdapterError(
            f"module {module!r}: the update is {B.shape[0]} x {A.shape[1]}, the base model's layer"
            f" {shape[0]} x {shape[1]}"
        )
    update = LowRank(
        A=A.to(torch.float32).contiguous(), B=B.to(torch.float32) * settings.scaling(module)
    )
    if not (update.A.isfinite().all() and update.B.isfinite().all()):
        raise AdapterError(
            f"module {module!r}: its weights or their scaling are not finite numbers"
        )
    return update


def _padded(update: LowRank, rank: int) -> LowRank:
    """The same update with zero rows in A and zero columns in B up to `rank`."""
    missing = rank - update.rank
    return LowRank(
        A=torch.nn.functional.pad(update.A, (0, 0, 0, missing)),
        B=torch.nn.functional.pad(update.B, (0, missing)),
    )


def _config(updates: Mapping[str, LowRank], base_name: str) -> dict[str, object]:
    """adapter_config.json for factors that carry their scaling: alpha equals rank everywhere."""
    largest = max(update.rank for update in updates.values())
    smaller = {
        f"^{re.escape(module)}": update.rank
        for module, update in updates.items()
        if update.rank != largest
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": list(updates),
        "bias": "none",
    }


def _tensors(updates: Mapping[str, LowRank]) -> dict[str, Tensor]:
    tensors = {}
    for module, update in updates.items():
        for label, factor in (("A", update.A), ("B", update.B)):
            # A clone: safetensors refuses factors that share memory, and slices of a bigger tensor.
            tensors[f"{_PREFIX}{module}.lora_{label}.weight"] = (
                factor.detach()
                .to("cpu", torch.float32)
                .clone(memory_format=torch.contiguous_format)
            )
    return tensors
