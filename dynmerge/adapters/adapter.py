"""Adapter: one trained LoRA in memory. Knows its updates and for which base model, not where it
came from.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import torch

from dynmerge.adapters.lowrank import LowRank


@dataclass(frozen=True, eq=False)
class Adapter:
    """Module name -> update, for one base model; immutable.

    `modules` uses the base model's own names (`model.layers.0.self_attn.q_proj`). `base` is the
    base model's name as the adapter's own configuration states it.
    """

    modules: Mapping[str, LowRank]
    base: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", MappingProxyType(dict(sorted(self.modules.items()))))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks of its modules, ascending."""
        return tuple(sorted({update.rank for update in self.modules.values()}))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over module names and float32 factors: the content, whatever its file."""
        content = hashlib.sha256()
        for name, update in self.modules.items():
            for label, factor in (("A", update.A), ("B", update.B)):
                content.update(f"{name}\0{label}\0{tuple(factor.shape)}\0".encode())
                content.update(
                    factor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
                )
        return content.hexdigest()
