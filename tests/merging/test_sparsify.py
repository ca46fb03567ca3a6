"""What trimming and dropping promise, counted over many draws with fixed seeds."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from dynmerge.bank.bank import Task
from dynmerge.merging.sparsify import (
    Block,
    draws,
    drop,
    magprune,
    smallest_kept,
    smallest_kept_apart,
    trim,
    uniform,
)

TASKS = (Task("ada", "1" * 64), Task("bob", "2" * 64))
SEEDS = 600
# With a few hundred numbers looked at, one in ten thousand such tests would miss by chance.
SIGMAS = 5.0


def block(*shape: int, seed: int = 0) -> Block:
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randn(shape, generator=generator)
    modules = tuple(f"layers.{member}.q" for member in range(shape[0]))
    return Block(modules, tuple(range(shape[1])), entries)


BLOCK = block(2, 2, 5, 8)


def dropped(seeds: int, density: float) -> Iterator[Tensor]:
    for seed in range(seeds):
        yield drop(BLOCK, density, draws(BLOCK, seed, TASKS))


def pruned(seeds: int, density: float, epsilon: float, rescale: str) -> Iterator[Tensor]:
    for seed in range(seeds):
        window = (density - epsilon, density + epsilon)
        yield magprune(BLOCK, window, rescale, draws(BLOCK, seed, TASKS))


def probabilities(density: float, epsilon: float) -> Tensor:
    """The chance that each entry of BLOCK stays: by its rank in its row."""
    wanted = torch.empty_like(BLOCK.entries)
    for row, chances in zip(BLOCK.entries.view(-1, 8), wanted.view(-1, 8), strict=True):
        for k, column in enumerate(row.abs().argsort().tolist()):
            chances[column] = density - epsilon + 2 * epsilon * k / 7
    return wanted


def assert_mean_is_kept(made: Iterator[Tensor], chance: Tensor) -> None:
    """Each entry's mean is within sampling error of the entry, and so is the sum of all."""
    mean = torch.stack(list(made)).mean(0)
    error = BLOCK.entries.abs() * ((1 - chance) / chance / SEEDS).sqrt()
    assert bool(((mean - BLOCK.entries).abs() <= SIGMAS * error + 1e-6).all())
    together = error.square().sum().sqrt()
    assert abs(float(mean.sum() - BLOCK.entries.sum())) <= SIGMAS * float(together) + 1e-6


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dropping_keeps_the_mean_of_every_entry(density: float) -> None:
    chance = torch.full_like(BLOCK.entries, density)
    assert_mean_is_kept(dropped(SEEDS, density), chance)


@pytest.mark.parametrize(("density", "epsilon"), [(0.7, 0.07), (0.5, 0.4), (0.3, 0.0)])
def test_pruning_by_magnitude_keeps_the_mean_of_every_entry(density: float, epsilon: float) -> None:
    made = pruned(SEEDS, density, epsilon, "entry")
    assert_mean_is_kept(made, probabilities(density, epsilon))


def test_rescaling_the_whole_does_not_keep_the_mean_where_small_entries_go_more_often() -> None:
    mean = torch.stack(list(pruned(SEEDS, 0.5, 0.4, "l1"))).mean(0)
    largest = BLOCK.entries.abs() == BLOCK.entries.abs().amax(-1, keepdim=True)
    assert bool((mean.abs() > 1.1 * BLOCK.entries.abs())[largest].all())


def assert_frequency(kept: Tensor, chance: Tensor, trials: int) -> None:
    """Counts within the bounds of a binomial."""
    error = (chance * (1 - chance) * trials).sqrt()
    assert bool(((kept - chance * trials).abs() <= SIGMAS * error + 1e-6).all())


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9])
def test_dropping_keeps_the_density_that_was_asked_for(density: float) -> None:
    large = block(1, 2, 300, 200)
    kept = (drop(large, density, draws(large, 3, TASKS)) != 0).sum((0, 2, 3))
    assert_frequency(kept, torch.full((2,), density), 300 * 200)
    whole = drop(large, 1.0, draws(large, 3, TASKS))
    assert torch.equal(whole, large.entries)


def test_what_is_dropped_is_zero_and_what_stays_is_divided_by_the_density() -> None:
    found = drop(BLOCK, 0.25, draws(BLOCK, 1, TASKS))
    stays = found != 0
    assert 0 < int(stays.sum()) < stays.numel()
    assert_close(found[stays], 4 * BLOCK.entries[stays])


