"""Support: the updates of the skills that take part in a merge, in the bank's shared bases.

What every method computes with. A weight's sign is in the updates, so that methods see magnitudes.
What a method prepares from a support, whatever the magnitudes, it keeps there for the next merge.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from dynmerge.bank.bank import FactorBank, FactorGroup, Task
from dynmerge.errors import Abandoned
from dynmerge.preference import Preference

Parts = tuple[Tensor, ...]


class Support:
    """Skills of a bank with a sign each, and the values that methods keep from them."""

    def __init__(
        self, bank: FactorBank, groups: Sequence[FactorGroup], tasks: Sequence[Task]
    ) -> None:
        self.bank = bank
        self.groups = tuple(groups)
        self.tasks = tuple(tasks)
        self._wanted: Callable[[], bool] = lambda: True
        self._kept: dict[Hashable, Sequence[Parts]] = {}
        self._derived: dict[Hashable, Support] = {}

    @classmethod
    def of(cls, bank: FactorBank, signs: Mapping[int, int]) -> "Support":
        """The support of the bank's tasks `signs`, each +1 or -1."""
        chosen = sorted(signs)
        groups = [_restricted(group, chosen, signs) for group in bank.groups]
        return cls(bank, groups, [bank.tasks[task] for task in chosen])

    def asked(self, wanted: Callable[[], bool]) -> "Support":
        """The same support for one merge, which ends in Abandoned once it is not `wanted`."""
        support = copy(self)
        support._wanted = wanted
        return support

    def check_wanted(self) -> None:
        """Raise Abandoned if nobody waits for the merge any more: what takes long asks often."""
        if not self._wanted():
            raise Abandoned("nobody waits for this merge any more")

    def calibrated(self, left: Sequence[Tensor]) -> "Support":
        """The same skills with other left factors, one tensor per group; nothing kept."""
        groups = [
            replace(group, left=other) for group, other in zip(self.groups, left, strict=True)
        ]
        support = Support(self.bank, groups, self.tasks)
        support._wanted = self._wanted
        return support

    def keep(self, key: Hashable, make: Callable[[], Sequence[Parts]]) -> Sequence[Parts]:
        """What `make` returned the first time `key` was asked for, one item for each group.

        It may not depend on weights. Two threads may both make it, to the same bits.
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
        return derived.asked(self._wanted)

    @property
    def nbytes(self) -> int:
        """Bytes that this support and what it keeps hold beyond the bank's own."""
        banks = {id(factor) for group in self.bank.groups for factor in (group.left, group.right)}
        held = {id(tensor): tensor for tensor in self._tensors() if id(tensor) not in banks}
        return sum(tensor.numel() * tensor.element_size() for tensor in held.values())

    def _tensors(self) -> Iterator[Tensor]:
        for group in self.groups:
            yield from (group.left, group.right)
        for kept in list(self._kept.values()):
            for parts in kept:
                yield from parts
        for derived in list(self._derived.values()):
            yield from derived._tensors()


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


def support_of(bank: FactorBank, preference: Preference) -> tuple[dict[int, int], Tensor]:
    """The tasks that take part with their signs, and their weights' magnitudes (skills,)."""
    vector = preference.vector(bank.names)
    signs = {task: 1 if weight > 0 else -1 for task, weight in enumerate(vector) if weight}
    return signs, torch.tensor([abs(vector[task]) for task in signs], device=bank.device)


def normed(weights: Tensor, p: float) -> Tensor:
    """λ = a ||a||_1 / ||a||_p of weights a >= 0 (skills,): a itself at p = 1 and at one skill."""
    largest = weights.amax()  # high powers of small weights would vanish
    norm: Tensor = largest * torch.linalg.vector_norm(weights / largest, p)
    return weights * (weights.sum() / norm)
