"""Learned: the tables of one calibration, stacked as the bank's groups, and the cores they give."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynmerge.bank.bank import FactorBank
from dynmerge.merging.carried.granularity import GRANULARITIES, constants_of
from dynmerge.merging.carried.maps import FORMS, Form, Tables


@dataclass(frozen=True, eq=False)
class Learned:
    """By group of the bank, table label -> (members, ...); `constants` are not learned."""

    bank: FactorBank
    method: str
    form: Form
    tables: tuple[dict[str, Tensor], ...]
    constants: tuple[dict[str, Tensor], ...]

    @classmethod
    def start(cls, bank: FactorBank, method: str, form: str | Form, *constant: float) -> "Learned":
        """Before any training: about Task Arithmetic, exact where one skill is alone.

        `constant` is one of the form's `starts`, by default the first.
        """
        chosen = FORMS[form] if isinstance(form, str) else form
        granularity, tables = GRANULARITIES[method], []
        for group in bank.groups:
            members, owners = len(group.members), granularity.owners(group)
            own = chosen.start(members, len(group.ranks), len(owners), *constant)
            more = granularity.tables(group)
            tables.append(own | {label: torch.zeros(members, *more[label]) for label in more})
        return cls(bank, method, chosen, tuple(tables), constants_of(bank, method))

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
        """C (p, q) for every module in the bank's order; rho (tasks,) sums to one.

        A layer that no skill of rho changes stays as it is, as it does at request time.
        """
        owners = GRANULARITIES[self.method].owners
        known = [{**own, **more} for own, more in zip(self.tables, self.constants, strict=True)]
        phi = [
            self.form.coefficients(tables, owners(group), rho)
            for group, tables in zip(self.bank.groups, known, strict=True)
        ]
        cores = cores_of(self.bank, self.method, phi, known, rho)
        for group in self.bank.groups:
            if not rho[group.present].any():
                for member in group.members:
                    cores[member] = torch.zeros_like(cores[member])
        return cores


def cores_of(
    bank: FactorBank, method: str, phi: Sequence[Tensor], tables: Sequence[Tables], rho: Tensor
) -> list[Tensor]:
    """C (p, q) for every module in the bank's order; phi (members, W) for each group."""
    cores = GRANULARITIES[method].cores
    return in_order(
        bank,
        [
            cores(group, coefficients, known, rho)
            for group, coefficients, known in zip(bank.groups, phi, tables, strict=True)
        ],
    )


def weighted(bank: FactorBank, weights: Tensor) -> list[Tensor]:
    """sum_i weights_i M_i (p, q), module after module."""
    return in_order(bank, [group.weighted(weights) for group in bank.groups])


def in_order(bank: FactorBank, groups: Sequence[Tensor]) -> list[Tensor]:
    """Cores (p, q) of every module, from those of each group (members, p, q)."""
    return bank.layout.split(bank.flatten(groups))
