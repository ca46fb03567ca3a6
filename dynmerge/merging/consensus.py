"""Consensus: which sign an entry takes when skills disagree, and the mean of those that agree."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from dynmerge.merging.sparsify import Block

Sums = Callable[[Tensor], Tensor]


def by_mass(entries: Tensor) -> Tensor:
    """(members, a, b): what the entries (members, skills, a, b) sum to; its sign is elected."""
    return entries.sum(1)


def by_count(entries: Tensor) -> Tensor:
    """The same with every entry counted as its sign; where that is a tie, what they sum to."""
    count = entries.sign().sum(1)
    return torch.where(count == 0, by_mass(entries), count)


SUMS: dict[str, Sums] = {"mass": by_mass, "count": by_count}


def majority(sums: Iterable[Tensor]) -> float:
    """The sign of all elected signs together: what an entry takes whose own sum is zero."""
    total = sum(int(block.sign().sum(dtype=torch.int64)) for block in sums)
    return 1.0 if total >= 0 else -1.0


def majority_apart(sums: Tensor) -> Tensor:
    """(members, 1, 1): the same in each module apart."""
    total = sums.sign().sum((-2, -1), keepdim=True, dtype=torch.int64)
    return torch.where(total >= 0, 1.0, -1.0)


def agreeing(entries: Tensor, sums: Tensor, otherwise: Tensor | float) -> Tensor:
    """The entries (members, skills, a, b) of the elected sign; the others are zero."""
    elected = torch.where(sums == 0, otherwise, sums).sign()
    return torch.where(entries.sign() == elected[:, None], entries, 0)


def patterns(entries: Tensor) -> tuple[Tensor, Tensor]:
    """Which skills an entry is not zero for: (members * a * b,) numbers of rows of (n, skills).

    There are many entries and few patterns: what weights make of a pattern is looked up. Worth it
    where the entries are kept for other weights.
    """
    has = entries.transpose(0, 1).flatten(1) != 0  # (skills, entries)
    code = torch.zeros_like(has[0], dtype=torch.int64)
    for skill, row in enumerate(has):
        if skill % 32 == 31:  # the patterns so far, numbered anew, leave room for 32 bits more
            code = torch.unique(code, return_inverse=True)[1]
        code = 2 * code + row
    found, which = torch.unique(code, return_inverse=True)
    places = torch.arange(len(which), device=which.device)
    example = torch.empty_like(found).scatter_(0, which, places)
    return which.to(torch.int32), has[:, example].mT.to(entries.dtype)


def disjoint_mean(block: Block, weights: Tensor) -> Tensor:
    """(members, a, b): of each entry, the weighted mean over the skills where it is not zero.

    Times the sum of all `weights` (skills,): where all skills agree it is their weighted sum. If
    the block has notes, they are the `patterns` of its entries.
    """
    total = disjoint_sum(block, weights)
    if not block.notes:
        has = replace(block, entries=(block.entries != 0).to(total.dtype))
        kept = disjoint_sum(has, weights)
        return torch.where(kept > 0, total * (weights.sum() / kept), 0)
    which, table = block.notes
    share = torch.where(table.sum(1) > 0, weights.sum() / (table @ weights), 0)
    return total.mul_(share.index_select(0, which).view_as(total))


def disjoint_sum(block: Block, weights: Tensor) -> Tensor:
    """(members, a, b): the weighted sum over the skills."""
    members, skills, a, b = block.entries.shape
    return (weights @ block.entries.view(members, skills, a * b)).view(members, a, b)


AGGREGATES = {"mean": disjoint_mean, "sum": disjoint_sum}
