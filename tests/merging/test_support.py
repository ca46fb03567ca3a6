"""What the weights become, and what a support says that it holds."""

from collections.abc import Iterable, Mapping

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dynmerge.bank.bank import FactorBank
from dynmerge.merging import pico
from dynmerge.merging.support import Support, normed
from tests import reference
from tests.bank_factory import random_bank

BANK = random_bank()
NAMES = ("ada", "bob", "cyd")


@pytest.mark.parametrize(
    ("weights", "p"),
    [
        ([0.1] * 10, 64.0),
        ([0.2] * 5, 64.0),
        ([0.001] * 2, 16.0),
        ([0.001], 64.0),
        ([2.0, 0.001], 64.0),
        ([0.5, 0.3, 0.2], 1.0),
        ([0.5, 0.3, 0.2], 4.0),
        ([0.5, 0.3, 0.2], float("inf")),
    ],
)
def test_the_norm_that_weights_keep_is_float64s(weights: list[float], p: float) -> None:
    exact = reference.kept_norm({str(place): weight for place, weight in enumerate(weights)}, p)
    found = normed(torch.tensor(weights), p)
    assert_close(found.double(), torch.tensor(list(exact.values())).double(), rtol=2e-6, atol=0)


def of(signs: Mapping[str, int], bank: FactorBank = BANK) -> Support:
    return Support.of(bank, {NAMES.index(name): sign for name, sign in signs.items()})


def factors(groups: Iterable[object]) -> list[Tensor]:
    return [getattr(group, side) for group in groups for side in ("left", "right")]


def held(*supports: Support) -> int:
    """Bytes of their factors that are not the bank's own, each counted once."""
    banks = {tensor.data_ptr() for tensor in factors(BANK.groups)}
    sizes = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for support in supports
        for tensor in factors(support.groups)
    }
    return sum(size for place, size in sizes.items() if place not in banks)


def test_all_skills_as_they_are_take_no_room() -> None:
    support = of({"ada": 1, "bob": 1, "cyd": 1})
    assert held(support) == support.nbytes == 0


def test_a_turned_skill_takes_the_room_of_its_factors() -> None:
    support = of({"ada": 1, "bob": -1, "cyd": 1})
    assert support.nbytes == held(support) > 0


@pytest.mark.parametrize(
    "signs", [{"ada": 1, "bob": 1}, {"ada": 1, "bob": -1}, {"cyd": 1}], ids=str
)
def test_a_subset_takes_the_room_of_its_factors(signs: Mapping[str, int]) -> None:
    support = of(signs)
    assert support.nbytes == held(support) > 0


@pytest.mark.parametrize(
    "signs", [{"ada": 1, "bob": 1, "cyd": 1}, {"ada": 1, "bob": -1, "cyd": 1}, {"ada": 1, "bob": 1}]
)
def test_what_is_derived_from_a_support_counts_what_is_its_own(signs: Mapping[str, int]) -> None:
    support = of(signs)
    values = {"pool": "static", "gauge": "raw"}
    derived = pico.calibrated(support, torch.ones(len(signs)), values)
    again = pico.calibrated(support, torch.ones(len(signs)), values)
    for one, other in zip(derived.groups, again.groups, strict=True):
        assert one.left is other.left
    assert held(derived) > 0
    assert support.nbytes == held(support, derived)


def test_what_is_kept_counts_once() -> None:
    support = of({"ada": 1, "bob": 1, "cyd": 1})
    made = [(torch.zeros(10), torch.zeros(3, dtype=torch.float64)) for _ in support.groups]
    for _ in range(2):
        assert support.keep("numbers", lambda: made) is made
    assert support.nbytes == 64 * len(support.groups)
    derived = support.derive("other", lambda: support.calibrated([g.left for g in support.groups]))
    derived.keep("numbers", lambda: [(torch.zeros(16),)])
    assert support.nbytes == 64 * len(support.groups) + 64
