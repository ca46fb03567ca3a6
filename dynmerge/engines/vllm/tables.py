"""Parts: one layer's shared factors and, for every slot, what a merge is between them.

Three forms. `DiagonalPart`: y += B (d * (A x)) in the skills' own directions, d one row of numbers.
`CorePart`: y += U (C (V^T x)) in the bank's shared bases. `OwnPart`: y += B (A x) with factors of
the merge's own. Everything is cut to this rank. Addresses never change after allocation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dynmerge.engines.vllm.kernels import gather_core_expand
from dynmerge.engines.vllm.steps import Run


class Part(Protocol):
    """What is added to one layer's output under the merges of one form."""

    def add(self, x: Tensor, y: Tensor, index: Tensor, runs: Sequence[Run] | None) -> None:
        """y (tokens, d_out) += the updates of x (tokens, d_in) under the rows `index` (tokens,).

        `runs` are the same rows as the host knows them; None where the host may decide nothing.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Expand:
    """One slice of a layer: which of the shrunk columns are its, and where in y they go."""

    columns: slice  # of A x or V^T x
    outputs: slice  # of y
    up: Tensor  # (outputs, columns): B or U


@dataclass(frozen=True, slots=True, eq=False)
class DiagonalPart:
    """`rows` is this layer's part of the table: (slots + 1, columns), the last row zeros."""

    # As rows of x take it: the other way round a few tokens cost twice as much on a CPU.
    down: Tensor  # (d_in, columns)
    expands: tuple[Expand, ...]
    rows: Tensor

    def add(self, x: Tensor, y: Tensor, index: Tensor, runs: Sequence[Run] | None) -> None:
        """See Part."""
        h = torch.mm(x, self.down)
        h.mul_(self.rows.index_select(0, index))
        for each in self.expands:
            y[:, each.outputs].addmm_(h[:, each.columns], each.up.mT)


@dataclass(frozen=True, slots=True, eq=False)
class CorePart:
    """`table` (slots + 1, all layers' numbers), the last row zeros; a slice's C is (q, p)."""

    down: Tensor  # (d_in, columns)
    expands: tuple[Expand, ...]
    table: Tensor
    places: tuple[int, ...]  # of each slice, the column of the table where its cores begin

    def add(self, x: Tensor, y: Tensor, index: Tensor, runs: Sequence[Run] | None) -> None:
        """See Part."""
        z = torch.mm(x, self.down)
        for each, place in zip(self.expands, self.places, strict=True):
            own = z[:, each.columns]
            gather_core_expand(y, own, self.table, place, index, each.up, each.outputs.start)


@dataclass(frozen=True, slots=True, eq=False)
class OwnPart:
    """Factors of each slot's own, by slice: A (slots, r, d_in) and B (slots, outputs, r)."""

    outputs: tuple[slice, ...]
    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]

    def add(self, x: Tensor, y: Tensor, index: Tensor, runs: Sequence[Run] | None) -> None:
        """See Part."""
        if runs is None:
            return self._add_everywhere(x, y, index)
        for run in runs:
            part = x[run.start : run.stop]
            for outputs, A, B in zip(self.outputs, self.A, self.B, strict=True):
                y[run.start : run.stop, outputs].addmm_(part @ A[run.row].mT, B[run.row].mT)
        return None

    def _add_everywhere(self, x: Tensor, y: Tensor, index: Tensor) -> None:
        """Every slot for every token, those under other merges times 0."""
        for slot in range(self.A[0].shape[0]):
            here = (index == slot).to(x.dtype)[:, None]
            for outputs, A, B in zip(self.outputs, self.A, self.B, strict=True):
                y[:, outputs].addmm_((x @ A[slot].mT) * here, B[slot].mT)
