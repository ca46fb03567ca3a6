"""T4, and every measure against a loop."""

import math

import pytest
import torch
from torch.testing import assert_close

from dynmerge.calibration.objective import (
    cross_entropy,
    divergence,
    entropy,
    smooth_tchebycheff,
)
from tests import reference

LOGITS = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)) * 3
TEACHER = torch.randn(5, 7, generator=torch.Generator().manual_seed(2)) * 3
RHO = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
GAPS = torch.tensor([1.5, -0.2, 0.7], dtype=torch.float64)


def test_measures_are_their_formulas() -> None:
    targets = torch.tensor([0, 6, 3, 3, 1])
    rows = range(len(LOGITS))
    found = [entropy(LOGITS), divergence(TEACHER, LOGITS), cross_entropy(targets, LOGITS)]
    expected = [
        [reference.entropy(LOGITS[n]) for n in rows],
        [reference.divergence(TEACHER[n], LOGITS[n]) for n in rows],
        [reference.cross_entropy(int(targets[n]), LOGITS[n]) for n in rows],
    ]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.tolist() == pytest.approx(theirs, abs=1e-5)


def test_measures_of_certainty_and_of_none() -> None:
    even, sure = torch.zeros(1, 4), torch.tensor([[1e4, 0.0, 0.0, 0.0]])
    assert float(entropy(even)) == pytest.approx(math.log(4))
    assert float(entropy(sure)) == 0
    assert float(divergence(sure, even)) == pytest.approx(math.log(4))
    assert float(divergence(even, even)) == 0
    # A prediction counts by its differences alone.
    assert_close(entropy(LOGITS + 50), entropy(LOGITS), atol=1e-4, rtol=1e-4)


def test_gradients_of_measures_are_finite_where_a_prediction_is_certain() -> None:
    sure = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    (entropy(sure) + divergence(torch.zeros(1, 3), sure)).sum().backward()
    assert sure.grad is not None
    assert torch.isfinite(sure.grad).all()


@pytest.mark.parametrize("mu", [0.01, 0.1, 1.0, 30.0])
def test_the_gradient_is_that_of_t4(mu: float) -> None:
    gaps = GAPS.clone().requires_grad_()
    smooth_tchebycheff(gaps, RHO, mu).backward()  # type: ignore[no-untyped-call]
    powers = [math.exp(float(r * f) / mu) for r, f in zip(RHO, GAPS, strict=True)]
    assert gaps.grad is not None
    expected = [float(r) * power / sum(powers) for r, power in zip(RHO, powers, strict=True)]
    assert gaps.grad.tolist() == pytest.approx(expected, abs=1e-12)


def test_a_large_mu_is_the_mean_and_a_small_one_the_largest() -> None:
    mu = 1e4
    near = float(smooth_tchebycheff(GAPS, RHO, mu)) - mu * math.log(3)
    assert near == pytest.approx(float((RHO * GAPS).sum()) / 3, abs=1e-4)
    assert float(smooth_tchebycheff(GAPS, RHO, 1e-4)) == pytest.approx(0.3, abs=1e-6)


def test_a_small_mu_overflows_nowhere() -> None:
    gaps = (100 * GAPS).float().requires_grad_()
    psi = smooth_tchebycheff(gaps, RHO.float(), 1e-6)
    psi.backward()  # type: ignore[no-untyped-call]
    assert float(psi.detach()) == pytest.approx(30)
    assert gaps.grad is not None
    assert gaps.grad.tolist() == pytest.approx([0.2, 0, 0])