@pytest.mark.parametrize("rescale", ["entry", "l1"])
@pytest.mark.parametrize(("density", "epsilon"), [(0.7, 0.07), (0.5, 0.4)])
def test_pruning_keeps_each_entry_as_often_as_its_rank_in_the_row_says(
    density: float, epsilon: float, rescale: str
) -> None:
    kept = torch.stack(list(pruned(SEEDS, density, epsilon, rescale))).ne(0).sum(0)
    assert_frequency(kept, probabilities(density, epsilon), SEEDS)


def test_pruning_keeps_larger_entries_more_often() -> None:
    order = BLOCK.entries.abs().argsort(-1)
    kept = torch.stack(list(pruned(SEEDS, 0.5, 0.4, "entry"))).ne(0).sum(0).gather(-1, order)
    by_rank = kept.view(-1, 8).sum(0)
    assert by_rank.tolist() == sorted(by_rank.tolist())
    assert by_rank[-1] > 5 * by_rank[0]


def test_pruning_a_row_of_one_keeps_it_at_the_density() -> None:
    column = block(1, 2, 500, 1)
    found = magprune(column, (0.2, 0.6), "entry", draws(column, 2, TASKS))
    assert_frequency((found != 0).sum((0, 2, 3)), torch.full((2,), 0.4), 500)
    stays = found != 0
    assert_close(found[stays], column.entries[stays] / 0.4)


@pytest.mark.parametrize("seed", range(5))
def test_rescaling_the_whole_restores_the_sum_of_magnitudes_in_each_layer(seed: int) -> None:
    found = magprune(BLOCK, (0.3, 0.7), "l1", draws(BLOCK, seed, TASKS))
    assert_close(found.abs().sum((-2, -1)), BLOCK.entries.abs().sum((-2, -1)))
    stays = found != 0
    for mine, its, there in zip(
        found.flatten(0, 1), BLOCK.entries.flatten(0, 1), stays.flatten(0, 1), strict=True
    ):
        ratio = mine[there] / its[there]
        assert_close(ratio, ratio[:1].expand_as(ratio))


@pytest.mark.parametrize("rescale", ["entry", "l1"])
def test_pruning_all_or_nothing_gives_no_nan(rescale: str) -> None:
    nothing = magprune(BLOCK, (0.3, 0.7), rescale, torch.ones_like(BLOCK.entries))
    assert torch.equal(nothing, torch.zeros_like(BLOCK.entries))
    zeros = replace(BLOCK, entries=torch.zeros_like(BLOCK.entries))
    found = magprune(zeros, (0.3, 0.7), rescale, draws(BLOCK, 1, TASKS))
    assert torch.equal(found, zeros.entries)


# Draws


def test_draws_do_not_depend_on_the_order_of_tasks_nor_on_who_else_takes_part() -> None:
    cyd = Task("cyd", "3" * 64)
    three = draws(BLOCK, 4, (*TASKS, cyd))
    turned = draws(BLOCK, 4, (cyd, *reversed(TASKS)))
    assert torch.equal(three, turned.flip(1))
    assert torch.equal(draws(BLOCK, 4, TASKS[:1]), three[:, :1])
    assert torch.equal(draws(BLOCK, 4, TASKS), three[:, :2])


def test_draws_do_not_depend_on_the_modules_beside_them() -> None:
    one = Block(BLOCK.modules[1:], BLOCK.present, BLOCK.entries[1:])
    assert torch.equal(draws(one, 4, TASKS), draws(BLOCK, 4, TASKS)[1:])


def test_draws_differ_with_the_seed_the_skill_its_content_and_the_layer() -> None:
    shape, ada = (4, 6), TASKS[0]
    drawn = [
        uniform(shape, 0, ada, "layers.0.q"),
        uniform(shape, 1, ada, "layers.0.q"),
        uniform(shape, 0, TASKS[1], "layers.0.q"),
        uniform(shape, 0, replace(ada, digest="9" * 64), "layers.0.q"),
        uniform(shape, 0, replace(ada, name="bob"), "layers.0.q"),
        uniform(shape, 0, ada, "layers.1.q"),
        # Not what the same letters give when they are split elsewhere.
        uniform(shape, 0, Task("ad", "a" + ada.digest), "layers.0.q"),
    ]
    assert len({tuple(numbers.flatten().tolist()) for numbers in drawn}) == len(drawn)
    assert torch.equal(drawn[0], uniform(shape, 0, ada, "layers.0.q"))


