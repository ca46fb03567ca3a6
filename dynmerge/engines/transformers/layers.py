"""Layers: adds U (C (V^T x)) to each linear layer the bank knows, every token under its own C.

A merge that left the shared bases adds B (A x) with factors of its own instead. The base model's
weights are read and never written. A step's plan is made once, before the forward pass, and the
hooks only follow it. A core is held as C^T (q, p): activations come in rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn

from dynmerge.adapters.lowrank import LowRank
from dynmerge.bank.bank import CoreLayout, FactorBank, ModuleFactors
from dynmerge.bank.target import target
from dynmerge.errors import BankError
from dynmerge.merging.merge import Merge

BASE = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, stop) under rows [row, row + rows): one row for all of them, or one each."""

    start: int
    stop: int
    row: int
    rows: int


@dataclass(frozen=True, slots=True, eq=False)
class Outside:
    """Tokens [start, stop) under a merge with factors of its own, by module name."""

    start: int
    stop: int
    updates: Mapping[str, LowRank]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """How one batch maps to cores. `cores[module]` is what `whole` or `each` multiplies with."""

    tokens: int
    kind: Literal["whole", "each", "pieces", "none"]  # one core for all tokens; one per token
    cores: Sequence[Tensor]
    pieces: tuple[Piece, ...] = ()
    outside: tuple[Outside, ...] = ()


class CoreRows:
    """The cores of the requests in the batch: row i of every module is request i's.

    A row is written only when another merge takes its place. One module's rows lie side by side, so
    that they are read in one sweep.
    """

    def __init__(self, layout: CoreLayout, rows: int, dtype: torch.dtype, device: torch.device):
        self._digests: list[str | None] = [BASE] * rows  # None: half written
        # Neighbours of equal shape share a block (modules, rows, q, p), written in one copy.
        self._blocks: list[tuple[slice, Tensor]] = []
        self.views: list[Tensor] = []  # (rows, q, p) per module
        for (p, q), run in groupby(layout.spans(), key=lambda span: span[1]):
            spans = [span for span, _ in run]
            block = torch.zeros(len(spans), rows, q, p, dtype=dtype, device=device)
            self._blocks.append((slice(spans[0].start, spans[-1].stop), block))
            self.views.extend(block)

    def place(self, merges: Sequence[Merge | None]) -> None:
        """Make row i hold the cores of merges[i]."""
        written = False
        for row, merge in enumerate(merges):
            digest = digest_of(merge)
            if self._digests[row] != digest:
                self._digests[row] = None
                self._write(row, merge)
                self._digests[row] = digest
                written = True
        device = self.views[0].device
        if written and device.type == "cuda":
            # The forward pass runs on a stream of its own.
            torch.cuda.current_stream(device).synchronize()

    def _write(self, row: int, merge: Merge | None) -> None:
        for span, block in self._blocks:
            modules, _, q, p = block.shape
            if merge is None or merge.core is None:
                block[:, row].zero_()
            else:
                block[:, row].copy_(merge.core[span].view(modules, p, q).mT)


