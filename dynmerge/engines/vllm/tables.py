"""Tables: one layer's shared factors and, for every slot, what a merge is between them.

Three forms. `DiagonalPart`: y += B (d * (A x)) in the skills' own directions, d one row of numbers.
`CorePart`: y += U (C (V^T x)) in the bank's shared bases. `OwnPart`: y += B (A x) with factors of
the merge's own. Everything is cut to this rank. Addresses never change after allocation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynmerge.engines.vllm.kernels import gather_core_expand
from dynmerge.engines.vllm.steps import Run, Singles

Pieces = Sequence[Run | Singles]


@dataclass(frozen=True, slots=True, eq=False)
class Expand:
    """One slice of a layer: which of the shrunk columns are its, and where in y they go."""

    columns: slice  # of A x or V^T x
    outputs: slice  # of y
    up: Tensor  # (outputs, columns): B or U


@dataclass(frozen=True, slots=True, eq=False)
class DiagonalPart:
    """`rows` is this layer's part of the table: (slots + 1, columns), the last row zeros."""

    down: Tensor  # (columns, d_in)
    expands: tuple[Expand, ...]
    rows: Tensor

    def add(self, x: Tensor, y: Tensor, index: Tensor) -> None:
        """y (tokens, d_out) += the updates of the tokens' rows; `index` (tokens,)."""
        h = torch.mm(x, self.down.mT)
        h.mul_(self.rows.index_select(0, index))
        for each in self.expands:
            y[:, each.outputs].addmm_(h[:, each.columns], each.up.mT)


@dataclass(frozen=True, slots=True, eq=False)
class CorePart:
    """`table` (slots + 1, all layers' numbers), the last row zeros; a slice's C is (q, p)."""

    down: Tensor  # (columns, d_in)
    expands: tuple[Expand, ...]
    cores: tuple[Tensor, ...]  # of each slice, a view (slots + 1, q, p) of the table
    table: Tensor
    places: tuple[int, ...]  # of each slice, the column of the table where its cores begin

    def add(self, x: Tensor, y: Tensor, pieces: Pieces, index: Tensor) -> None:
        """y += the updates of the tokens in `pieces`, whose rows are in `index` (tokens,)."""
        z = torch.mm(x, self.down.mT)
        for each, cores in zip(self.expands, self.cores, strict=True):
            through = _through(z[:, each.columns], cores, pieces, index)
            y[:, each.outputs].addmm_(through, each.up.mT)

    def add_static(self, x: Tensor, y: Tensor, index: Tensor) -> None:
        """The same by `index` alone, nothing decided on the host."""
        z = torch.mm(x, self.down.mT)
        for each, place in zip(self.expands, self.places, strict=True):
            own = z[:, each.columns].contiguous()
            gather_core_expand(y, own, self.table, place, index, each.up, each.outputs.start)


@dataclass(frozen=True, slots=True, eq=False)
class OwnPart:
    """Factors of each slot's own, by slice: A (slots, r, d_in) and B (slots, outputs, r)."""

    outputs: tuple[slice, ...]
    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]

    def add(self, x: Tensor, y: Tensor, runs: Sequence[Run]) -> None:
        """y += the updates of the tokens in `runs`."""
        for run in runs:
            part = x[run.start : run.stop]
            for outputs, A, B in zip(self.outputs, self.A, self.B, strict=True):
                y[run.start : run.stop, outputs].addmm_(part @ A[run.row].mT, B[run.row].mT)

    def add_static(self, x: Tensor, y: Tensor, index: Tensor) -> None:
        """The same by `index` alone: every slot for every token, those of other merges times 0."""
        for slot in range(self.A[0].shape[0]):
            here = (index == slot).to(x.dtype)[:, None]
            for outputs, A, B in zip(self.outputs, self.A, self.B, strict=True):
                y[:, outputs].addmm_((x @ A[slot].mT) * here, B[slot].mT)


def _through(z: Tensor, cores: Tensor, pieces: Pieces, index: Tensor) -> Tensor:
    """(tokens, p): z (tokens, q) through the cores (slots + 1, q, p) of its tokens; 0 elsewhere."""
    result = z.new_zeros(len(z), cores.shape[2])
    for piece in pieces:
        here = slice(piece.start, piece.stop)
        if isinstance(piece, Run):
            result[here] = z[here] @ cores[piece.row]
        else:
            own = cores.index_select(0, index[here])
            result[here] = torch.bmm(z[here, None], own).squeeze(1)
    return result
