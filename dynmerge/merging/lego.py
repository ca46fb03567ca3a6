"""LoRA-LEGO: skills are taken apart into rank-one pieces, and alike pieces become one.

Zhao et al. 2025, arXiv:2409.16167. Looks at magnitudes in the layer's own coordinates, so it needs
the shared bases; what it returns is in them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dynmerge.bank.bank import FactorGroup, ModuleFactors
from dynmerge.merging.outcome import Cores
from dynmerge.merging.parameters import Values, number, word
from dynmerge.merging.sparsify import generator
from dynmerge.merging.support import Support


def lego(support: Support, weights: Tensor, values: Values) -> Cores:
    """The weighted centroids of clusters of rank-one pieces, module after module."""
    cores = []
    for group in support.groups:
        p, q = group.left.shape[1], group.right.shape[2]
        merged = group.left.new_zeros(len(group.members), p, q)
        if group.present:
            share = group.per_direction(weights)
            for index, member in enumerate(group.members):
                support.check_wanted()
                module = support.bank.modules[member]
                merged[index] = _merged(module, group, index, share, values)
        cores.append(merged * weights.sum())
    return Cores(cores)


def starts(module: str, units: int, clusters: int, seed: int) -> list[int]:
    """Which units the clusters start from: drawn without replacement."""
    order = torch.randperm(units, generator=generator(seed, "lego", module))
    return [int(unit) for unit in order[:clusters]]


def _merged(
    module: ModuleFactors, group: FactorGroup, index: int, share: Tensor, values: Values
) -> Tensor:
    """(p, q): the sum of the clusters' pieces in one module; `share` (K,) the units' weights."""
    left, right = group.left[index].mT, group.right[index]  # b (K, p) and a (K, q) of the units
    if word(values, "signs") == "aligned":
        turned = _signs(right @ module.V.to(right).mT)
        left, right = left * turned, right * turned
    rank = max(group.ranks)
    clusters = min(int(number(values, "clusters")) or rank, len(right))
    first = starts(module.name, len(right), clusters, int(number(values, "seed")))
    features = torch.cat([_unit(right), _unit(left)], dim=1)
    assigned = _k_means(features, first, int(number(values, "iterations")))
    members = torch.nn.functional.one_hot(assigned, clusters).to(right).mT  # (clusters, K)
    mean = members * share
    mean = mean / mean.sum(1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
    b, a = mean @ left, mean @ right
    size = mean @ _largest(module, left, right) / _largest(module, b, a).clamp(min=1e-12)
    # An empty cluster has no members: its means are zero and so is its piece.
    pieces: Tensor = b * (size * math.sqrt(rank / clusters))[:, None]
    return pieces.mT @ a


def _k_means(features: Tensor, first: Sequence[int], iterations: int) -> Tensor:
    """(K,): Lloyd's algorithm from the given units; an empty cluster keeps its place."""
    points = features.double()
    centres = points[list(first)]
    assigned = torch.cdist(points, centres).argmin(1)
    for _ in range(iterations - 1):
        members = torch.nn.functional.one_hot(assigned, len(centres)).to(points).mT
        counts = members.sum(1, keepdim=True)
        centres = torch.where(counts > 0, members @ points / counts.clamp(min=1), centres)
        assigned = torch.cdist(points, centres).argmin(1)
    return assigned


def _largest(module: ModuleFactors, left: Tensor, right: Tensor) -> Tensor:
    """(n,): the largest magnitude in each pair (b, a), in the layer's own coordinates."""
    b, a = left @ module.U.to(left).mT, right @ module.V.to(right).mT
    return torch.maximum(b.abs().amax(1), a.abs().amax(1))


def _unit(rows: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / lengths.clamp(min=1e-12)


def _signs(rows: Tensor) -> Tensor:
    """(n, 1): the sign of each row's largest entry."""
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(rows)
