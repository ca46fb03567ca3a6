import re
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from dynmerge.adapters.adapter import Adapter
from dynmerge.bank.bank import CoreLayout, FactorBank, module_order
from dynmerge.bank.build import build_bank, with_soups
from dynmerge.errors import BankError, PreferenceError
from tests import reference
from tests.bank_factory import (
    BASE,
    RANKS,
    SHAPES,
    flat_cores,
    random_adapter,
    random_adapters,
    random_bank,
)

MANY = {
    f"skill-{seed:02d}": random_adapter({"layers.0.q": 1 + seed % 4, "layers.1.up": 2}, seed)
    for seed in range(32)
}
COLLECTIONS = {
    "different ranks, disjoint modules": random_adapters(),
    "one adapter": {"only": random_adapter(RANKS["bob"], 0)},
    "32 adapters, more ranks than the layers are wide": MANY,
}


@pytest.fixture(params=COLLECTIONS)
def adapters(request: pytest.FixtureRequest) -> dict[str, Adapter]:
    return COLLECTIONS[request.param]


def test_the_bases_are_orthonormal(adapters: dict[str, Adapter]) -> None:
    for module in random_bank(adapters).modules:
        for basis in (module.U.double(), module.V.double()):
            identity = torch.eye(basis.shape[1], dtype=torch.float64)
            assert_close(basis.mT @ basis, identity, rtol=0, atol=1e-6)


def test_every_update_is_in_the_bank_without_loss(adapters: dict[str, Adapter]) -> None:
    bank = random_bank(adapters)
    for index, name in enumerate(bank.names):
        for module in bank.modules:
            found = module.U.double() @ module.core(index).double() @ module.V.double().mT
            if module.name not in adapters[name].modules:
                assert module.ranks[index] == 0
                assert found.norm() == 0
                continue
            expected = reference.delta(adapters[name], module.name)
            assert (found - expected).norm() < 1e-6 * expected.norm()


def test_the_bases_are_no_wider_than_the_layer() -> None:
    bank = random_bank(MANY)
    for module in bank.modules:
        d_out, d_in = SHAPES[module.name]
        assert sum(module.ranks) > max(d_out, d_in)
        assert module.core_shape == (d_out, d_in)


def test_a_flat_core_is_the_cores_of_the_modules_one_after_another() -> None:
    bank = random_bank()
    for row, index in zip(flat_cores(bank), range(len(bank.tasks)), strict=True):
        for module, core in zip(bank.modules, bank.layout.split(row), strict=True):
            assert_close(core, module.core(index))
    assert CoreLayout(((2, 3), (1, 4))).size == 10


def test_groups_hold_every_module_once_and_flatten_puts_them_back_in_order() -> None:
    bank = random_bank()
    assert sorted(i for group in bank.groups for i in group.members) == list(range(4))
    assert max(len(group.members) for group in bank.groups) == 1  # all differ in some rank
    alike = {name: random_adapter({"layers.0.q": 2, "layers.1.q": 2}, seed=7) for name in "ab"}
    twins = random_bank(alike)
    assert [group.members for group in twins.groups] == [(0, 1)]
    for each in (bank, twins):
        cores = [group.left @ group.right for group in each.groups]
        assert_close(each.flatten(cores), flat_cores(each).sum(0))


def test_the_order_in_which_adapters_are_given_does_not_matter() -> None:
    adapters = random_adapters()
    forwards, backwards = random_bank(adapters), random_bank(dict(reversed(adapters.items())))
    assert forwards.digest == backwards.digest
    assert forwards.names == backwards.names
    assert torch.equal(flat_cores(forwards), flat_cores(backwards))


def test_the_digest_names_base_tasks_and_content() -> None:
    adapters = random_adapters()
    digests = {
        random_bank(adapters).digest,
        build_bank(replace(BASE, fingerprint="1" * 64), adapters).digest,
        random_bank({**adapters, "ada": random_adapter(RANKS["ada"], 99)}).digest,
        random_bank({"abe": adapters["ada"], **{k: adapters[k] for k in ("bob", "cyd")}}).digest,
        random_bank({"ada": adapters["ada"]}).digest,
    }
    assert len(digests) == 5
    noted = build_bank(BASE, adapters, provenance={"ada": {"source": "somewhere"}})
    assert noted.digest == random_bank(adapters).digest


