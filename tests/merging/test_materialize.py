from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from dynmerge.merging.materialize import materialize
from tests import reference
from tests.merging.dense import ADAPTERS, BANK, assert_same, made_by, written_out

WEIGHTS = {"ada": 0.2, "bob": 0.5, "cyd": 0.3}
MERGE = made_by(WEIGHTS, "linear")


def test_full_rank_is_the_merge_itself() -> None:
    whole = materialize(BANK, MERGE)
    assert whole.energy == pytest.approx(1)
    for module, expected in reference.merged_deltas(ADAPTERS, WEIGHTS).items():
        assert_close(reference.delta(whole.adapter, module), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_lower_rank_is_the_nearest_and_says_the_energy_it_keeps(rank: int) -> None:
    cut = materialize(BANK, MERGE, rank)
    kept = total = 0.0
    for module, expected in reference.merged_deltas(ADAPTERS, WEIGHTS).items():
        U, S, Vh = torch.linalg.svd(expected)
        nearest = U[:, :rank] * S[:rank] @ Vh[:rank]
        assert cut.adapter.modules[module].rank == rank
        assert_close(reference.delta(cut.adapter, module), nearest, rtol=1e-4, atol=1e-5)
        kept, total = kept + float(S[:rank].square().sum()), total + float(S.square().sum())
    assert cut.energy == pytest.approx(kept / total)


def test_nothing_at_all_keeps_all_its_energy() -> None:
    nothing = materialize(BANK, replace(MERGE, core=torch.zeros_like(MERGE.core)), 2)
    assert (nothing.rank, nothing.energy, dict(nothing.adapter.modules)) == (0, 1.0, {})


@pytest.mark.parametrize("skill", ADAPTERS)
def test_one_skill_alone_is_no_wider_than_it_was_and_stays_in_its_modules(skill: str) -> None:
    whole = materialize(BANK, made_by({skill: 1.0}, "linear")).adapter
    ranks = {name: update.rank for name, update in whole.modules.items()}
    assert ranks == {name: update.rank for name, update in ADAPTERS[skill].modules.items()}


def test_a_merge_with_factors_of_its_own_is_cut_like_any_other() -> None:
    made = made_by(WEIGHTS, "ties;space=full")
    whole = materialize(BANK, made)
    assert whole.energy == pytest.approx(made.energy)
    assert whole.energy < 1
    deltas = {name: reference.delta(whole.adapter, name) for name in whole.adapter.modules}
    assert_same(written_out(BANK, made), deltas)
    assert materialize(BANK, made, 1).energy < whole.energy
