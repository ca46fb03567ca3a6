"""Elementwise methods: make each skill's entries sparse, then merge them; in any space.

A method is a row of two steps. What comes before the weights is done once for a support and kept.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from dynmerge.merging.consensus import (
    AGGREGATES,
    SUMS,
    agreeing,
    disjoint_sum,
    majority,
    majority_apart,
    patterns,
)
from dynmerge.merging.outcome import Outcome
from dynmerge.merging.parameters import Values, number, word
from dynmerge.merging.spaces import SPACES, Space, Step
from dynmerge.merging.sparsify import (
    Block,
    draws,
    drop,
    magprune,
    smallest_kept,
    smallest_kept_apart,
    trim,
)
from dynmerge.merging.support import Support, normed

Sparse = Callable[[Block], Tensor]
Sparsify = Callable[[Support, Space, Values], Sparse]
EntryMethod = Callable[[Support, Tensor, Values], Outcome]
# What a sparse block, and one that has been elected on, depends on besides the support.
SPARSE = ("density", "epsilon", "rescale", "seed", "scope")
ELECTED = (*SPARSE, "sign")


def trimming(support: Support, space: Space, values: Values) -> Sparse:
    """TIES' first step, over the whole model or each module apart."""
    density = number(values, "density")
    if word(values, "scope") == "module":
        return lambda block: trim(block, smallest_kept_apart(block, density))
    smallest = smallest_kept(space.blocks, len(support.tasks), density)
    return lambda block: trim(block, smallest.to(block.entries))


def dropping(support: Support, space: Space, values: Values) -> Sparse:
    """DARE."""
    density, seed = number(values, "density"), int(number(values, "seed"))
    return lambda block: drop(block, density, draws(block, seed, support.tasks))


def pruning(support: Support, space: Space, values: Values) -> Sparse:
    """DELLA's MAGPRUNE."""
    density, epsilon = number(values, "density"), number(values, "epsilon")
    seed, rescale = int(number(values, "seed")), word(values, "rescale")

    def sparse(block: Block) -> Tensor:
        drawn = draws(block, seed, support.tasks)
        return magprune(block, (density - epsilon, density + epsilon), rescale, drawn)

    return sparse


def summed(name: str, sparsify: Sparsify) -> EntryMethod:
    """The method that sums the sparse entries under λ."""

    def merge(support: Support, weights: Tensor, values: Values) -> Outcome:
        view = _View.of(name, sparsify, support, values)
        lambdas = normed(weights, number(values, "p"))
        return view.home(disjoint_sum(block, lambdas) for block in view.sparse())

    return merge


def elected(name: str, sparsify: Sparsify) -> EntryMethod:
    """The method that elects a sign per entry and takes the disjoint mean of those that have it.

    Elects on the sparse entries, then weights (the paper); mergekit's order weights first.
    """

    def merge(support: Support, weights: Tensor, values: Values) -> Outcome:
        view = _View.of(name, sparsify, support, values)
        first = word(values, "order") == "mergekit"
        blocks = view.agreeing_under(weights) if first else view.agreeing()
        aggregate = AGGREGATES[word(values, "aggregate")]
        return view.home(aggregate(block, weights) for block in blocks)

    return merge


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """A support's entries in one space under one method: what is kept of it has `name`."""

    name: str
    sparsify: Sparsify
    support: Support
    space: Space
    values: Values

    @classmethod
    def of(cls, name: str, sparsify: Sparsify, support: Support, values: Values) -> "_View":
        return cls(name, sparsify, support, SPACES[word(values, "space")](support), values)

    def sparse(self) -> Iterable[Block]:
        """The entries that are left."""

        def made() -> Step:
            sparse = self._sparse()
            return lambda block: (sparse(block),)

        return self.space.each(self._key(SPARSE), made)

    def agreeing(self) -> Iterable[Block]:
        """Those of the sign that is elected, and their patterns."""

        def made() -> Step:
            sparse = self._sparse()
            elect = self._elect(lambda: map(sparse, self.space.blocks()), None)

            def step(block: Block) -> tuple[Tensor, ...]:
                entries = elect(sparse(block))
                return (entries, *patterns(entries)) if self.space.keeps else (entries,)

            return step

        return self.space.each(self._key(ELECTED), made)

    def agreeing_under(self, weights: Tensor) -> Iterator[Block]:
        """The same elected under weights: of no use to others, so nothing of it is kept."""
        blocks = self.sparse()
        elect = self._elect(lambda: (block.entries for block in blocks), weights)
        for block in blocks:
            entries = elect(block.entries)
            yield replace(block, entries=entries)

    def home(self, merged: Iterable[Tensor]) -> Outcome:
        """Merged entries as updates."""
        return self.space.home(merged, int(number(self.values, "rank")))

    def _sparse(self) -> Sparse:
        return self.sparsify(self.support, self.space, self.values)

    def _elect(
        self, sparse: Callable[[], Iterable[Tensor]], ahead: Tensor | None
    ) -> Callable[[Tensor], Tensor]:
        """What takes from a sparse block the entries of the other sign; `sparse` gives them all."""
        if word(self.values, "scope") == "module":

            def apart(entries: Tensor) -> Tensor:
                sums = self._votes(entries, ahead)
                return agreeing(entries, sums, majority_apart(sums))

            return apart
        sign = majority(self._votes(entries, ahead) for entries in sparse())
        return lambda entries: agreeing(entries, self._votes(entries, ahead), sign)

    def _votes(self, entries: Tensor, ahead: Tensor | None) -> Tensor:
        sums = SUMS[word(self.values, "sign")]
        return sums(entries if ahead is None else entries * ahead[:, None, None])

    def _key(self, names: tuple[str, ...]) -> Hashable:
        return self.name, *(self.values.get(name) for name in names)