class Layers:
    """One bank on one model: the shared bases in its dtype, a hook on every layer they change."""

    def __init__(self, model: nn.Module, bank: FactorBank, max_batch: int) -> None:
        weight = next(model.parameters())
        self.dtype, self.device = weight.dtype, weight.device
        self.plan: Plan | None = None  # what the hooks follow; None: they do nothing
        self._made: tuple[tuple[object, ...], Plan] | None = None  # the last, and what it was for
        self._rows = CoreRows(bank.layout, max_batch, self.dtype, self.device)
        targets = [target(model, module) for module in bank.modules]
        self._first = targets[0], bank.modules[0]
        self._hooks = [
            layer.register_forward_hook(self._hook(index, module))
            for index, (layer, module) in enumerate(zip(targets, bank.modules, strict=True))
        ]

    def check(self) -> None:
        """Raise BankError unless a hooked layer gives W x + U (C (V^T x)) for a random C.

        Finds a layer whose forward pass is not what hooks expect, without writing a weight.
        """
        generator = torch.Generator().manual_seed(0)
        layer, module = self._first
        d_in = module.V.shape[0]
        core = torch.randn(module.core_shape, generator=generator)
        x = torch.randn(1, 3, d_in, generator=generator).to(self.device, self.dtype)
        with torch.no_grad():
            plain = layer(x)
            self.plan = Plan(3, "whole", [core.mT.to(self.device, self.dtype)])
            found = layer(x) - plain
            self.clear()
        U, V = module.U.to(self.device), module.V.to(self.device)
        wanted = x.float() @ V @ core.mT.to(self.device) @ U.mT
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.1
        size = wanted.abs().max() + plain.abs().max()
        if (found.float() - wanted).abs().max() > tolerance * size:
            raise BankError(f"{module.name} does not add its update: the model runs it otherwise")

    def prepare(self, merges: Sequence[Merge | None], lengths: Sequence[int]) -> None:
        """Plan the next forward pass: request i has lengths[i] tokens in a row, under merges[i]."""
        digests = [digest_of(merge) for merge in merges]
        if not any(digests):
            self.plan = None
            return
        key = (*digests, *lengths)
        if self._made is None or self._made[0] != key:
            self._made = None  # its rows are about to change
            self.plan = self._planned(merges, lengths)
            if not self.plan.outside:  # kept, it would hold a merge that the cache has let go
                self._made = key, self.plan
        else:
            self.plan = self._made[1]

    def clear(self) -> None:
        """Leave the model as it was, until the next plan."""
        self.plan = None

    def remove(self) -> None:
        """Take the hooks off the model."""
        self.clear()
        for hook in self._hooks:
            hook.remove()

    def _planned(self, merges: Sequence[Merge | None], lengths: Sequence[int]) -> Plan:
        tokens, outside = sum(lengths), outsiders(merges, lengths)
        if outside and self.device.type == "cuda":
            # Made on another stream than the one the forward pass runs on.
            torch.cuda.current_stream(self.device).synchronize()
        shared = [None if merge is None or merge.core is None else merge for merge in merges]
        digests = [digest_of(merge) for merge in shared]
        if not any(digests):
            return Plan(tokens, "none", (), outside=outside)
        if len(set(digests)) == 1:
            self._rows.place(shared[:1])
            return Plan(tokens, "whole", [view[0] for view in self._rows.views])
        self._rows.place(shared)
        if tokens == len(shared):
            cores = [view[:tokens] for view in self._rows.views]
            return Plan(tokens, "each", cores, outside=outside)
        return Plan(tokens, "pieces", self._rows.views, pieces(digests, lengths), outside)

    def _hook(
        self, index: int, module: ModuleFactors
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        V = module.V.to(self.device, self.dtype).contiguous()  # (d_in, q)
        UT = module.U.mT.to(self.device, self.dtype).contiguous()  # (p, d_out)
        d_in, d_out = V.shape[0], UT.shape[1]

        def add_update(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            plan = self.plan
            if plan is None:
                return
            x, y = inputs[0].reshape(-1, d_in), output.view(-1, d_out)
            if len(x) != plan.tokens:
                raise RuntimeError(f"{module.name}: {len(x)} tokens came, {plan.tokens} planned")
            # A linear layer's output is fresh: nothing else sees it yet.
            if plan.kind != "none":
                y.addmm_(_through(x.mm(V), plan, index), UT)
            for piece in plan.outside:
                update = piece.updates.get(module.name)
                if update is not None:
                    part = x[piece.start : piece.stop].mm(update.A.mT)
                    y[piece.start : piece.stop].addmm_(part, update.B.mT)

        return add_update


def digest_of(merge: Merge | None) -> str:
    """The merge's name; BASE for the base model, whose preference may also be spelled out."""
    return BASE if merge is None or merge.recipe.is_base else merge.recipe.digest


def pieces(digests: Sequence[str], lengths: Sequence[int]) -> tuple[Piece, ...]:
    """The batch in the fewest pieces: runs of single tokens, and runs of requests under one merge.

    Tokens of the base model are in no piece.
    """
    found: list[Piece] = []
    row, start = 0, 0
    for (single, digest), run in groupby(
        zip(digests, lengths, strict=True),
        key=lambda request: (request[1] == 1, None if request[1] == 1 else request[0]),
    ):
        members = [length for _, length in run]
        stop = start + sum(members)
        if single:
            found.append(Piece(start, stop, row, len(members)))
        elif digest != BASE:
            found.append(Piece(start, stop, row, 1))
        row, start = row + len(members), stop
    return tuple(found)


def outsiders(merges: Sequence[Merge | None], lengths: Sequence[int]) -> tuple[Outside, ...]:
    """The runs of tokens under one merge with factors of its own."""
    found: list[Outside] = []
    stop = 0
    for merge, length in zip(merges, lengths, strict=True):
        start, stop = stop, stop + length
        if merge is None or merge.own is None:
            continue
        if found and found[-1].stop == start and found[-1].updates is merge.own:
            start = found.pop().start
        found.append(Outside(start, stop, merge.own))
    return tuple(found)


def _through(z: Tensor, plan: Plan, index: int) -> Tensor:
    """(tokens, p): z (tokens, q) times the cores of module `index`."""
    cores = plan.cores[index]
    if plan.kind == "each":
        return torch.bmm(z.unsqueeze(1), cores).squeeze(1)
    if plan.kind == "whole":
        return z.mm(cores)
    return _piecewise(z, cores, plan.pieces)


def _piecewise(z: Tensor, cores: Tensor, plan: tuple[Piece, ...]) -> Tensor:
    """(tokens, p): each piece of z (tokens, q) times its own cores (rows, q, p); 0 elsewhere."""
    result = z.new_zeros(len(z), cores.shape[2])
    for piece in plan:
        part = z[piece.start : piece.stop]
        if piece.rows == 1:
            result[piece.start : piece.stop] = part.mm(cores[piece.row])
        else:
            own = cores[piece.row : piece.row + piece.rows]
            result[piece.start : piece.stop] = torch.bmm(part.unsqueeze(1), own).squeeze(1)
    return result
