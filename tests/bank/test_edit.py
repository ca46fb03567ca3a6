from collections.abc import Mapping

import pytest
import torch
from torch.testing import assert_close

from dynmerge.adapters.adapter import Adapter
from dynmerge.bank.bank import FactorBank
from dynmerge.bank.edit import adapter_of, with_adapter, without, without_calibrations
from dynmerge.errors import BankError, PreferenceError
from tests.bank_factory import BASE, RANKS, random_adapter, random_adapters, random_bank
from tests.merging.dense import assert_same, bank_of, merged

ADAPTERS = random_adapters()
NEW = random_adapter({"layers.0.v": 2, "layers.1.up": 4}, seed=9)
# One method that needs no bases, and one each that works in them, on their spectra and outside.
METHODS = ["linear", "ties", "tsv-m", "ties;space=full"]


def assert_a_fresh_build(edited: FactorBank, adapters: Mapping[str, Adapter], method: str) -> None:
    fresh = random_bank(adapters)
    assert edited.digest == fresh.digest
    assert edited.ranks == fresh.ranks
    assert edited.layout == fresh.layout
    weights = {name: 1 / (2 + place) for place, name in enumerate(fresh.names)}
    expected = merged(weights, method, fresh)
    assert_same(merged(weights, method, edited), expected, tolerance=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_bank_gives_back_the_adapters_it_was_built_from(name: str) -> None:
    given, found = ADAPTERS[name], adapter_of(random_bank(), name)
    assert found.base == BASE.name
    assert found.modules.keys() == given.modules.keys()
    for module, update in given.modules.items():
        assert_close(found.modules[module].A, update.A, rtol=0, atol=1e-5)
        assert_close(found.modules[module].B, update.B, rtol=0, atol=1e-5)
        assert found.modules[module].A.dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_a_skill_added_makes_the_bank_that_a_build_makes(method: str) -> None:
    edited = with_adapter(random_bank(), "bea", NEW)
    assert_a_fresh_build(edited, {**ADAPTERS, "bea": NEW}, method)


@pytest.mark.parametrize("method", METHODS)
def test_a_skill_replaced_makes_the_bank_that_a_build_makes(method: str) -> None:
    edited = with_adapter(random_bank(), "bob", NEW)
    assert_a_fresh_build(edited, {**ADAPTERS, "bob": NEW}, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_skill_removed_leaves_the_bank_that_a_build_makes(name: str, method: str) -> None:
    rest = {other: adapter for other, adapter in ADAPTERS.items() if other != name}
    assert_a_fresh_build(without(random_bank(), name), rest, method)


def test_a_module_that_one_skill_alone_changed_goes_with_it() -> None:
    assert "layers.1.up" not in [module.name for module in without(random_bank(), "cyd").modules]


def test_many_edits_in_a_row_lose_nothing() -> None:
    bank = random_bank()
    for seed in range(20):
        bank = with_adapter(bank, "eve", random_adapter(RANKS["bob"], seed))
        bank = without(bank, "eve")
    for method in METHODS:
        assert_a_fresh_build(bank, ADAPTERS, method)


def test_equal_skills_stay_as_narrow_as_one() -> None:
    bank = random_bank()
    for name in ("abe", "eve"):
        bank = with_adapter(bank, name, ADAPTERS["ada"])
    assert bank.layout == random_bank().layout


def test_an_edit_changes_the_digest_and_leaves_the_bank_it_was_made_of() -> None:
    bank = random_bank()
    before = bank.digest
    digests = {before, with_adapter(bank, "bea", NEW).digest, with_adapter(bank, "bob", NEW).digest}
    assert len({*digests, without(bank, "bob").digest}) == 4
    assert (bank.names, random_bank().digest) == (("ada", "bob", "cyd"), before)


def test_provenance_is_kept_for_the_others_and_stated_for_the_new() -> None:
    first = with_adapter(random_bank(), "bea", NEW, {"source": "here"})
    second = with_adapter(first, "eve", NEW, {"source": "there"})
    assert {task.name: dict(task.provenance) for task in second.tasks} == {
        "ada": {},
        "bea": {"source": "here"},
        "bob": {},
        "cyd": {},
        "eve": {"source": "there"},
    }
    assert [task.digest for task in second.tasks if task.name == "eve"] == [NEW.digest]


def test_what_is_no_edit_is_refused() -> None:
    bank = random_bank()
    for missing in (adapter_of, without):
        with pytest.raises(BankError, match=r"no skill named 'eve' \(known: ada, bob, cyd\)"):
            missing(bank, "eve")
    with pytest.raises(BankError, match="'only' is the bank's last skill"):
        without(random_bank({"only": NEW}), "only")
    with pytest.raises(BankError, match="names the base model itself"):
        with_adapter(bank, BASE.name, NEW)
    with pytest.raises(PreferenceError, match="'Bea'"):
        with_adapter(bank, "Bea", NEW)
    other = random_adapter({"layers.0.q": 2}, 1, {"layers.0.q": (12, 11)})
    with pytest.raises(BankError, match=r"layers\.0\.q: adapters disagree about its shape"):
        with_adapter(bank, "bea", other)


def test_a_bank_with_learned_soup_weights_is_not_edited() -> None:
    bank = without_calibrations(bank_of(ADAPTERS))
    with pytest.raises(BankError, match="learned soup weights"):
        with_adapter(bank, "bea", NEW)
    with pytest.raises(BankError, match="learned soup weights"):
        without(bank, "bob")
