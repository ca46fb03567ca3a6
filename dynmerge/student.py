"""Student: a loaded model that carries one merge at a time, differentiable in the merge's cores.

The base weights are never written: a hook adds U (C (V^T x)) to each layer that the bank knows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dynmerge.adapters.lowrank import LowRank
from dynmerge.bank.bank import FactorBank, ModuleFactors
from dynmerge.bank.target import target
from dynmerge.merging.merge import Merge

# (place of the module in the bank, its input (tokens, d_in), what it reads as V^T x (tokens, q))
Watcher = Callable[[int, Tensor, Tensor], None]


class Student:
    """A model and a bank for it; without `under` and `watching` the model is the base model.

    Raises BankError where the model lacks a layer of the bank. The model's weights are frozen.
    """

    def __init__(self, model: nn.Module, bank: FactorBank) -> None:
        self.model = model.eval().requires_grad_(False)
        self.bank = bank
        self._cores: Sequence[Tensor] | None = None
        self._own: Mapping[str, LowRank] = {}
        self._watch: Watcher | None = None
        self._mask: Tensor | None = None  # (rows, tokens), which tokens are not padding
        targets = [target(model, module) for module in bank.modules]
        self._hooks = [
            layer.register_forward_hook(self._hook(index, module))
            for index, (layer, module) in enumerate(zip(targets, bank.modules, strict=True))
        ]
        self._hooks.append(model.register_forward_pre_hook(self._note_mask, with_kwargs=True))

    @contextmanager
    def under(self, cores: Sequence[Tensor]) -> Iterator[None]:
        """Carry these cores, (p, q) per module in the bank's order; gradients reach them."""
        self._cores = cores
        try:
            yield
        finally:
            self._cores = None

    @contextmanager
    def carrying(self, merge: Merge) -> Iterator[None]:
        """Carry a merge that was made, whichever form it has."""
        if merge.core is not None:
            with self.under(self.bank.layout.split(merge.core)):
                yield
            return
        self._own = merge.own or {}
        try:
            yield
        finally:
            self._own = {}

    @contextmanager
    def watching(self, see: Watcher) -> Iterator[None]:
        """Show `see` what every layer of the bank reads, without the tokens that are padding."""
        self._watch = see
        try:
            yield
        finally:
            self._watch = None

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _note_mask(
        self, model: nn.Module, inputs: tuple[object, ...], given: dict[str, Any]
    ) -> None:
        self._mask = given.get("attention_mask")

    def _hook(
        self, index: int, module: ModuleFactors
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        weight = next(self.model.parameters())
        V = module.V.to(weight.device, weight.dtype)
        UT = module.U.mT.to(weight.device, weight.dtype).contiguous()

        def add_update(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0]
            if self._watch is not None:
                with torch.no_grad():
                    seen = self._unpadded(x)
                    self._watch(index, seen, seen @ V)
            if self._cores is not None:
                core = self._cores[index].to(x)
                return output + ((x @ V) @ core.mT) @ UT
            update = self._own.get(module.name)
            if update is not None:
                return output + (x @ update.A.mT.to(x)) @ update.B.mT.to(x)
            return output

        return add_update

    def _unpadded(self, x: Tensor) -> Tensor:
        """(tokens, d_in): the inputs of those tokens that the attention mask lets through."""
        mask = self._mask
        if mask is None or x.ndim != 3:
            return x.reshape(-1, x.shape[-1])
        kept = mask[:, -x.shape[1] :].bool()  # a mask also covers what is in the cache
        return x[kept.expand(x.shape[0], -1)]
