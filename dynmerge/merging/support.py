"""Support: the updates of the skills that take part in a merge, in the bank's shared bases.

What every method computes with. A weight's sign is in the updates, so that methods see magnitudes.
What a method prepares from a support, whatever the magnitudes, it keeps there for the next merge.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dynmerge.bank.bank import FactorBank, FactorGroup, Task

Parts = tuple[Tensor, ...]


class Support:
    """Skills of a bank with a sign each, and the values that methods keep from them."""

    def __init__(
        self, bank: FactorBank, groups: Sequence[FactorGroup], tasks: Sequence[Task]
    ) -> None:
        self.bank = bank
        self.groups = tuple(groups)
        self.tasks = tuple(tasks)
        self._kept: dict[Hashable, Sequence[Parts]] = {}
        self._derived: dict[Hashable, Support] = {}

    @classmethod
    def of(cls, bank: FactorBank, signs: Mapping[int, int]) -> "Support":
        """The support of the bank's tasks `signs`, each +1 or -1."""
        chosen = sorted(signs)
        groups = [_restricted(group, chosen, signs) for group in bank.groups]
        return cls(bank, groups, [bank.tasks[task] for task in chosen])

    def calibrated(self, left: Sequence[Tensor]) -> "Support":
        """The same skills with other left factors, one tensor per group; nothing kept."""
        groups = [
            replace(group, left=other) for group, other in zip(self.groups, left, strict=True)
        ]
        return Support(self.bank, groups, self.tasks)

    def keep(self, key: Hashable, make: Callable[[], Sequence[Parts]]) -> Sequence[Parts]:
        """What `make` returned the first time `key` was asked for, one item for each group.

        It may not depend on weights.
        """
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = make()
        return kept

    def derive(self, key: Hashable, make: Callable[[], "Support"]) -> "Support":
        """The same for a support made from this one."""
        derived = self._derived.get(key)
        if derived is None:
            derived = self._derived[key] = make()
        return derived

    @property
    def nbytes(self) -> int:
        """Bytes that this support and what it keeps hold beyond the bank's own."""
        held = [part for kept in list(self._kept.values()) for parts in kept for part in parts]
        if len(self.tasks) < len(self.bank.tasks):
            held += [factor for group in self.groups for factor in (group.left, group.right)]
        own = sum(tensor.numel() * tensor.element_size() for tensor in held)
        return own + sum(derived.nbytes for derived in list(self._derived.values()))


def _restricted(group: FactorGroup, chosen: Sequence[int], signs: Mapping[int, int]) -> FactorGroup:
    if len(chosen) < len(group.ranks):
        factors = [group.of(task) for task in chosen]
        group = FactorGroup(
            members=group.members,
            left=torch.cat([left for left, _ in factors], dim=2),
            right=torch.cat([right for _, right in factors], dim=1),
            ranks=tuple(group.ranks[task] for task in chosen),
            soups=None if group.soups is None else group.soups[:, chosen],
        )
    if all(signs[task] > 0 for task in chosen):
        return group
    turned = torch.tensor([float(signs[task]) for task in chosen], device=group.left.device)
    return replace(group, left=group.left * group.per_direction(turned))


def normed(weights: Tensor, p: float) -> Tensor:
    """λ = a ||a||_1 / ||a||_p of weights a >= 0 (skills,): a itself at p = 1 and at one skill."""
    norm: Tensor = torch.linalg.vector_norm(weights, p)
    return weights * (weights.sum() / norm)
