import pytest
import torch
from torch import Generator

from dynmerge.calibration.draws import POOL, Rows, centre, preference


def drawn(tasks: int, count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = Generator().manual_seed(seed)
    return [preference(tasks, generator) for _ in range(count)]


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_preferences_are_points_of_the_simplex_with_two_skills_or_more(tasks: int) -> None:
    found = torch.stack(drawn(tasks, 400))
    assert (found >= 0).all()
    assert found.sum(1).tolist() == pytest.approx([1.0] * 400, abs=1e-5)
    present = (found > 0).sum(1)
    assert sorted(set(present.tolist())) == list(range(2, tasks + 1))
    middle = (found == centre(tasks)).all(1).float().mean()
    assert 0.15 < float(middle) < 0.35
    # Skewed ones too: somebody has nearly all.
    assert float(found.amax()) > 0.95
    # No skill is favoured.
    assert float((found.mean(0) - 1 / tasks).abs().max()) < 0.05


def test_the_same_seed_draws_the_same() -> None:
    same = zip(drawn(3, 9), drawn(3, 9), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in same)
    assert not torch.equal(torch.stack(drawn(3, 9)), torch.stack(drawn(3, 9, seed=1)))


def test_every_row_comes_before_any_comes_again() -> None:
    rows = Rows([row % 5 for row in range(23)], 4, Generator().manual_seed(0))
    rounds = []
    for _ in range(2):
        taken: list[int] = []
        while len(taken) < 23:
            batch = rows.take()
            assert len(batch) <= 4
            taken += batch
        assert sorted(taken) == list(range(23))
        rounds.append(taken)
    assert rounds[0] != rounds[1]


def test_a_batch_is_of_like_length_and_the_order_of_batches_is_not() -> None:
    lengths = list(range(32))
    rows = Rows(lengths, 8, Generator().manual_seed(3))
    batches = [rows.take() for _ in range(POOL)]
    for batch in batches:
        assert max(batch) - min(batch) == 7
    firsts = [min(batch) for batch in batches]
    assert firsts != sorted(firsts)


def test_fewer_rows_than_a_batch_are_one_batch() -> None:
    rows = Rows([3, 1, 2], 8, Generator().manual_seed(0))
    assert rows.take() == [1, 2, 0]
    assert rows.take() == [1, 2, 0]
