"""Learned: the tables of one calibration, stacked as the bank's groups, and the cores they give."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynmerge.bank.bank import FactorBank
from dynmerge.merging.calibrated import GRANULARITIES, joint_directions
from dynmerge.merging.maps import FORMS, Form


@dataclass(frozen=True, eq=False)
class Learned:
    """By group of the bank, table label -> (members, ...); `constants` are not learned."""

    bank: FactorBank
    method: str
    form: Form
    tables: tuple[dict[str, Tensor], ...]
    constants: tuple[dict[str, Tensor], ...]

    @classmethod
    def start(cls, bank: FactorBank, method: str, form: str | Form) -> "Learned":
        """Before any training: about Task Arithmetic, exact where one skill is alone."""
        chosen = FORMS[form] if isinstance(form, str) else form
        tables, constants = [], []
        for group in bank.groups:
            owners = GRANULARITIES[method].owners(group)
            own = chosen.start(len(group.members), len(group.ranks), len(owners))
            if method == "core":
                tasks, (p, q) = len(group.ranks), (group.left.shape[1], group.right.shape[2])
                own["tables"] = torch.zeros(len(group.members), tasks * (tasks - 1) // 2, p, q)
            tables.append(own)
            constants.append({"joint": joint_directions(group)} if method == "tara-b" else {})
        return cls(bank, method, chosen, tuple(tables), tuple(constants))

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Label and table, group after group."""
        for own in self.tables:
            yield from own.items()

    def clone(self) -> "Learned":
        """A copy with tables of its own, without gradients."""
        return self.holding(
            [{k: v.detach().clone() for k, v in own.items()} for own in self.tables]
        )

    def holding(self, tables: Sequence[dict[str, Tensor]]) -> "Learned":
        """The same with other tables."""
        return replace(self, tables=tuple(tables))

    def cores(self, rho: Tensor) -> list[Tensor]:
        """C (p, q) for every module in the bank's order; rho (tasks,) sums to one."""
        found: list[Tensor] = [rho] * len(self.bank.modules)
        granularity = GRANULARITIES[self.method]
        for group, own, constant in zip(self.bank.groups, self.tables, self.constants, strict=True):
            known: Mapping[str, Tensor] = {**own, **constant}
            phi = self.form.coefficients(known, granularity.owners(group), rho)
            cores = granularity.cores(group, phi, known, rho)
            for member, core in zip(group.members, cores, strict=True):
                found[member] = core
        return found
