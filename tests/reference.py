"""The oracle: slow, obvious, dense float64 twins of everything fast. dynmerge never imports it."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dynmerge.adapters.adapter import Adapter


def delta(adapter: Adapter, module: str) -> Tensor:
    """(d_out, d_in) float64: what this adapter adds to one base weight."""
    update = adapter.modules[module]
    return update.B.double() @ update.A.double()


def linear(deltas: Sequence[Tensor], weights: Sequence[float], scale: float = 1.0) -> Tensor:
    """sum_i scale * w_i * Delta_i, entry by entry."""
    total = torch.zeros_like(deltas[0])
    for update, weight in zip(deltas, weights, strict=True):
        total = total + scale * weight * update
    return total


def merged_deltas(
    adapters: Mapping[str, Adapter], weights: Mapping[str, float], scale: float = 1.0
) -> dict[str, Tensor]:
    """Module name -> dense linear merge (d_out, d_in) over the adapters that have the module."""
    modules = sorted({module for adapter in adapters.values() for module in adapter.modules})
    merged = {}
    for module in modules:
        having = [name for name in sorted(adapters) if module in adapters[name].modules]
        merged[module] = linear(
            [delta(adapters[name], module) for name in having],
            [weights.get(name, 0.0) for name in having],
            scale,
        )
    return merged


def written_out(model: nn.Module, deltas: Mapping[str, Tensor]) -> nn.Module:
    """`model` with W + Delta written into its own weights: give it a copy that nobody else uses."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, update in deltas.items():
            weight = modules[name].weight
            weight.copy_((weight.double() + update).to(weight.dtype))
    return model


def overlap(first: Tensor, second: Tensor) -> float:
    """||Q_1^T Q_2||_F^2 / min(r_1, r_2) of two matrices (d, r_i) of full rank."""
    (Q_1, _), (Q_2, _) = torch.linalg.qr(first.double()), torch.linalg.qr(second.double())
    smaller = min(first.shape[1], second.shape[1])
    return sum(float(a @ b) ** 2 for a in Q_1.mT for b in Q_2.mT) / smaller


def effective_rank(dense: Tensor) -> float:
    """exp(-sum p log p) over the singular values of a dense matrix, as shares of their sum."""
    values = [float(value) for value in torch.linalg.svdvals(dense.double()) if value > 1e-12]
    shares = [value / sum(values) for value in values]
    return math.exp(-sum(share * math.log(share) for share in shares))
