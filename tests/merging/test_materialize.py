import pytest
import torch
from torch.testing import assert_close

from dynmerge.merging.materialize import materialize
from dynmerge.merging.methods import assemble, default_method
from dynmerge.preference import Preference
from tests import reference
from tests.bank_factory import random_adapters, random_bank

ADAPTERS = random_adapters()
BANK = random_bank(ADAPTERS)
WEIGHTS = {"ada": 0.2, "bob": 0.5, "cyd": 0.3}
CORE = assemble(BANK, [Preference.of(WEIGHTS)], default_method())[0]


def test_full_rank_is_the_merge_itself() -> None:
    whole = materialize(BANK, CORE)
    assert whole.energy == pytest.approx(1)
    for module, expected in reference.merged_deltas(ADAPTERS, WEIGHTS).items():
        assert_close(reference.delta(whole.adapter, module), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_lower_rank_is_the_nearest_and_says_the_energy_it_keeps(rank: int) -> None:
    cut = materialize(BANK, CORE, rank)
    kept = total = 0.0
    for module, expected in reference.merged_deltas(ADAPTERS, WEIGHTS).items():
        U, S, Vh = torch.linalg.svd(expected)
        nearest = U[:, :rank] * S[:rank] @ Vh[:rank]
        assert cut.adapter.modules[module].rank == rank
        assert_close(reference.delta(cut.adapter, module), nearest, rtol=1e-4, atol=1e-5)
        kept, total = kept + float(S[:rank].square().sum()), total + float(S.square().sum())
    assert cut.energy == pytest.approx(kept / total)


def test_nothing_at_all_keeps_all_its_energy() -> None:
    nothing = materialize(BANK, torch.zeros_like(CORE), 2)
    assert (nothing.rank, nothing.energy, dict(nothing.adapter.modules)) == (0, 1.0, {})


@pytest.mark.parametrize("skill", ADAPTERS)
def test_one_skill_alone_is_no_wider_than_it_was_and_stays_in_its_modules(skill: str) -> None:
    core = assemble(BANK, [Preference.of({skill: 1})], default_method())[0]
    whole = materialize(BANK, core).adapter
    ranks = {name: update.rank for name, update in whole.modules.items()}
    assert ranks == {name: update.rank for name, update in ADAPTERS[skill].modules.items()}
