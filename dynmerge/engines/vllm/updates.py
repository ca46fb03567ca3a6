"""Step and Update: what the layers add in the present forward pass.

The step is planned once; every layer's update follows it. Where addresses are fixed (`static`)
everything is decided by index buffers on the device: the work is one custom op, a leaf to tracing
compilers, whose launches a CUDA graph may replay.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dynmerge.engines.vllm.forms import FORMS, Form
from dynmerge.engines.vllm.layer import Layer
from dynmerge.engines.vllm.residents import Resident
from dynmerge.engines.vllm.slots import Rows
from dynmerge.engines.vllm.steps import NOWHERE, Run, assign, joined
from dynmerge.engines.vllm.tables import Pieces


@dataclass(frozen=True, eq=False)
class Table:
    """One form's slots in one version of the bank. Equal to itself only."""

    resident: Resident
    form: Form

    @property
    def rows(self) -> Rows:
        """Which merge is in which row."""
        return self.resident.rows[self.form]

    @property
    def nowhere(self) -> int:
        """The row of tokens that have none: the last, which is zeros."""
        return self.resident.slots.of(self.form)


@dataclass(frozen=True, slots=True, eq=False)
class Need:
    """A table that the step's tokens need, and how."""

    table: Table
    index: Tensor  # (tokens,)
    runs: Sequence[Run] = ()
    pieces: Pieces = ()


class Step:
    """The forward pass at hand: every token's table and row."""

    def __init__(self, static: bool, max_tokens: int, device: torch.device) -> None:
        self.static = static
        self.places: dict[int, tuple[Table, int]] = {}
        self.tokens = 0
        self.needs: tuple[Need, ...] = ()
        self._device = device
        self._max_tokens = max_tokens
        self._buffers: dict[Table, Tensor] = {}

    def include(self, tables: Iterable[Table]) -> None:
        """Give tables index buffers, so that they are part of every static step."""
        for table in tables:
            self._buffers[table] = torch.full(
                (self._max_tokens,), table.nowhere, dtype=torch.int64, device=self._device
            )

    def forget(self, tables: Iterable[Table]) -> None:
        """Tables that are no more."""
        for table in tables:
            self._buffers.pop(table, None)
        self.needs = ()

    def plan(self, numbers: Sequence[int]) -> None:
        """Point the tokens of the next forward pass at their rows; `numbers` are the merges'."""
        found = assign(numbers, self.places)
        needs = []
        for table, assignment in found.items():
            index = torch.from_numpy(assignment.index)
            index.masked_fill_(index == NOWHERE, table.nowhere)
            runs = assignment.runs
            needs.append(Need(table, index.to(self._device), runs, joined(runs)))
        self.needs, self.tokens = tuple(needs), len(numbers)
        if self.static:
            self._write_buffers()

    def _write_buffers(self) -> None:
        given = {need.table: need.index for need in self.needs}
        for table, buffer in self._buffers.items():
            index = given.get(table)
            if index is not None:
                buffer[: len(index)].copy_(index)
            # What pads the batch, and what an earlier step left, is nobody's.
            buffer[0 if index is None else len(index) :].fill_(table.nowhere)

    def static_needs(self) -> Iterable[Need]:
        """What a static step does: all tables while a graph is captured, else those needed."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            tables: Iterable[Table] = self._buffers if self.needs else ()
        else:
            tables = [need.table for need in self.needs]
        return [Need(table, self._buffers[table]) for table in tables]


class Update:
    """What is added to one layer's output."""

    def __init__(self, layer: Layer, step: Step) -> None:
        self._layer = layer
        self._step = step
        self._handle = _register(self)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """y (tokens, d_out) += every token's update of x (tokens, d_in)."""
        if self._step.static:
            torch.ops.dynmerge.add_update(y, x, self._handle)
        else:
            self.add_planned(x, y)

    def add_planned(self, x: Tensor, y: Tensor) -> None:
        """By the host's plan: tables that no token needs cost nothing."""
        step = self._step
        if not step.needs:
            return
        if len(x) < step.tokens:
            raise RuntimeError(f"{self._layer.name}: {len(x)} tokens came, {step.tokens} planned")
        x, y = x[: step.tokens], y[: step.tokens]  # the rest pads the batch
        for need in step.needs:
            parts = need.table.resident.parts.get(self._layer.name)
            if parts is None:
                continue
            if need.table.form == "diagonal":
                parts.diagonal.add(x, y, need.index)
            elif need.table.form == "core" and parts.core is not None:
                parts.core.add(x, y, need.pieces, need.index)
            elif parts.own is not None:
                parts.own.add(x, y, need.runs)

    def add_static(self, x: Tensor, y: Tensor) -> None:
        """By the index buffers."""
        for need in self._step.static_needs():
            parts = need.table.resident.parts.get(self._layer.name)
            if parts is None:
                continue
            index = need.index[: len(x)]
            if need.table.form == "diagonal":
                parts.diagonal.add(x, y, index)
            elif need.table.form == "core" and parts.core is not None:
                parts.core.add_static(x, y, index)
            elif parts.own is not None:
                parts.own.add_static(x, y, index)


def tables_of(resident: Resident) -> dict[Form, Table]:
    """A version's tables."""
    return {form: Table(resident, form) for form in FORMS}


# An op takes tensors and numbers only: layers are known to it by number.
_UPDATES: "WeakValueDictionary[int, Update]" = WeakValueDictionary()


def _register(update: Update) -> int:
    handle = max(_UPDATES, default=0) + 1
    _UPDATES[handle] = update
    return handle


@torch.library.custom_op("dynmerge::add_update", mutates_args=("y",))
def add_update(y: Tensor, x: Tensor, handle: int) -> None:
    """Add a layer's updates to `y` in place."""
    _UPDATES[handle].add_static(x, y)


@add_update.register_fake
def _(y: Tensor, x: Tensor, handle: int) -> None:
    return None
