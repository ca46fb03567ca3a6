"""Sparsify: what TIES, DARE and DELLA do to each skill's entries before they are merged.

A block is the entries of modules alike, (members, skills, a, b), in whatever space; a stream gives
all blocks of a model, as often as it is asked.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynmerge.bank.bank import Task


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Entries of modules alike in one space. `present`: the skills that change these modules.

    `notes` is what a step found out about the entries.
    """

    modules: tuple[str, ...]
    present: tuple[int, ...]
    entries: Tensor  # (members, skills, a, b)
    notes: tuple[Tensor, ...] = ()


Stream = Callable[[], Iterable[Block]]


def trim(block: Block, smallest: Tensor) -> Tensor:
    """Those of at least the magnitude `smallest` (skills,) or (members, skills)."""
    return torch.where(block.entries.abs() >= smallest[..., None, None], block.entries, 0)


def drop(block: Block, density: float, drawn: Tensor) -> Tensor:
    """Keep each entry with probability `density`, rescaled so that the mean is unchanged (DARE)."""
    return block.entries * (drawn < density) / density


def magprune(block: Block, window: tuple[float, float], rescale: str, drawn: Tensor) -> Tensor:
    """Keep each entry with a probability that rises with its magnitude's rank in its row (DELLA).

    From the `window`'s low for the smallest to its high; `drawn` (members, skills, a, b) decides.
    Each kept one is divided by its own probability (`rescale` entry), or all by what restores the
    sum of magnitudes (l1).
    """
    entries, (low, high) = block.entries, window
    last = entries.shape[-1] - 1
    order = entries.abs().argsort(dim=-1, stable=True)
    steps = (torch.arange(last + 1, device=entries.device) + 0.5 * (not last)) / max(last, 1)
    rising = torch.empty_like(entries).scatter_(-1, order, steps.expand_as(entries))
    probability = low + (high - low) * rising
    return RESCALE[rescale](entries, torch.where(drawn < probability, entries, 0), probability)


def smallest_kept(stream: Stream, skills: int, density: float) -> Tensor:
    """(skills,): the magnitude of each skill's ceil(density * n)-th largest entry in the model.

    n counts the modules the skill changes. Found exactly without sorting or holding the entries:
    float32 magnitudes order as their bits do, so two passes count the upper and the lower half.
    """
    sizes = [0] * skills
    upper = _Histogram(skills)
    for block in stream():
        for skill in block.present:
            bits = _bits(block.entries[:, skill])
            sizes[skill] += bits.numel()
            upper.count(skill, bits >> 16)
    wanted = [_count(density, size) for size in sizes]
    high = [upper.nth_largest(skill, count) for skill, count in enumerate(wanted)]
    lower = _Histogram(skills)
    for block in stream():
        for skill in block.present:
            bits = _bits(block.entries[:, skill])
            lower.count(skill, bits[bits >> 16 == high[skill][0]] & 0xFFFF)
    low = [lower.nth_largest(skill, count) for skill, (_, count) in enumerate(high)]
    found = [(top << 16) | bottom for (top, _), (bottom, _) in zip(high, low, strict=True)]
    smallest = torch.tensor(found, dtype=torch.int32).view(torch.float32)
    return torch.where(torch.tensor(sizes) > 0, smallest, torch.inf)


def smallest_kept_apart(block: Block, density: float) -> Tensor:
    """(members, skills): the same in each module apart."""
    magnitudes = block.entries.abs().flatten(2)
    size = magnitudes.shape[-1]
    if not size:
        return magnitudes.new_full(magnitudes.shape[:2], torch.inf)
    return magnitudes.kthvalue(size - _count(density, size) + 1, dim=-1).values


def draws(block: Block, seed: int, tasks: Sequence[Task]) -> Tensor:
    """Uniform numbers for the entries, the same for one seed, skill, module and shape anywhere.

    Drawn on the CPU, whatever the device, and not by the preference: two preferences differ by
    their weights, not by luck.
    """
    shape = block.entries.shape[2:]
    rows = [
        torch.stack([uniform(shape, seed, task, module) for task in tasks])
        for module in block.modules
    ]
    return torch.stack(rows).to(block.entries.device)


def uniform(shape: Sequence[int], seed: int, task: Task, module: str) -> Tensor:
    """Uniform numbers in [0, 1) of one skill in one module."""
    return torch.rand(*shape, generator=generator(seed, task.name, task.digest, module))


def generator(seed: int, *names: str) -> torch.Generator:
    """A generator of its own for everything that is named."""
    digest = hashlib.sha256("\n".join([str(seed), *names]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _per_entry(entries: Tensor, kept: Tensor, probability: Tensor) -> Tensor:
    return kept / probability


def _whole(entries: Tensor, kept: Tensor, probability: Tensor) -> Tensor:
    """One factor per skill and module, which restores the sum of magnitudes (mergekit)."""
    before, after = (values.abs().sum((-2, -1), keepdim=True) for values in (entries, kept))
    return kept * torch.where(after > 0, before / after, 0)


RESCALE = {"entry": _per_entry, "l1": _whole}


def _count(density: float, size: int) -> int:
    # Thousandths in whole numbers: 0.07 * 100 is 7, not a rounding more.
    return -(-round(density * 1000) * size // 1000)


def _bits(entries: Tensor) -> Tensor:
    return entries.abs().contiguous().view(torch.int32).flatten()


class _Histogram:
    """How often each of 2^16 values occurs, per skill."""

    def __init__(self, skills: int) -> None:
        self._counts = torch.zeros(skills, 1 << 16, dtype=torch.int64)

    def count(self, skill: int, values: Tensor) -> None:
        """Add occurrences."""
        self._counts[skill] += torch.bincount(values, minlength=1 << 16).cpu()

    def nth_largest(self, skill: int, nth: int) -> tuple[int, int]:
        """The value of the nth largest, and its place among those equal to it, both from 1."""
        above = self._counts[skill].flip(0).cumsum(0)
        if not above[-1]:
            return 0, 0
        place = int(torch.searchsorted(above, nth))
        before = int(above[place - 1]) if place else 0
        return (1 << 16) - 1 - place, nth - before
