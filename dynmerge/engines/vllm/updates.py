"""Step and Update: what the layers add in the present forward pass.

The step is planned once; every layer's update follows it. Where addresses are fixed (`static`)
everything is decided by index buffers on the device: the work is one operator, a leaf to tracing
compilers, whose launches a CUDA graph may replay.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dynmerge.engines.vllm.forms import FORMS, Form
from dynmerge.engines.vllm.layer import Layer
from dynmerge.engines.vllm.residents import ResidentBank
from dynmerge.engines.vllm.slots import Rows
from dynmerge.engines.vllm.steps import NOWHERE, Run, assign

OPERATOR = "dynmerge::add_update"


@dataclass(frozen=True, eq=False)
class Table:
    """One form's slots in one version of the bank. Equal to itself only."""

    bank: ResidentBank
    form: Form

    @property
    def rows(self) -> Rows:
        """Which merge is in which row."""
        return self.bank.rows[self.form]

    @property
    def nowhere(self) -> int:
        """The row of tokens that have none: the last, which is zeros."""
        return self.rows.count


@dataclass(frozen=True, slots=True, eq=False)
class Need:
    """A table that the step's tokens need, and how; `runs` None where the host decides nothing."""

    table: Table
    index: Tensor  # (tokens,)
    runs: Sequence[Run] | None


class Step:
    """The forward pass at hand: every token's table and row."""

    def __init__(self, static: bool, max_tokens: int, device: torch.device) -> None:
        self.static = static
        self.places: dict[int, tuple[Table, int]] = {}
        self.tokens = 0
        self._needs: tuple[Need, ...] = ()
        self._device = device
        self._max_tokens = max_tokens
        self._buffers: dict[Table, Tensor] = {}

    def include(self, tables: Iterable[Table]) -> None:
        """Give tables index buffers for good, so that they are part of every captured step."""
        for table in tables:
            self._buffers[table] = torch.full(
                (self._max_tokens,), table.nowhere, dtype=torch.int64, device=self._device
            )

    def plan(self, numbers: Sequence[int]) -> None:
        """Point the tokens of the next forward pass at their rows; `numbers` are the merges'."""
        self.tokens = len(numbers)
        needs = []
        for table, found in assign(numbers, self.places).items():
            index = torch.from_numpy(found.index)
            index.masked_fill_(index == NOWHERE, table.nowhere)
            needs.append(Need(table, self._sent(index), found.runs))
        self._needs = tuple(self._buffered(needs) if self.static else needs)

    def needs(self) -> Iterable[Need]:
        """The tables that matter now: while a graph is captured all, else those tokens need."""
        if not (self._needs and self._is_captured()):
            return self._needs
        return [Need(table, buffer, None) for table, buffer in self._buffers.items()]

    def _sent(self, index: Tensor) -> Tensor:
        """On the device, without waiting for what runs there."""
        if self._device.type != "cuda":
            return index.to(self._device)
        return index.pin_memory().to(self._device, non_blocking=True)

    def _buffered(self, needs: Sequence[Need]) -> list[Need]:
        given = {need.table: need.index for need in needs}
        for table, buffer in self._buffers.items():
            index = given.get(table)
            if index is not None:
                buffer[: len(index)].copy_(index, non_blocking=True)
            # What pads the batch, and what an earlier step left, is nobody's.
            buffer[0 if index is None else len(index) :].fill_(table.nowhere)
        return [Need(need.table, self._buffers[need.table], None) for need in needs]

    def _is_captured(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()


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
            self.add(x, y)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Do so at once. Tables that no token needs cost nothing."""
        step = self._step
        if not step.static:
            if len(x) < step.tokens:
                raise RuntimeError(
                    f"{self._layer.name}: {len(x)} tokens came, {step.tokens} planned"
                )
            x, y = x[: step.tokens], y[: step.tokens]  # the rest pads the batch
        for need in step.needs():
            parts = need.table.bank.parts.get(self._layer.name, {})
            if need.table.form in parts:
                parts[need.table.form].add(x, y, need.index[: len(x)], need.runs)


def tables_of(bank: ResidentBank) -> Mapping[Form, Table]:
    """A version's tables."""
    return {form: Table(bank, form) for form in FORMS}


# An operator takes tensors and numbers only: layers are known to it by number.
_UPDATES: "WeakValueDictionary[int, Update]" = WeakValueDictionary()


def _register(update: Update) -> int:
    handle = max(_UPDATES, default=0) + 1
    _UPDATES[handle] = update
    return handle


def _add_update(y: Tensor, x: Tensor, handle: int) -> None:
    _UPDATES[handle].add(x, y)


def _fake(y: Tensor, x: Tensor, handle: int) -> None:
    """Nothing is returned, and y keeps its shape."""


# As in `kernels.py`: torch.library.custom_op's calls cost ten times as much.
torch.library.define(
    OPERATOR,
    "(Tensor(a!) y, Tensor x, int handle) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.register_fake(OPERATOR, _fake)
torch.library.impl(OPERATOR, "default", _add_update)
