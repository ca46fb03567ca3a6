"""Moments: what a base model's linear layers read over one task's texts, as two sums per layer.

Texts come in as token ids; labels are not needed. Knows nothing of adapters, nor of what the
moments are for.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dynmerge.errors import ConfigError, ExamplesError


@dataclass(frozen=True, slots=True, eq=False)
class LayerMoments:
    """What one linear layer read, in sums: those over two sets of texts add up. Not centred."""

    gram: Tensor  # (d_in, d_in) float64: H^T H, the sum of h h^T over the tokens
    total: Tensor  # (d_in,) float64: over the texts, the sum of a text's average h
    tokens: int
    texts: int

    @property
    def d_in(self) -> int:
        """How many numbers the layer reads for one token."""
        return self.total.shape[0]

    @property
    def second(self) -> Tensor:
        """(d_in, d_in): the second moment H^T H / n over n tokens."""
        return self.gram / self.tokens

    @property
    def mean(self) -> Tensor:
        """(d_in,): the mean over texts of a text's average, so that a long text counts once."""
        return self.total / self.texts

    @property
    def is_finite(self) -> bool:
        """Whether all of it is numbers: a model that overflows gives some that are none."""
        return bool(self.gram.isfinite().all() and self.total.isfinite().all())

    def __add__(self, other: "LayerMoments") -> "LayerMoments":
        return LayerMoments(
            self.gram + other.gram,
            self.total + other.total,
            self.tokens + other.tokens,
            self.texts + other.texts,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """One task's moments: layer name -> what that layer read."""

    layers: Mapping[str, LayerMoments]

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets of texts together: every token counts the same."""
        if self.layers.keys() != other.layers.keys():
            differing = sorted(self.layers.keys() ^ other.layers.keys())
            raise ConfigError(f"only one of the two moments has {', '.join(differing)}")
        return Moments({name: layer + other.layers[name] for name, layer in self.layers.items()})

    def save(self, path: Path) -> None:
        """Write one safetensors file: about 8 d_in² bytes per layer. Raises ExamplesError."""
        tensors = {}
        for name, layer in self.layers.items():
            tensors[f"{name}.gram"] = layer.gram.contiguous()
            tensors[f"{name}.total"] = layer.total.contiguous()
            tensors[f"{name}.counts"] = torch.tensor([layer.tokens, layer.texts])
        try:
            save_file(tensors, path)
        except (OSError, SafetensorError) as error:
            raise ExamplesError(f"{path} cannot be written: {error}") from error

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> "Moments":
        """Read what `save` wrote. Raises ExamplesError where the file is another kind."""
        try:
            tensors = load_file(path, device)
            names = [name.removesuffix(".counts") for name in tensors if name.endswith(".counts")]
            layers = {name: _stored(name, tensors) for name in names}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ExamplesError(f"{path} does not hold moments: {error}") from error
        if not layers or len(tensors) != 3 * len(layers):
            raise ExamplesError(f"{path} does not hold moments: a layer has gram, total and counts")
        return cls(layers)


def collect(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], target_modules: Sequence[str]
) -> Moments:
    """The moments of `batches` in one pass of the base model, in float64 on the model's device.

    A batch is what the model takes, `input_ids` and `attention_mask` (rows, tokens); tokens that
    the mask hides are left out, all count where there is none. `target_modules` are layers' names
    or their last parts, as PEFT's list of that name. Memory: 8 d_in² bytes per layer. The model is
    left as it was. Raises ConfigError for no names, names that no linear layer has and layers that
    do not read every token of every row; ExamplesError where there is nothing to read, or a layer
    reads NaN or infinity.
    """
    sums = {name: _Sum(name) for name in _targets(model, target_modules)}
    device = next(model.parameters()).device
    with _evaluating(model), _watched(model, sums.values()), torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            kept = mask.to(device).bool()
            if not kept.any(1).all():
                raise ExamplesError("a row of a batch has no token that its attention mask shows")
            for layer in sums.values():
                layer.kept = kept
            model(**{name: value.to(device) for name, value in batch.items()})
    return Moments({name: layer.moments() for name, layer in sums.items()})


class _Sum:
    """One layer's sums while batches go by."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kept = torch.empty(0)  # (rows, tokens) bool, the batch's mask
        self._read: LayerMoments | None = None

    def see(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add what `layer` is about to read."""
        x = inputs[0]
        if x.shape[:-1] != self.kept.shape:
            raise ConfigError(
                f"{self.name} reads {tuple(x.shape)} where the texts are "
                f"{tuple(self.kept.shape)}: leave out layers that do not read every token"
            )
        # The smallest eigenvalues are what the gram is for: float32 would round them away.
        masks = self.kept.to(x.device)
        rows = [row[kept].double() for row, kept in zip(x, masks, strict=True)]
        H = torch.cat(rows)
        total = torch.stack([row.mean(0) for row in rows]).sum(0)
        read = LayerMoments(H.mT @ H, total, len(H), len(rows))
        self._read = read if self._read is None else self._read + read

    def moments(self) -> LayerMoments:
        """The sums. Raises ExamplesError where the layer read nothing, or what is no number."""
        if self._read is None:
            raise ExamplesError(
                f"{self.name} read nothing: there were no texts, or it does not run"
            )
        if not self._read.is_finite:
            raise ExamplesError(f"{self.name} reads NaN or infinity on these texts")
        return self._read


def _stored(name: str, tensors: Mapping[str, Tensor]) -> LayerMoments:
    gram, total = tensors[f"{name}.gram"], tensors[f"{name}.total"]
    tokens, texts = (int(count) for count in tensors[f"{name}.counts"])
    if gram.shape != (len(total), len(total)) or min(tokens, texts) < 1:
        raise ValueError(f"{name} has a gram of {tuple(gram.shape)} over {tokens} tokens")
    stored = LayerMoments(gram, total, tokens, texts)
    if not stored.is_finite:
        raise ValueError(f"{name} holds NaN or infinity")
    return stored


def _targets(model: nn.Module, target_modules: Sequence[str]) -> list[str]:
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D)]
    if any(".lora_A." in name for name in names):
        raise ConfigError("the model carries adapters already: collect before get_peft_model")
    if not target_modules:
        raise ConfigError("target_modules names no layer: give names such as q_proj")
    for wanted in target_modules:
        if not any(_is_named(name, wanted) for name in names):
            known = dict.fromkeys(name.rpartition(".")[2] for name in names)
            raise ConfigError(f"no linear layer is named {wanted!r} (known: {', '.join(known)})")
    return [name for name in names if any(_is_named(name, wanted) for wanted in target_modules)]


def _is_named(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def _watched(model: nn.Module, sums: Iterable[_Sum]) -> Iterator[None]:
    hooks = [model.get_submodule(layer.name).register_forward_pre_hook(layer.see) for layer in sums]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
