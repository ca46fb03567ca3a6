from collections.abc import Sequence

from dynmerge.texts.batches import PREDICTIONS, alike, batches


class Long:
    """Examples of many predictions."""

    def __len__(self) -> int:
        return 9

    def lengths(self) -> list[int]:
        return [10] * 9

    def counts(self, rows: Sequence[int]) -> list[int]:
        return [PREDICTIONS // 2 - 1 if row < 8 else 4 * PREDICTIONS for row in rows]


def test_many_predictions_make_small_batches() -> None:
    found = list(batches(Long(), 4))  # type: ignore[arg-type]
    assert found == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]


def test_alike_is_all_rows_by_length() -> None:
    assert alike([5, 1, 4, 2], 3) == [[1, 3, 2], [0]]
    assert alike([5, 1, 4, 2], 3, [2, 0]) == [[2, 0]]
