"""Merge: a recipe carried out, what the cache keeps and the engine runs. Merger makes it."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dynmerge.adapters.lowrank import LowRank
from dynmerge.bank.bank import FactorBank
from dynmerge.errors import DynmergeError
from dynmerge.merging import pico, svc
from dynmerge.merging.carried.merges import check_calibrations
from dynmerge.merging.choice import parts_of, settled
from dynmerge.merging.demands import check_bank, check_preference
from dynmerge.merging.methods import SCALE
from dynmerge.merging.outcome import Outcome, Thin
from dynmerge.merging.parameters import number
from dynmerge.merging.support import Support, support_of
from dynmerge.recipe import MethodChoice, Recipe

PREPARED_BYTES = 1 << 29
MAX_SUPPORTS = 256


@dataclass(frozen=True, slots=True, eq=False)
class Merge:
    """One update per module under one recipe: in the shared bases, or with factors of its own.

    `core` is flat as the bank's layout says; where a method left the shared bases it is None and
    `own` has the updates by module name instead. `energy` is the share of the method's squared norm
    that is left of it.
    """

    recipe: Recipe
    core: Tensor | None  # (size,) in the engine's dtype, on the bank's device
    own: Mapping[str, LowRank] | None = None
    energy: float = 1.0

    @property
    def rank(self) -> int:
        """The largest rank of its own factors, 0 where it has none."""
        return max((update.rank for update in (self.own or {}).values()), default=0)

    @property
    def nbytes(self) -> int:
        """Device bytes it keeps."""
        held = [] if self.core is None else [self.core]
        held += [factor for update in (self.own or {}).values() for factor in (update.A, update.B)]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


class Merger:
    """Makes the merges of one bank, and keeps what methods prepared for the supports used last.

    At most `prepared` bytes of that, and what the merge at hand needs. Thread-safe. Raises
    BankError on calibrations that do not hold what their methods read.
    """

    def __init__(
        self,
        bank: FactorBank,
        dtype: torch.dtype = torch.float32,
        prepared: int = PREPARED_BYTES,
    ) -> None:
        check_calibrations(bank)
        self.bank = bank
        self._dtype = dtype
        self._most = prepared
        self._lock = threading.Lock()
        self._supports: OrderedDict[tuple[tuple[int, int], ...], Support] = OrderedDict()

    @torch.no_grad()
    def merge(self, recipe: Recipe, wanted: Callable[[], bool] = lambda: True) -> Merge:
        """Carry out `recipe`: computed in float32, cast once. The bank must be the recipe's own.

        A long merge ends in Abandoned once it is not `wanted` any more.
        """
        if recipe.bank != self.bank.digest:
            raise DynmergeError(
                f"recipe {recipe.digest} is for another bank than {self.bank.digest[:12]}"
            )
        check_bank(recipe.method, self.bank)
        check_preference(recipe.method, recipe.preference, self.bank)
        signs, weights = support_of(self.bank, recipe.preference)
        if not signs:
            nothing = torch.zeros(self.bank.layout.size, dtype=self._dtype, device=self.bank.device)
            return Merge(recipe, nothing)
        support = self._support(signs).asked(wanted)
        try:
            outcome = carry_out(support, weights, recipe.method)
        finally:
            self._forget()
        if isinstance(outcome, Thin):
            return Merge(recipe, None, self._own(outcome), outcome.energy)
        return Merge(recipe, self.bank.flatten(outcome.groups).to(self._dtype))

    def _own(self, outcome: Thin) -> dict[str, LowRank]:
        """The updates by module name in the engine's dtype; each is given up as it is cast."""
        own = {}
        for member in sorted(outcome.updates):
            update = outcome.updates.pop(member)
            own[self.bank.modules[member].name] = LowRank(
                A=update.A.to(self._dtype).contiguous(), B=update.B.to(self._dtype).contiguous()
            )
        return own

    def _support(self, signs: dict[int, int]) -> Support:
        key = tuple(signs.items())
        with self._lock:
            support = self._supports.get(key)
        if support is None:  # outside the lock: a quick merge must not wait for another's copies
            support = Support.of(self.bank, signs)
        with self._lock:
            support = self._supports.setdefault(key, support)
            self._supports.move_to_end(key)
            return support

    def _forget(self) -> None:
        with self._lock:
            sizes = {key: support.nbytes for key, support in self._supports.items()}
            held = sum(sizes.values())
            while self._supports and (held > self._most or len(self._supports) > MAX_SUPPORTS):
                key, _ = self._supports.popitem(last=False)
                held -= sizes[key]


def merge(bank: FactorBank, recipe: Recipe, dtype: torch.dtype = torch.float32) -> Merge:
    """One merge of a bank, with nothing kept for the next."""
    return Merger(bank, dtype, prepared=0).merge(recipe)


def carry_out(support: Support, weights: Tensor, method: MethodChoice) -> Outcome:
    """The merge of a support under its weights (skills,), all of them positive."""
    before, _, after = parts_of(method.name)
    row, values = settled(method)
    seen = pico.calibrated(support, weights, values) if before else support
    outcome = row.merge(seen, weights, values)
    if after:
        outcome = svc.balanced(outcome, seen, weights, values)
    if before:
        outcome = pico.restored(outcome, support, weights, values)
    scale = number(values, SCALE.name)
    if scale == 1:
        return outcome
    factor = weights.new_tensor([scale])
    return outcome.scaled(support, [factor] * len(support.groups))
