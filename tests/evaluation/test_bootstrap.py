import hashlib
import math

import pytest
import torch
from torch.testing import assert_close

from dynmerge.evaluation import bootstrap
from dynmerge.evaluation.bootstrap import (
    Estimate,
    difference,
    least,
    mean,
    ratio,
    resamplings,
    share,
    shares,
)


def test_intervals_cover_what_they_say() -> None:
    """Of 300 samples from a known share, about 95 % of the intervals hold it."""
    rng = torch.Generator().manual_seed(5)
    p, examples, held = 0.3, 120, 0
    for trial in range(300):
        right = (torch.rand(examples, generator=rng) < p).double()
        weights = resamplings(examples, 400, trial, "coin")
        found = share(right, torch.ones(examples), weights).interval()
        assert found.low <= found.value <= found.high
        held += found.low <= p <= found.high
    assert 0.91 <= held / 300 <= 0.99


def test_examples_are_resampled_whole() -> None:
    """Predictions of one example rise and fall together: intervals are wider than alone."""
    right = torch.tensor([10.0, 0.0] * 20)
    counts = torch.full((40,), 10.0)
    whole = share(right, counts, resamplings(40, 2000, 0, "task")).interval()
    apart = torch.tensor([1.0, 0.0] * 200)
    single = share(apart, torch.ones(400), resamplings(400, 2000, 0, "task")).interval()
    assert whole.value == single.value == 0.5
    assert (whole.high - whole.low) > 2.5 * (single.high - single.low)


def test_resamplings_are_whole_numbers_that_come_again() -> None:
    weights = resamplings(7, 50, 3, "math")
    assert weights.sum(1).tolist() == [7.0] * 50
    assert_close(weights, weights.round())
    assert torch.equal(weights, resamplings(7, 50, 3, "math"))
    assert not torch.equal(weights, resamplings(7, 50, 3, "code"))
    assert not torch.equal(weights, resamplings(7, 50, 4, "math"))


def test_the_same_seed_draws_what_it_always_drew() -> None:
    """Published intervals (docs/quality.json) are made of these draws."""
    first = [[2.0, 1.0, 0.0, 0.0, 2.0], [2.0, 1.0, 0.0, 1.0, 1.0], [1.0] * 5]
    assert resamplings(5, 3, 0, "math").tolist() == first
    several = resamplings(3000, 2500, 0, "b")
    assert several.dtype == torch.float64
    content = hashlib.sha256(several.numpy().tobytes()).hexdigest()
    assert content.startswith("ce0df64757c40cc9e1b0e551d66adcdd")


def test_shares_are_those_of_the_resamplings_that_are_not_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = torch.Generator().manual_seed(2)
    wholes = torch.randint(1, 9, (70,), generator=rng)
    parts = (torch.rand(3, 70, generator=rng) * (wholes + 1)).floor()
    weights = resamplings(70, 101, 4, "math")
    monkeypatch.setattr(bootstrap, "CHUNK", 700)
    assert torch.equal(resamplings(70, 101, 4, "math"), weights)
    for part, found in zip(parts, shares(parts, wholes, 101, 4, "math"), strict=True):
        expected = share(part, wholes, weights)
        assert found.value == expected.value
        assert torch.equal(found.draws, expected.draws)


def test_shares_hold_no_more_than_a_chunk_of_the_resamplings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn, draw = [], torch.randint

    def counted(high: int, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
        drawn.append(size)
        return draw(high, size, generator=generator)

    monkeypatch.setattr(torch, "randint", counted)
    shares(torch.ones(1, 5000), torch.ones(5000), 2000, 0, "math")
    assert max(rows * examples for rows, examples in drawn) <= bootstrap.CHUNK
    assert sum(rows for rows, _ in drawn) == 2000


def test_pairs_share_their_luck() -> None:
    rng = torch.Generator().manual_seed(1)
    easy = (torch.rand(200, generator=rng) < 0.5).double()
    better = easy.clone()
    better[easy == 0] = torch.tensor([1.0, 0, 0, 0, 0] * 40)[: int((easy == 0).sum())].double()
    weights, ones = resamplings(200, 2000, 0, "task"), torch.ones(200)
    first, second = share(better, ones, weights), share(easy, ones, weights)
    paired = difference(first, second).interval()
    other = share(easy, ones, resamplings(200, 2000, 1, "task"))
    unpaired = difference(first, other).interval()
    assert paired.value == pytest.approx(unpaired.value)
    assert paired.high - paired.low < 0.7 * (unpaired.high - unpaired.low)
    assert paired.low > 0
    none = difference(first, first).interval()
    assert (none.low, none.value, none.high) == (0, 0, 0)
    same = ratio(first, first).interval()
    assert (same.low, same.value, same.high) == (1, 1, 1)


def test_combinations_of_estimates() -> None:
    weights, ones = resamplings(4, 10, 0, "a"), torch.ones(4)
    one, other = (share(torch.tensor(r), ones, weights) for r in ([1.0, 1, 1, 0], [0.0, 1, 0, 0]))
    assert mean([one, other]).value == 0.5
    assert_close(mean([one, other]).draws, (one.draws + other.draws) / 2)
    assert least([one, other]).value == 0.25
    assert_close(least([one, other]).draws, torch.minimum(one.draws, other.draws))
    assert ratio(one, other).value == 3


def test_resamplings_without_a_number_are_left_out() -> None:
    rare = share(torch.tensor([1.0, 0, 0]), torch.ones(3), resamplings(3, 200, 0, "a"))
    same = ratio(rare, rare)
    assert same.draws.isnan().any()
    found = same.interval()
    assert (found.low, found.value, found.high) == (1, 1, 1)


@pytest.mark.parametrize("endless", [1, 2, 3, 4, 50, 97, 98, 99])
def test_an_end_among_infinite_resamplings_is_infinite_and_never_no_number(endless: int) -> None:
    draws = torch.linspace(0, 1, 101, dtype=torch.float64)
    draws[101 - endless :] = math.inf
    up, down = Estimate(0.5, draws).interval(), Estimate(-0.5, -draws).interval()
    low = 0.025 if endless < 98 else 0.02 if endless == 98 else math.inf
    assert up.low == pytest.approx(low)
    assert up.high == pytest.approx(0.975 if endless < 3 else math.inf)
    assert (down.low, down.high) == pytest.approx((-up.high, -up.low))
