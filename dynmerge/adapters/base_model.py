"""BaseModel: what the gate and the bank know of a base model: its linear layers and a fingerprint.

Never loads the model, and never runs code that comes with it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, TypedDict

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from dynmerge.adapters.hub import display_name, locate
from dynmerge.errors import BaseModelError

FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",  # not `consolidated.safetensors`, which is the same again
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)

WINDOW = 4096  # bytes: one page
WINDOWS = 16
# What Transformers raises on a config.json that no model can be made of.
_UNUSABLE = (
    AttributeError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
# Who wrote config.json, and when, is not what the model computes; tensors have their own dtype.
_INCIDENTAL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A base model on disk: its linear layers by name, its embeddings, and which weights it has."""

    name: str  # the last component of its folder or hub id
    folder: Path
    fingerprint: str
    linears: Mapping[str, tuple[int, int]]  # module name -> (d_out, d_in)
    embeddings: frozenset[str]  # input and output embeddings; the latter are in `linears` too

    @classmethod
    def open(cls, source: str | Path, *, revision: str | None = None) -> "BaseModel":
        """The causal language model in a local folder, or of a hub id, as Transformers builds it.

        Raises BaseModelError if it is missing, unreadable, not in safetensors, or of another kind.
        """
        folder = locate(source, FILES, revision=revision, error=BaseModelError)
        name = display_name(folder)
        try:
            config = _read_config(folder)
            model = _skeleton(config)
            weights = fingerprint(folder)
        except BaseModelError as reason:
            raise BaseModelError(f"base model {name!r}: {reason}") from reason
        return cls(name, folder, weights, _linears(model), _embeddings(model))


class TensorHeader(TypedDict):
    """What a safetensors header states of one tensor."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def fingerprint(folder: Path) -> str:
    """SHA-256 over config.json and every tensor's name, dtype, shape and a sample of its bytes.

    The sample is WINDOWS pages spread evenly over the tensor, its first and last among them, or
    all of a small tensor: about 20 MB of an 8B model. Training changes every page of a matrix; an
    edit of a few rows in one large matrix can go unseen. Sharding and file names do not matter.
    """
    content = hashlib.sha256()
    content.update(json.dumps(_config_essentials(folder), sort_keys=True).encode())
    samples: dict[str, bytes] = {}
    for shard in _shards(folder):
        samples.update(_shard_samples(shard))
    for name in sorted(samples):
        content.update(name.encode() + b"\0" + samples[name])
    return content.hexdigest()


def _read_config(folder: Path) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise BaseModelError("it has no config.json")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except _UNUSABLE as exc:
        raise BaseModelError(f"its config.json cannot be used: {_first_line(exc)}") from exc
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    known = {causal} if isinstance(causal, str) else set(causal or ())
    stated = config.architectures or []
    if not known.intersection(stated):
        kind = ", ".join(stated) or f"of type {config.model_type!r} with no architecture stated"
        raise BaseModelError(
            f"it is {kind}, which is no causal language model that Transformers builds without"
            " remote code"
        )
    assert isinstance(config, PretrainedConfig)
    return config


def _skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model's modules without their weights."""
    try:
        # Not accelerate's init_empty_weights: that patches torch for every thread.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except _UNUSABLE as exc:
        raise BaseModelError(f"its config.json describes no model: {_first_line(exc)}") from exc
    assert isinstance(model, PreTrainedModel)
    return model


def _linears(model: PreTrainedModel) -> Mapping[str, tuple[int, int]]:
    linears = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            linears[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            d_in, d_out = module.weight.shape  # Conv1D keeps its weight transposed
            linears[name] = (d_out, d_in)
    return MappingProxyType(linears)


def _embeddings(model: PreTrainedModel) -> frozenset[str]:
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return frozenset(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or module is output
    )


def _config_essentials(folder: Path) -> dict[str, object]:
    config = json.loads((folder / "config.json").read_bytes())
    return {key: value for key, value in config.items() if key not in _INCIDENTAL}


def _shards(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
            raise BaseModelError(
                "its weights are pickles, and dynmerge reads safetensors only: load it with"
                " Transformers and save_pretrained() it again"
            )
        raise BaseModelError("it has no model.safetensors and no model.safetensors.index.json")
    try:
        stated = json.loads(index.read_bytes())["weight_map"].values()
        names = sorted({str(name) for name in stated})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise BaseModelError("its model.safetensors.index.json cannot be read") from exc
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise BaseModelError(f"its index names {name!r}, which is no file beside it")
    return [folder / name for name in names]


def _shard_samples(shard: Path) -> dict[str, bytes]:
    """Tensor name -> digest of its dtype, shape and sampled bytes."""
    try:
        # The library checks the header; it then offers no way to read a part of a tensor's bytes.
        with safe_open(shard, framework="np"), shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, TensorHeader] = json.loads(file.read(length))
            return {
                name: _sample(file, 8 + length, stated)
                for name, stated in header.items()
                if name != "__metadata__"
            }
    except (OSError, SafetensorError) as exc:
        raise BaseModelError(f"{shard.name} cannot be read: {_first_line(exc)}") from exc


def _sample(file: BinaryIO, data: int, stated: TensorHeader) -> bytes:
    start, end = stated["data_offsets"]
    digest = hashlib.sha256(f"{stated['dtype']}{stated['shape']}".encode())
    for window in _windows(end - start):
        file.seek(data + start + window.start)
        digest.update(file.read(window.stop - window.start))
    return digest.digest()


def _windows(size: int) -> Iterator[slice]:
    if size <= WINDOW * WINDOWS:
        yield slice(0, size)
        return
    for index in range(WINDOWS):
        start = index * (size - WINDOW) // (WINDOWS - 1)
        yield slice(start, start + WINDOW)


def _first_line(exc: Exception) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:200]
