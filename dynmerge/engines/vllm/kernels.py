"""gather_core_expand: add U (C z) to a layer's output, every token under its own slot's core.

One operator, a leaf to Dynamo. On CUDA it is two Triton programs that wait for nothing: what is
launched depends on shapes alone, so that a CUDA graph may hold it. Elsewhere it is torch.
Knows tables, rows and columns; not merges, layers or vLLM.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    triton: ModuleType
    tl: ModuleType
    constexpr: TypeAlias = int
elif find_spec("triton") is not None:
    import triton
    import triton.language as tl
    from triton.language import constexpr
else:
    constexpr = int  # torch without CUDA may come without Triton, and has no use for it

OPERATOR = "dynmerge::gather_core_expand"
SHARING = 16  # neighbouring tokens that one product can serve: the least rows tl.dot takes
FEW_TOKENS = 128  # up to here short blocks, or too few programs would run to fill a device
OUTPUTS = 64  # columns of y per program
LONG_RUN = 4  # tokens per run from which on torch multiplies run by run


class Kernel(Protocol):
    """A Triton program: `kernel[grid](...)` launches it."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]: ...


def gather_core_expand(
    y: Tensor, z: Tensor, table: Tensor, column: int, index: Tensor, U: Tensor, offset: int
) -> None:
    """y[t, offset : offset + d] += (z[t] @ C[index[t]]) @ U^T for every token t.

    z (T, q), U (d, p); row s of table (slots + 1, _) holds C_s (q, p) row by row from `column` on.
    Rows `index` (T,) are in 0..slots, of which the last is zeros. y (T, _) is of any dtype, the
    others share one. Both products are summed in float32; between them stands U's dtype.
    """
    torch.ops.dynmerge.gather_core_expand(y, z, table, column, index, U, offset)


def by_torch(
    y: Tensor, z: Tensor, table: Tensor, column: int, index: Tensor, U: Tensor, offset: int
) -> None:
    """Do gather_core_expand in torch, by runs of tokens under one core."""
    q, (d, p), zero = z.shape[1], U.shape, len(table) - 1
    cores = table[:, column : column + q * p]
    slots, _, counts = torch.ops.aten.unique_consecutive(index, False, True)
    runs = list(zip(slots.tolist(), counts.tolist(), strict=True))
    if all(slot == zero for slot, _ in runs):
        return
    if len(z) < LONG_RUN * len(runs):
        own = cores.index_select(0, index).view(-1, q, p)
        h = torch.bmm(z.unsqueeze(1), own).squeeze(1)
    else:
        h = z.new_zeros(len(z), p)
        stop = 0
        for slot, count in runs:
            start, stop = stop, stop + count
            if slot != zero:
                torch.mm(z[start:stop], cores[slot].view(q, p), out=h[start:stop])
    outputs = y[:, offset : offset + d]
    if y.dtype == U.dtype:
        outputs.addmm_(h, U.T)
    else:
        outputs.add_(h @ U.T)


def by_triton(
    y: Tensor, z: Tensor, table: Tensor, column: int, index: Tensor, U: Tensor, offset: int
) -> None:
    """Do gather_core_expand in Triton.

    In two programs: in one, each block of outputs would read the core of every token again.
    """
    (tokens, q), (d, p), zero = z.shape, U.shape, len(table) - 1
    if 0 in {tokens, q, d, p}:
        return
    assert all(part.stride(-1) == 1 for part in (y, z, table, U, index))
    assert z.dtype == table.dtype == U.dtype
    h = torch.empty(tokens, p, dtype=U.dtype, device=U.device)
    BQ, BP = _tile(q), _tile(p)
    grid = tokens, _blocks(p, BP)
    rows = h.stride(0), z.stride(0), table.stride(0)
    _jit(_core)[grid](
        h, z, table, index, zero, column, tokens, q, p, *rows, BT=SHARING, BQ=BQ, BP=BP
    )
    BT = SHARING if tokens <= FEW_TOKENS else 4 * SHARING
    grid = _blocks(tokens, BT), _blocks(d, OUTPUTS)
    rows = y.stride(0), h.stride(0), U.stride(0)
    _jit(_expand)[grid](y, h, U, index, zero, offset, tokens, p, d, *rows, BT=BT, BP=BP, BD=OUTPUTS)


def _fake(
    y: Tensor, z: Tensor, table: Tensor, column: int, index: Tensor, U: Tensor, offset: int
) -> None:
    """Nothing is returned, and y keeps its shape."""


