"""Outcome: what a method returns, one update per module, in the shared bases or with its own.

Both forms say their norms and can be scaled module by module: what follows a merger needs no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynmerge.adapters.lowrank import LowRank
from dynmerge.merging.support import Support

Triplets = tuple[Tensor, Tensor, Tensor]  # P (members, p, k), S (members, k), Q (members, q, k)


@dataclass(frozen=True, slots=True, eq=False)
class Cores:
    """Cores in the bank's shared bases: (members, p, q) for each group of the support.

    `directions` are their singular triplets where the method chose them: a flat spectrum has
    others as good, which rounding would pick.
    """

    groups: Sequence[Tensor]
    directions: Sequence[Triplets] | None = None

    def norms(self, support: Support) -> list[Tensor]:
        """The update's norm in each module: (members,) for each group of the support."""
        return [torch.linalg.matrix_norm(cores) for cores in self.groups]

    def scaled(self, support: Support, factors: Sequence[Tensor]) -> "Cores":
        """Each module times its own factor: (members,) or a number for each group."""
        return Cores(
            [
                cores * factor.reshape(-1, 1, 1)
                for cores, factor in zip(self.groups, factors, strict=True)
            ]
        )


@dataclass(frozen=True, slots=True, eq=False)
class Thin:
    """Updates that left the shared bases, by the module's place in the bank; absent: no change.

    `energy` is the share of the method's squared norm that is left of it, over all modules.
    """

    updates: dict[int, LowRank]
    energy: float = 1.0

    def norms(self, support: Support) -> list[Tensor]:
        """The update's norm in each module: (members,) for each group of the support."""
        return [
            torch.stack([self._norm(member, group.left) for member in group.members])
            for group in support.groups
        ]

    def scaled(self, support: Support, factors: Sequence[Tensor]) -> "Thin":
        """Each module times its own factor: (members,) or a number for each group."""
        own = {
            member: factor
            for group, several in zip(support.groups, factors, strict=True)
            for member, factor in zip(
                group.members, several.expand(len(group.members)), strict=True
            )
        }
        updates = {
            member: LowRank(A=update.A, B=update.B * own[member])
            for member, update in self.updates.items()
        }
        return replace(self, updates=updates)

    def _norm(self, member: int, like: Tensor) -> Tensor:
        update = self.updates.get(member)
        if update is None:
            return like.new_zeros(())
        gram = (update.B.mT @ update.B) * (update.A @ update.A.mT)
        return gram.sum().clamp(min=0).sqrt()


Outcome = Cores | Thin