def test_draws_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    draws(BLOCK, 4, TASKS)
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_are_uniform() -> None:
    numbers = uniform((200, 200), 0, TASKS[0], "layers.0.q")
    share = (numbers.flatten() * 10).long().bincount(minlength=10)
    assert_frequency(share, torch.full((10,), 0.1), 200 * 200)


# Trimming


def sorted_out(blocks: Sequence[Block], skill: int, density: float) -> float:
    """The ceil(density * n)-th largest magnitude, by sorting."""
    magnitudes = [
        value
        for part in blocks
        if skill in part.present
        for value in part.entries[:, skill].abs().flatten().tolist()
    ]
    if not magnitudes:
        return math.inf
    count = math.ceil(round(density * 1000) * len(magnitudes) / 1000)
    return sorted(magnitudes, reverse=True)[count - 1]


@st.composite
def streams(draw: st.DrawFn) -> list[Block]:
    """Blocks of all sizes; skills absent in some; entries from few values, so that many are equal.

    Some differ in the last bits only, which is where the two passes meet.
    """
    close = [1.0, 1.0 + 2**-23, 1.0 + 2**-22, 1.0 + 2**-8]
    values = st.sampled_from([0.0, -0.0, 0.5, -0.5, *close, -close[1], 3e-41, 1e38])
    blocks = []
    for place in range(draw(st.integers(1, 4))):
        members, a, b = (draw(st.integers(1, 3)) for _ in range(3))
        present = tuple(skill for skill in range(3) if draw(st.booleans()))
        entries = torch.zeros(members, 3, a, b)
        for skill in present:
            size = members * a * b
            numbers = draw(st.lists(values, min_size=size, max_size=size))
            entries[:, skill] = torch.tensor(numbers).view(members, a, b)
        names = tuple(f"layers.{place}.{member}" for member in range(members))
        blocks.append(Block(names, present, entries))
    return blocks


@given(streams(), st.sampled_from([0.001, 0.07, 0.2, 0.333, 0.5, 0.999, 1.0]))
def test_the_smallest_kept_is_what_sorting_all_layers_finds(
    blocks: list[Block], density: float
) -> None:
    found = smallest_kept(lambda: iter(blocks), 3, density)
    assert found.tolist() == [sorted_out(blocks, skill, density) for skill in range(3)]


@given(streams(), st.sampled_from([0.001, 0.07, 0.2, 0.5, 1.0]))
def test_the_smallest_kept_of_each_layer_is_what_sorting_it_finds(
    blocks: list[Block], density: float
) -> None:
    for part in blocks:
        found = smallest_kept_apart(part, density)
        for member in range(len(part.modules)):
            one = Block(("one",), (0, 1, 2), part.entries[member : member + 1])
            expected = [sorted_out([one], skill, density) for skill in range(3)]
            assert found[member].tolist() == expected


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 1.0])
def test_the_smallest_kept_of_gaussian_layers_keeps_exactly_the_share_asked_for(
    density: float,
) -> None:
    blocks = [block(2, 2, 30, 20), block(3, 2, 7, 11, seed=1), block(1, 2, 1, 1, seed=2)]
    blocks[1] = Block(
        blocks[1].modules, (1,), blocks[1].entries * torch.tensor([0.0, 1.0])[:, None, None]
    )
    smallest = smallest_kept(lambda: blocks, 2, density)
    sizes = [2 * 600 + 1, 2 * 600 + 3 * 77 + 1]
    for skill, size in enumerate(sizes):
        assert float(smallest[skill]) == sorted_out(blocks, skill, density)
        kept = sum(int((trim(part, smallest)[:, skill] != 0).sum()) for part in blocks)
        assert kept == math.ceil(round(density * 1000) * size / 1000)


def test_trimming_keeps_all_that_equal_the_smallest_kept() -> None:
    entries = torch.tensor([[[[3.0, -1.0, 1.0, 0.5]]]])
    part = Block(("one",), (0,), entries)
    found = trim(part, smallest_kept(lambda: [part], 1, 0.5))
    assert found.flatten().tolist() == [3.0, -1.0, 1.0, 0.0]
