"""FactorBank: the skills of one base model as shared bases and small cores, resident on a device;
immutable.

For one module with task updates Δ_i = B_i A_i the bank holds orthonormal bases U of all B_i and V
of all A_i^T, and each task's factors in them, B_i = U left_i and A_i = right_i V^T. A task's core
is M_i = left_i right_i, and Δ_i = U M_i V^T without loss. Knows no files, preferences or methods.
"""

import hashlib
import json
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import TypeVar, cast

import torch
from torch import Tensor

from dynmerge.bank.calibration import Calibration
from dynmerge.errors import BankError

FORMAT = 2
Kept = TypeVar("Kept")


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """Which base model a bank is for: its name, and a fingerprint of its weights."""

    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Task:
    """An adapter under its name in a bank. `digest` is the adapter's content digest."""

    name: str
    digest: str
    provenance: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class ModuleFactors:
    """One linear layer: shared bases, and every task's factors in them, stacked over tasks.

    `ranks[i]` is task i's rank here, 0 where it leaves this module alone; K = sum(ranks). `soup`
    are weights that somebody learned for the tasks here (`lora-soups`), if any.
    """

    name: str
    U: Tensor  # (d_out, p), orthonormal columns
    V: Tensor  # (d_in, q), orthonormal columns
    left: Tensor  # (p, K): task i's columns are U^T B_i
    right: Tensor  # (K, q): task i's rows are A_i V
    ranks: tuple[int, ...]
    soup: tuple[float, ...] | None = None

    @property
    def core_shape(self) -> tuple[int, int]:
        """(p, q)."""
        return self.U.shape[1], self.V.shape[1]

    def slices(self) -> list[slice]:
        """Where each task stands in the stacked rank dimension K."""
        ends = [sum(self.ranks[:index]) for index in range(len(self.ranks) + 1)]
        return [slice(start, end) for start, end in pairwise(ends)]

    def core(self, task: int) -> Tensor:
        """M_i (p, q), task i's update in the shared bases."""
        span = self.slices()[task]
        return self.left[:, span] @ self.right[span]


@dataclass(frozen=True, slots=True)
class CoreLayout:
    """How all modules' cores lie in one flat vector of `size` numbers, module after module."""

    shapes: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Numbers in one merge: the sum of p * q."""
        return sum(p * q for p, q in self.shapes)

    def spans(self) -> Iterator[tuple[slice, tuple[int, int]]]:
        """Per module, its place in the flat vector and its (p, q)."""
        start = 0
        for p, q in self.shapes:
            yield slice(start, start + p * q), (p, q)
            start += p * q

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views (..., p, q) per module of `flat` (..., size)."""
        return [flat[..., span].view(*flat.shape[:-1], *shape) for span, shape in self.spans()]


@dataclass(frozen=True, slots=True, eq=False)
class FactorGroup:
    """Modules alike in p, q and every task's rank, stacked, so that one product serves them all.

    K is the sum of `ranks`; a rank is 0 where a task leaves these modules alone.
    """

    members: tuple[int, ...]  # their places in the bank
    left: Tensor  # (members, p, K)
    right: Tensor  # (members, K, q)
    ranks: tuple[int, ...]
    soups: Tensor | None = None  # (members, tasks)

    @property
    def present(self) -> list[int]:
        """The tasks that change these modules."""
        return [task for task, rank in enumerate(self.ranks) if rank]

    def of(self, task: int) -> tuple[Tensor, Tensor]:
        """One task's left (members, p, r) and right (members, r, q)."""
        start = sum(self.ranks[:task])
        span = slice(start, start + self.ranks[task])
        return self.left[:, :, span], self.right[:, span]

    def cores(self) -> Tensor:
        """(members, tasks, p, q): every task's core M_i."""
        return torch.stack([torch.matmul(*self.of(task)) for task in range(len(self.ranks))], 1)

    def per_direction(self, weights: Tensor) -> Tensor:
        """(K,): each task's weight of `weights` (tasks,), at each of its stacked directions."""
        ranks = torch.tensor(self.ranks, device=weights.device)
        return weights.repeat_interleave(ranks, output_size=sum(self.ranks))

    def weighted(self, weights: Tensor) -> Tensor:
        """(members, p, q): sum_i weights_i M_i, in one product."""
        return (self.left * self.per_direction(weights)) @ self.right

    def norms(self) -> Tensor:
        """(members, tasks): ||Delta_i||, Frobenius, from the factors."""
        factors = [self.of(task) for task in range(len(self.ranks))]
        squares = [((left.mT @ left) * (right @ right.mT)).sum((-2, -1)) for left, right in factors]
        return torch.stack(squares, 1).clamp(min=0).sqrt()