def test_modules_stand_in_reading_order() -> None:
    names = ["layers.10.q", "layers.2.up", "layers.2.q", "head"]
    assert module_order(names) == ["head", "layers.2.q", "layers.2.up", "layers.10.q"]


def test_progress_is_told_after_each_module() -> None:
    told: list[tuple[int, int]] = []
    build_bank(BASE, random_adapters(), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_no_skill_is_named_as_the_base_model_is_served() -> None:
    adapter = random_adapter(RANKS["ada"], 0)
    for name in (BASE.name, f"models/{BASE.name}"):
        with pytest.raises(BankError, match=f"'{BASE.name}': that names the base model"):
            build_bank(replace(BASE, name=name), {BASE.name: adapter})
    assert build_bank(replace(BASE, name="other"), {BASE.name: adapter}).names == (BASE.name,)


@pytest.mark.parametrize("name", ["a@b", "a=b", "a,b", "a b", "a;raw", "", "Ada"])
def test_no_skill_has_a_name_that_a_preference_cannot_write(name: str) -> None:
    with pytest.raises(PreferenceError, match="is not a skill name"):
        build_bank(BASE, {name: random_adapter(RANKS["ada"], 0)})


def test_the_bank_says_the_distinct_ranks_of_every_task() -> None:
    assert random_bank().ranks == ((2,), (1, 3, 4), (3, 5))


def test_what_cannot_be_a_bank_is_refused() -> None:
    adapter = random_adapter(RANKS["ada"], 0)
    with pytest.raises(BankError, match="at least one adapter"):
        build_bank(BASE, {})
    with pytest.raises(BankError, match="'base'"):
        build_bank(BASE, {"base": adapter})
    with pytest.raises(PreferenceError, match="'Ada'"):
        build_bank(BASE, {"Ada": adapter})
    other = random_adapter({"layers.0.q": 2}, 1, {"layers.0.q": (12, 11)})
    with pytest.raises(BankError, match=r"layers\.0\.q: adapters disagree about its shape"):
        build_bank(BASE, {"ada": adapter, "bob": other})
    with pytest.raises(BankError, match="distinct and sorted"):
        FactorBank(BASE, tuple(reversed(random_bank().tasks)), random_bank().modules)


GOOD_SOUPS = {
    "layers.0.q": {"ada": 0.4, "bob": 0.6},
    "layers.0.v": {"bob": 0.5, "cyd": 0.5, "ada": 0.0},
    "layers.1.q": {"ada": 0.4, "bob": 0.6},
    "layers.1.up": {"cyd": 1.0},
}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"layers.1.up": None}, "module 'layers.1.up' has none"),
        ({"layers.9.up": {"cyd": 1.0}}, "module 'layers.9.up' is not in the bank"),
        ({"layers.0.q": {"ada": 1.0}}, "layers.0.q: skill 'bob' has none"),
        ({"layers.1.up": {"cyd": 1.0, "eve": 1.0}}, "layers.1.up: skill 'eve' is not in the bank"),
        ({"layers.1.up": {"cyd": -1.0}}, "layers.1.up: soup weights are not negative"),
        ({"layers.1.up": {"cyd": float("nan")}}, "layers.1.up: soup weights are not negative"),
        ({"layers.1.up": {"cyd": 0.0}}, "not all 0"),
    ],
)
def test_soup_weights_are_for_every_skill_of_every_module_and_nothing_else(
    wrong: dict[str, dict[str, float] | None], says: str
) -> None:
    soups = {name: row for name, row in {**GOOD_SOUPS, **wrong}.items() if row is not None}
    with pytest.raises(BankError, match=re.escape(says)):
        with_soups(random_bank(), soups)
    assert with_soups(random_bank(), GOOD_SOUPS).has_soups
