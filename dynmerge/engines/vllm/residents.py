"""ResidentBank: one version of a bank on this rank: its shared factors and its tables of slots."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dynmerge.bank.bank import FactorBank, ModuleFactors
from dynmerge.engines.vllm.assembly import Status, ready
from dynmerge.engines.vllm.config import Slots
from dynmerge.engines.vllm.forms import FORMS, Form
from dynmerge.engines.vllm.layer import Layer
from dynmerge.engines.vllm.slots import Rows
from dynmerge.engines.vllm.tables import CorePart, DiagonalPart, Expand, OwnPart, Part
from dynmerge.errors import BankError
from dynmerge.merging.carried.merges import calibration_tensors, check_calibrations
from dynmerge.merging.diagonal import Diagonal
from dynmerge.merging.merge import Merge, Merger
from dynmerge.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Width:
    """Room for one slice's factors: stacked ranks K, bases' widths p and q, and own factors' r."""

    K: int
    p: int
    q: int
    r: int


class ResidentBank:
    """A bank's version in a rank's memory. Its tensors are allocated once and written in place."""

    def __init__(
        self,
        layers: Sequence[Layer],
        widths: Sequence[Sequence[Width]],
        slots: Slots,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Room for banks that fit `widths`, which has one for every slice of every layer."""
        self.layers = tuple(layers)
        self.widths = widths
        self.slots = slots
        self.rows = {form: Rows(slots.rows(form)) for form in FORMS}
        self._dtype, self._device = dtype, device
        flat = [width for row in widths for width in row]
        # One column more than any layer has, for modules that are on another pipeline stage.
        self._diagonals = self._new(slots.rows("diagonal") + 1, sum(width.K for width in flat) + 1)
        self._cores = self._new(
            slots.rows("core") + 1, sum(width.p * width.q for width in flat) + 1
        )
        # By layer; a form is absent where there are no slots of it.
        self.parts: dict[str, dict[Form, Part]] = {
            layer.name: parts for layer, parts in zip(self.layers, self._allocated(), strict=True)
        }
        self.bank: FactorBank | None = None
        self._learned: tuple[Tensor, ...] = ()
        self.status: dict[tuple[Form, int], Status] = {}  # of the merges that were prepared

    def load(self, bank: FactorBank) -> None:
        """Write a bank's factors.

        Raises BankError, with nothing written, where they do not fit or its calibrations do not
        hold what their methods read.
        """
        check_fit(bank, self.layers, self.widths)
        check_calibrations(bank)
        modules = {module.name: module for module in bank.modules}
        for layer, widths in zip(self.layers, self.widths, strict=True):
            self._write(layer, [modules.get(name or "") for name in layer.modules], widths)
        for rows in self.rows.values():
            rows.clear()
        self.bank = bank.to(self._device, bases=False)
        self._learned = tuple(calibration_tensors(self.bank))  # now, where memory is counted
        self.merger = Merger(self.bank, self._dtype)
        self._diagonal = Diagonal(self.bank)
        self._diagonal_places = self._places(bank, lambda width: width.K, _stacked)
        self._core_places = self._places(bank, lambda width: width.p * width.q, _core)

    @property
    def digest(self) -> str:
        """The bank's."""
        assert self.bank is not None
        return self.bank.digest

    @property
    def base(self) -> str:
        """The fingerprint of the bank's base model."""
        assert self.bank is not None
        return self.bank.base.fingerprint

    @property
    def nbytes(self) -> int:
        """Device bytes of factors, tables and calibrations."""
        modules = self.bank.modules if self.bank else ()
        factors = (factor for module in modules for factor in (module.left, module.right))
        found = (*self._tensors(), *self._learned, *factors)
        tensors = {id(tensor): tensor for tensor in found}
        return sum(tensor.nbytes for tensor in tensors.values())

    def write_diagonal(self, row: int, recipe: Recipe) -> None:
        """Make a row hold a merge of diagonal form, assembled here."""
        self._diagonals[row, self._diagonal_places] = self._diagonal.of(recipe).to(self._diagonals)

    def write(self, form: Form, row: int, merge: Merge) -> None:
        """Make a row hold a merge of another form."""
        if form == "core":
            assert merge.core is not None
            self._cores[row, self._core_places] = merge.core.to(self._cores)
        else:
            self._write_own(row, merge)
        self.status[form, row] = ready(merge)

    def _write_own(self, row: int, merge: Merge) -> None:
        updates = merge.own or {}
        for layer in self.layers:
            own = self.parts[layer.name]["own"]
            assert isinstance(own, OwnPart)
            found = [updates.get(name or "") for name in layer.modules]
            downs = layer.down([None if update is None else update.A for update in found])
            ups = layer.up([None if update is None else update.B for update in found])
            for A, B, down, up in zip(own.A, own.B, downs, ups, strict=True):
                A[row].zero_()
                B[row].zero_()
                if down is not None and up is not None:
                    A[row, : len(down)].copy_(down)
                    B[row, :, : up.shape[1]].copy_(up)

    def _new(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def _allocated(self) -> Iterator[dict[Form, Part]]:
        diagonals = cores = 0
        for layer, widths in zip(self.layers, self.widths, strict=True):
            stacked = [width.K for width in widths]
            columns = slice(diagonals, diagonals + sum(stacked))
            parts: dict[Form, Part] = {
                "diagonal": DiagonalPart(
                    self._new(layer.d_in, sum(stacked)),
                    self._expands(layer, stacked, stacked),
                    self._diagonals[:, columns],
                )
            }
            if self.slots.core:
                parts["core"] = self._core_part(layer, widths, cores)
            if self.slots.own:
                parts["own"] = self._own_part(layer, widths)
            diagonals += sum(stacked)
            cores += sum(width.p * width.q for width in widths)
            yield parts

    def _core_part(self, layer: Layer, widths: Sequence[Width], first: int) -> CorePart:
        inner = [width.q for width in widths]
        expands = self._expands(layer, inner, [width.p for width in widths])
        ends = accumulate((width.p * width.q for width in widths), initial=first)
        places = [end for end, width in zip(ends, widths, strict=False) if width.q]
        return CorePart(self._new(layer.d_in, sum(inner)), expands, self._cores, tuple(places))

    def _own_part(self, layer: Layer, widths: Sequence[Width]) -> OwnPart:
        spans = layer.spans
        A = [self._new(self.slots.rows("own"), width.r, layer.d_in) for width in widths]
        B = [
            self._new(self.slots.rows("own"), span.stop - span.start, width.r)
            for span, width in zip(spans, widths, strict=True)
        ]
        return OwnPart(spans, tuple(A), tuple(B))

    def _expands(
        self, layer: Layer, inner: Sequence[int], outer: Sequence[int]
    ) -> tuple[Expand, ...]:
        """Of each slice that has any columns: `inner` of A x, and `outer` before the expansion."""
        found, start = [], 0
        for outputs, columns, width in zip(layer.spans, inner, outer, strict=True):
            if columns:
                up = self._new(outputs.stop - outputs.start, width)
                found.append(Expand(slice(start, start + columns), outputs, up))
            start += columns
        return tuple(found)

    def _write(
        self,
        layer: Layer,
        modules: Sequence[ModuleFactors | None],
        widths: Sequence[Width],
    ) -> None:
        parts = self.parts[layer.name]
        diagonal, core = parts["diagonal"], parts.get("core")
        assert isinstance(diagonal, DiagonalPart)
        # In float64: a product of two factors is rounded once, into the engine's dtype.
        A = [None if m is None else m.right.double() @ m.V.double().mT for m in modules]
        B = [None if m is None else m.U.double() @ m.left.double() for m in modules]
        sizes = [width.K for width in widths]
        _fill(diagonal.down, diagonal.expands, layer.down(A), layer.up(B), sizes)
        if isinstance(core, CorePart):
            V = [None if m is None else m.V.mT for m in modules]
            U = [None if m is None else m.U for m in modules]
            sizes = [width.q for width in widths]
            _fill(core.down, core.expands, layer.down(V), layer.up(U), sizes)

    def _places(
        self,
        bank: FactorBank,
        room: Callable[[Width], int],
        within: Callable[[ModuleFactors, Width], Tensor],
    ) -> Tensor:
        """Where a merge's numbers, modules in the bank's order, stand in a row of the table."""
        starts: dict[str | None, tuple[int, Width]] = {}
        start = 0
        for layer, widths in zip(self.layers, self.widths, strict=True):
            for name, width in zip(layer.modules, widths, strict=True):
                starts[name] = (start, width)
                start += room(width)
        found = []
        for module in bank.modules:
            if module.name in starts:
                first, width = starts[module.name]
                found.append(first + within(module, width))
            else:
                p, q = module.core_shape
                found.append(torch.full_like(within(module, Width(0, p, q, 0)), start))
        return torch.cat(found).to(self._device)

    def _tensors(self) -> Iterator[Tensor]:
        yield self._diagonals
        yield self._cores
        for parts in self.parts.values():
            for part in parts.values():
                if isinstance(part, OwnPart):
                    yield from (*part.A, *part.B)
                elif isinstance(part, DiagonalPart | CorePart):
                    yield part.down
                    yield from (each.up for each in part.expands)


def widths_of(
    bank: FactorBank, layers: Sequence[Layer], own_rank: int, spare: int = 0
) -> list[list[Width]]:
    """Room for `bank`, and for `spare` ranks more in every slice."""
    modules = {module.name: module for module in bank.modules}

    def width(name: str | None) -> Width:
        module = modules.get(name or "")
        if module is None:
            return Width(spare, spare, spare, own_rank + spare if spare else 0)
        (d_out, p), (d_in, q) = module.U.shape, module.V.shape
        return Width(
            sum(module.ranks) + spare,
            min(d_out, p + spare),
            min(d_in, q + spare),
            min(own_rank + spare, d_out, d_in),
        )

    return [[width(name) for name in layer.modules] for layer in layers]


def check_fit(bank: FactorBank, layers: Sequence[Layer], widths: Sequence[Sequence[Width]]) -> None:
    """Raise BankError unless the bank's factors have room in `widths`."""
    room = {
        name: width
        for layer, row in zip(layers, widths, strict=True)
        for name, width in zip(layer.modules, row, strict=True)
    }
    for module in bank.modules:
        width = room.get(module.name)
        K, (p, q) = sum(module.ranks), module.core_shape
        if width is not None and (K > width.K or p > width.p or q > width.q):
            raise BankError(
                f"{module.name} has {K} ranks, where this server set aside {width.K} when it "
                "started: start it with spare_rank, or with this bank"
            )


def _fill(
    down: Tensor,
    expands: Sequence[Expand],
    downs: Sequence[Tensor | None],
    ups: Sequence[Tensor | None],
    sizes: Sequence[int],
) -> None:
    down.zero_()
    for each in expands:
        each.up.zero_()
    given = [
        (low, high) for low, high, size in zip(downs, ups, sizes, strict=True) if size
    ]  # an Expand each
    for each, (low, high) in zip(expands, given, strict=True):
        if low is not None and high is not None:
            start = each.columns.start
            down[:, start : start + len(low)].copy_(low.mT)
            each.up[:, : high.shape[1]].copy_(high)


def _stacked(module: ModuleFactors, width: Width) -> Tensor:
    return torch.arange(sum(module.ranks))


def _core(module: ModuleFactors, width: Width) -> Tensor:
    """A core is flat as (p, q) in a merge and as (q, p), wider, in the table."""
    p, q = module.core_shape
    return (torch.arange(q)[None] * width.p + torch.arange(p)[:, None]).flatten()