@dataclass(frozen=True, eq=False)
class FactorBank:
    """Every task's factors in shared bases, float32, on one device; immutable, named by its digest.

    Tasks are sorted by name and modules by `module_order`, so that the order in which adapters were
    given does not matter. Beside the factors it carries what was learned for them: at most one
    calibration for each method.
    """

    base: BaseIdentity
    tasks: tuple[Task, ...]
    modules: tuple[ModuleFactors, ...]
    calibrations: tuple[Calibration, ...] = ()  # sorted by method

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if not names or names != sorted(set(names)):
            raise BankError(f"a bank's tasks are distinct and sorted by name; these are {names}")
        if not self.modules:
            raise BankError("a bank holds at least one module")
        if any((module.soup is None) == self.has_soups for module in self.modules):
            raise BankError("a bank has learned weights for all of its modules, or for none")
        self._check_calibrations()

    def _check_calibrations(self) -> None:
        methods = [calibration.method for calibration in self.calibrations]
        if methods != sorted(set(methods)):
            raise BankError(f"a bank's calibrations are one per method, sorted; these: {methods}")
        names = [module.name for module in self.modules]
        for each in self.calibrations:
            if each.factors != self.coordinates_digest:
                raise BankError(
                    f"the calibration for {each.method} was made for the factors "
                    f"{each.factors[:12]}, not for this bank's, {self.coordinates_digest[:12]}: "
                    "calibrate this bank"
                )
            if each.at is not None and len(each.at) != len(self.tasks):
                raise BankError(
                    f"the calibration for {each.method} serves a preference over {len(each.at)} "
                    f"skills; this bank has {len(self.tasks)}"
                )
            each.check(names, self._alike)

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks' names, sorted: the order of every vector over tasks."""
        return tuple(task.name for task in self.tasks)

    @cached_property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """By task, the distinct ranks over the modules it touches, ascending."""
        return distinct_ranks([module.ranks for module in self.modules])

    @property
    def device(self) -> torch.device:
        """Where the factors are, and so where merges are made."""
        return self.modules[0].left.device

    @cached_property
    def digest(self) -> str:
        """SHA-256 over what determines every merge: the factors, and what was learned for them."""
        if not self.calibrations:
            return self.factors_digest
        learned = [[each.method, each.digest] for each in self.calibrations]
        fields = {"factors": self.factors_digest, "calibrations": learned}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    @cached_property
    def factors_digest(self) -> str:
        """SHA-256 over format, base fingerprint, adapters' content and learned soup weights."""
        fields: dict[str, object] = {
            "format": FORMAT,
            "base": self.base.fingerprint,
            "tasks": [[task.name, task.digest] for task in self.tasks],
        }
        if self.has_soups:
            fields["soups"] = [[module.name, module.soup] for module in self.modules]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    @cached_property
    def coordinates_digest(self) -> str:
        """SHA-256 over the factors' digest and every module's `left` and `right` as stored.

        What was learned for directions holds for these. Bases of the same adapters may differ by a
        rotation where singular values are equal, so that the content alone does not say them.
        """
        hashed = hashlib.sha256(self.factors_digest.encode())
        for module in self.modules:
            for factor in (module.left, module.right):
                stored = factor.detach().to("cpu", torch.float32).contiguous()
                hashed.update(stored.flatten().numpy().data)
        return hashed.hexdigest()

    @property
    def has_soups(self) -> bool:
        """Whether it carries learned weights for `lora-soups`: for all modules, or for none."""
        return self.modules[0].soup is not None

    @property
    def carries(self) -> tuple[str, ...]:
        """What methods may need: soups, and the methods that it carries a calibration for."""
        return (*(("soups",) if self.has_soups else ()), *self.calibrated)

    @property
    def calibrated(self) -> tuple[str, ...]:
        """The methods that it carries a calibration for."""
        return tuple(each.method for each in self.calibrations)

    @property
    def fixed_at(self) -> Mapping[str, tuple[float, ...]]:
        """Of those that serve one preference only, by method: that preference, (tasks,)."""
        return {each.method: each.at for each in self.calibrations if each.at is not None}

    def calibration(self, method: str) -> Calibration:
        """What was learned for `method`. Raises BankError where nothing was."""
        for each in self.calibrations:
            if each.method == method:
                return each
        known = ", ".join(self.calibrated) or "none"
        raise BankError(f"the bank carries no calibration for {method} (it has: {known})")

    def learned(self, method: str) -> tuple[Mapping[str, Tensor], ...]:
        """Its tensors for each of `groups`: label -> (members, ...), or unstacked where shared."""

        def stacked() -> tuple[Mapping[str, Tensor], ...]:
            calibration, names = self.calibration(method), [module.name for module in self.modules]
            return tuple(calibration.stacked([names[m] for m in each]) for each in self._alike)

        return self.keep(("learned", method), stacked)

    def keep(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """What `make` returned the first time `key` was asked for; it follows from the bank alone.

        Two threads may both make it, to the same bits.
        """
        if key not in self._kept:
            self._kept[key] = make()
        return cast("Kept", self._kept[key])

    @cached_property
    def _kept(self) -> dict[Hashable, object]:
        return {}

    @cached_property
    def directions(self) -> tuple[Tensor, Tensor]:
        """The module and the task of every stacked direction, modules in order; (sum K,) each."""
        ranks = torch.tensor([module.ranks for module in self.modules])
        modules, tasks = ranks.shape
        counts = ranks.flatten()
        each = torch.arange(modules).repeat_interleave(tasks).repeat_interleave(counts)
        task = torch.arange(tasks).repeat(modules).repeat_interleave(counts)
        return each.to(self.device), task.to(self.device)

    @cached_property
    def layout(self) -> CoreLayout:
        """How one merge's cores lie in a flat vector."""
        return CoreLayout(tuple(module.core_shape for module in self.modules))

    @cached_property
    def _alike(self) -> tuple[tuple[int, ...], ...]:
        """The places of modules alike in p, q and every task's rank."""
        alike: dict[tuple[object, ...], list[int]] = {}
        for index, module in enumerate(self.modules):
            alike.setdefault((module.core_shape, module.ranks), []).append(index)
        return tuple(tuple(members) for members in alike.values())

    @cached_property
    def groups(self) -> tuple["FactorGroup", ...]:
        """The modules' factors stacked by shape: what methods compute with."""
        return tuple(self._group(members) for members in self._alike)

    def _group(self, members: Sequence[int]) -> "FactorGroup":
        modules = [self.modules[index] for index in members]
        return FactorGroup(
            members=tuple(members),
            left=torch.stack([module.left for module in modules]),
            right=torch.stack([module.right for module in modules]),
            ranks=modules[0].ranks,
            soups=torch.tensor([module.soup for module in modules], device=self.device)
            if self.has_soups
            else None,
        )

    def flatten(self, cores: Sequence[Tensor]) -> Tensor:
        """Flat cores (..., layout.size) from those of each group (..., members, p, q)."""
        flat: list[Tensor] = [torch.empty(0)] * len(self.modules)
        for group, stacked in zip(self.groups, cores, strict=True):
            for index, core in zip(group.members, stacked.flatten(-2).unbind(-2), strict=True):
                flat[index] = core
        return torch.cat(flat, dim=-1)

    def to(self, device: torch.device | str, *, bases: bool = True) -> "FactorBank":
        """The same bank on `device`; without `bases`, U and V stay where they are."""

        def moved(module: ModuleFactors) -> ModuleFactors:
            return replace(
                module,
                U=module.U.to(device) if bases else module.U,
                V=module.V.to(device) if bases else module.V,
                left=module.left.to(device),
                right=module.right.to(device),
            )

        return replace(
            self,
            modules=tuple(moved(module) for module in self.modules),
            calibrations=tuple(each.to(device) for each in self.calibrations),
        )


def distinct_ranks(modules: Iterable[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """By task, the distinct ranks but 0, ascending, from each module's ranks by task."""
    return tuple(tuple(sorted(set(ranks) - {0})) for ranks in zip(*modules, strict=True))


def module_order(names: Sequence[str]) -> list[str]:
    """Names in reading order: layer 2 before layer 10."""
    return sorted(
        names,
        key=lambda name: [
            (part.isdigit(), int(part) if part.isdigit() else 0, part)
            for part in re.split(r"(\d+)", name)
        ],
    )
