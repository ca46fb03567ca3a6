"""Every form of a map from preference to coefficients, on layers stacked and apart."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dynmerge.cli.commands.quality import Form as Offered
from dynmerge.merging.carried.maps import FORMS, fixed, gauss_newton, pairs, ratio
from tests import reference

OWNERS = torch.tensor([0, 0, 1, 2, 2, 2])
MEMBERS, TASKS, WIDTH = 2, 3, len(OWNERS)
SPARSE = ([0.3, 0.0, 0.7], [0.0, 0.001, 0.999], [0.2, 0.5, 0.3], [1.0, 0.0, 0.0])


def learned(form: str, seed: int = 0) -> dict[str, Tensor]:
    """Tables far from their start."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for label, table in FORMS[form].start(MEMBERS, TASKS, WIDTH).items():
        noise = torch.randn(table.shape, generator=generator)
        # Information is positive definite.
        found[label] = noise @ noise.mT + 0.1 * table if label == "information" else table + noise
    return found


def coefficients(form: str, rho: Sequence[float], seed: int = 0) -> Tensor:
    return FORMS[form].coefficients(learned(form, seed), OWNERS, torch.tensor(rho))


def test_the_command_offers_every_form() -> None:
    assert [form.value for form in Offered] == list(FORMS)


@pytest.mark.parametrize("form", FORMS)
def test_a_skill_alone_is_its_adapter_whatever_was_learned(form: str) -> None:
    for task in range(TASKS):
        rho = [float(other == task) for other in range(TASKS)]
        alone = (task == OWNERS).float().expand(MEMBERS, -1)
        assert torch.equal(coefficients(form, rho), alone)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rho", SPARSE)
def test_an_absent_skill_has_no_part(form: str, rho: list[float]) -> None:
    phi = coefficients(form, rho)
    assert phi.shape == (MEMBERS, WIDTH)
    present = torch.tensor(rho)[OWNERS] > 0
    assert not phi[:, ~present].any()
    assert phi[:, present].all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rho", SPARSE)
def test_gradients_are_finite_where_skills_are_absent(form: str, rho: list[float]) -> None:
    tables = {label: table.requires_grad_() for label, table in learned(form).items()}
    phi = FORMS[form].coefficients(tables, OWNERS, torch.tensor(rho))
    (phi * torch.arange(1.0, 1 + phi.numel()).view_as(phi)).sum().backward()
    for table in tables.values():
        assert table.grad is not None
        assert torch.isfinite(table.grad).all()
        assert bool(table.grad.any()) == (max(rho) < 1)


@pytest.mark.parametrize("form", FORMS)
def test_layers_side_by_side_are_layers_apart(form: str) -> None:
    rho, tables = torch.tensor(SPARSE[2]), learned(form)
    phi = FORMS[form].coefficients(tables, OWNERS, rho)
    for member in range(MEMBERS):
        own = {label: table[member : member + 1] for label, table in tables.items()}
        alone = FORMS[form].coefficients(own, OWNERS, rho)[0]
        assert_close(phi[member], alone)
        if FORMS[form].coupled:
            continue
        some = torch.tensor([5, 0, 2])
        part = {label: table[..., some] for label, table in own.items()}
        assert_close(FORMS[form].coefficients(part, OWNERS[some], rho)[0], alone[some])


@pytest.mark.parametrize("form", FORMS)
def test_before_training_equal_shares_are_between_the_mean_and_the_sum(form: str) -> None:
    start = FORMS[form].start(MEMBERS, TASKS, WIDTH)
    phi = FORMS[form].coefficients(start, OWNERS, torch.full((TASKS,), 1 / TASKS))
    assert_close(phi, phi[:1, :1].expand_as(phi))
    assert 1 / TASKS <= float(phi[0, 0]) + 1e-6 < 1


@pytest.mark.parametrize("form", [form for form in reference.FORMS if form in FORMS])
@pytest.mark.parametrize("rho", SPARSE)
def test_a_form_is_its_formula(form: str, rho: list[float]) -> None:
    tables, phi = learned(form), coefficients(form, rho)
    for member in range(MEMBERS):
        own = {label: table[member] for label, table in tables.items()}
        for k, owner in enumerate(OWNERS.tolist()):
            expected = reference.coefficient(form, own, k, owner, rho)
            assert float(phi[member, k]) == pytest.approx(expected, abs=1e-5)


def test_ratio_weighs_what_the_owner_needs_against_what_others_mind() -> None:
    rho = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    h, u = (learned("ratio")[label].double() for label in ("ratio", "gain"))
    phi = ratio({"ratio": h, "gain": u}, OWNERS, rho)
    owns = torch.arange(TASKS)[:, None] == OWNERS

    def cost(phi: Tensor) -> Tensor:
        minded = (rho[:, None] * h.exp()).masked_fill(owns, 0).sum(1)
        gained = (rho[:, None] * u).masked_fill(owns, 0).sum(1)
        return rho[OWNERS] * ((phi - 1) ** 2 - 2 * gained * phi) + minded * phi**2

    for step in (1e-3, -1e-3):
        assert (cost(phi + step) > cost(phi)).all()


def test_ratio_rises_with_the_owners_share() -> None:
    tables = {**learned("ratio"), "gain": torch.zeros(MEMBERS, TASKS, WIDTH)}
    preferences = [torch.tensor([r, (1 - r) / 2, (1 - r) / 2]) for r in (0.01, 0.3, 0.6, 0.99)]
    shares = [ratio(tables, OWNERS, rho) for rho in preferences]
    rising = torch.stack(shares)[..., OWNERS == 0].diff(dim=0)
    assert (rising > 0).all()


@pytest.mark.parametrize("rho", SPARSE)
def test_gauss_newton_minimises_what_it_says(rho: list[float]) -> None:
    information = learned("gauss-newton")["information"]
    phi = gauss_newton({"information": information}, OWNERS, torch.tensor(rho))
    for H, found in zip(information, phi, strict=True):
        expected = reference.gauss_newton(H, OWNERS.tolist(), rho)
        assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_gauss_newton_of_equal_skills_is_the_preference_itself() -> None:
    H = learned("gauss-newton")["information"][:, :1].expand(-1, TASKS, -1, -1)
    rho = torch.tensor([0.2, 0.5, 0.3])
    phi = gauss_newton({"information": H}, OWNERS, rho)
    assert_close(phi, rho[OWNERS].expand(MEMBERS, -1), atol=1e-5, rtol=1e-5)


def test_fixed_is_a_copy() -> None:
    tables = learned("fixed")
    before = tables["fixed"].clone()
    fixed(tables, OWNERS, torch.tensor(SPARSE[2])).zero_()
    assert torch.equal(tables["fixed"], before)


def test_pairs_are_in_order_and_none_where_a_skill_is_alone() -> None:
    rho = [0.5, 0.2, 0.0, 0.3]
    expected = [(rho[j] * rho[k]) ** 0.5 for j, k in reference.pairs_of(rho)]
    assert pairs(torch.tensor(rho)).tolist() == pytest.approx(expected)
    assert not pairs(torch.tensor([0.0, 0.0, 1.0, 0.0])).any()
    assert pairs(torch.tensor([1.0])).shape == (0,)