# Not torch.library.custom_op, whose calls cost ten times as much on a CPU as these.
torch.library.define(
    OPERATOR,
    "(Tensor(a!) y, Tensor z, Tensor table, int column, Tensor index, Tensor U, int offset) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.register_fake(OPERATOR, _fake)
torch.library.impl(OPERATOR, "default", by_torch)
torch.library.impl(OPERATOR, "cuda", by_triton)


def _tile(size: int) -> int:
    """The power of two that covers `size`, within what tl.dot takes and registers hold."""
    return min(64, max(16, 1 << (size - 1).bit_length()))


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


@functools.cache
def _jit(program: Callable[..., None]) -> Kernel:
    # The number of tokens changes by the step: specialised on it, a step might wait for a compiler.
    kernel: Kernel = triton.jit(program, do_not_specialize=["tokens"])
    return kernel


def _core(
    h: "Tensor",
    z: "Tensor",
    table: "Tensor",
    index: "Tensor",
    zero: int,
    column: int,
    tokens: int,
    q: int,
    p: int,
    h_row: int,
    z_row: int,
    table_row: int,
    BT: constexpr,
    BQ: constexpr,
    BP: constexpr,
) -> None:
    """h[t] = z[t] @ C[index[t]], BP columns of it; rows of the base model stay unwritten.

    One program per token. Where the BT tokens around it share one core, the base model's aside,
    the first program of them does all in one product and the others leave.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BP + tl.arange(0, BP)
    inside = columns < p
    rows = token // BT * BT + tl.arange(0, BT)
    slots = tl.load(index + rows, mask=rows < tokens, other=zero).to(tl.int64)
    first = tl.min(slots, axis=0)
    last = tl.max(tl.where(slots == zero, -1, slots), axis=0)
    if first == last:
        if token % BT == 0:
            live = slots == first
            total = tl.zeros((BT, BP), tl.float32)
            for start in range(0, q, BQ):
                inner = start + tl.arange(0, BQ)
                known = inner < q
                place = z + rows[:, None] * z_row + inner[None, :]
                part = tl.load(place, mask=live[:, None] & known[None, :], other=0.0)
                place = table + first * table_row + column + inner[:, None] * p + columns[None, :]
                core = tl.load(place, mask=known[:, None] & inside[None, :], other=0.0)
                total = tl.dot(part, core, total, input_precision="ieee")
            place = h + rows[:, None] * h_row + columns[None, :]
            tl.store(place, total, mask=live[:, None] & inside[None, :])
    else:
        slot = tl.load(index + token).to(tl.int64)
        if slot != zero:
            total = tl.zeros((BP,), tl.float32)
            for start in range(0, q, BQ):
                inner = start + tl.arange(0, BQ)
                known = inner < q
                part = tl.load(z + token * z_row + inner, mask=known, other=0.0)
                place = table + slot * table_row + column + inner[:, None] * p + columns[None, :]
                core = tl.load(place, mask=known[:, None] & inside[None, :], other=0.0)
                total += tl.sum(part.to(tl.float32)[:, None] * core.to(tl.float32), axis=0)
            tl.store(h + token * h_row + columns, total, mask=inside)


def _expand(
    y: "Tensor",
    h: "Tensor",
    U: "Tensor",
    index: "Tensor",
    zero: int,
    offset: int,
    tokens: int,
    p: int,
    d: int,
    y_row: int,
    h_row: int,
    U_row: int,
    BT: constexpr,
    BP: constexpr,
    BD: constexpr,
) -> None:
    """y[t, offset : offset + d] += h[t] @ U^T, BT tokens and BD columns of it.

    Rows of the base model are neither read nor written; a block of nothing else costs one load.
    """
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = columns < d
    slots = tl.load(index + rows, mask=rows < tokens, other=zero)
    live = slots != zero
    if tl.min(slots, axis=0) != zero:
        total = tl.zeros((BT, BD), tl.float32)
        for start in range(0, p, BP):
            inner = start + tl.arange(0, BP)
            known = inner < p
            place = h + rows[:, None] * h_row + inner[None, :]
            part = tl.load(place, mask=live[:, None] & known[None, :], other=0.0)
            place = U + columns[None, :] * U_row + inner[:, None]
            basis = tl.load(place, mask=known[:, None] & inside[None, :], other=0.0)
            total = tl.dot(part, basis, total, input_precision="ieee")
        place = y + rows[:, None] * y_row + offset + columns[None, :]
        mask = live[:, None] & inside[None, :]
        tl.store(place, tl.load(place, mask=mask) + total, mask=mask)
