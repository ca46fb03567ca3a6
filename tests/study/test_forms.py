"""The compared maps: what each promises where one skill is alone, and that all can be learned."""

import pytest
import torch

from study.forms import COMPARED

OWNERS = torch.tensor([0, 0, 1, 2, 2])


@pytest.mark.parametrize("name", COMPARED)
def test_a_start_is_about_tuned_task_arithmetic_at_the_centre(name: str) -> None:
    form = COMPARED[name]
    found = form.coefficients(form.start(2, 3, 5), OWNERS, torch.full((3,), 1 / 3))
    assert found.shape == (2, 5)
    assert torch.allclose(found, found[0, 0].expand(2, 5))
    assert 0.6 < found[0, 0] < 0.8


def test_the_network_is_exact_where_one_skill_is_alone() -> None:
    tables = {label: torch.randn_like(t) for label, t in COMPARED["network"].start(2, 3, 5).items()}
    found = COMPARED["network"].coefficients(tables, OWNERS, torch.tensor([0.0, 1.0, 0.0]))
    assert torch.allclose(found, torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]).expand(2, 5))


@pytest.mark.parametrize("name", COMPARED)
def test_gradients_are_finite_where_skills_are_absent(name: str) -> None:
    form = COMPARED[name]
    tables = {label: table.requires_grad_() for label, table in form.start(2, 3, 5).items()}
    form.coefficients(tables, OWNERS, torch.tensor([0.5, 0.5, 0.0])).square().sum().backward()
    assert all(table.grad is None or table.grad.isfinite().all() for table in tables.values())
