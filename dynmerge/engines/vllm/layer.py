"""Layer: one of vLLM's linear layers on this rank, and the bank's modules in it."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor


class Layer:
    """One of the model's layers and the bank's modules in it, slice by slice."""

    def __init__(self, name: str, wrapped: Any, modules: Sequence[str | None]) -> None:
        self.name = name
        self.wrapped = wrapped
        self.modules = tuple(modules)  # the bank's name of each slice, None where it has none
        ends = accumulate(wrapped.output_slices, initial=0)
        self.spans = tuple(slice(start, stop) for start, stop in pairwise(ends))

    @property
    def d_in(self) -> int:
        """Inputs on this rank."""
        return int(self.wrapped.input_size)

    def down(self, factors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Factors (n, d_in) of each slice, cut to this rank's inputs."""
        return self._cut(self.wrapped.slice_lora_a, factors)

    def up(self, factors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Factors (d_out, n) of each slice, cut to this rank's outputs."""
        return self._cut(self.wrapped.slice_lora_b, factors)

    def _cut(self, cut: Callable[..., Any], factors: Sequence[Tensor | None]) -> list[Any]:
        if self.wrapped.tp_size == 1:
            return list(factors)
        if len(self.modules) > 1:
            return list(cut(list(factors)))
        return [None if factor is None else cut(factor) for factor in factors]
