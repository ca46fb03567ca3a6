import pytest

from dynmerge.errors import ConfigError
from dynmerge.evaluation.simplex import corners, even_grid, uniform


def test_words_for_preferences() -> None:
    assert [str(found) for found in corners(["b", "a"])] == ["b=1", "a=1"]
    assert uniform(["a", "b"]).weights == {"a": 0.5, "b": 0.5}
    assert len(even_grid(["a", "b", "c"], 5)) == 21
    assert str(even_grid(["a", "b", "c"], 5)[1]) == "a=0.8, b=0.2"
    with pytest.raises(ConfigError, match="two or three skills; here are 4"):
        even_grid(["a", "b", "c", "d"], 5)
    with pytest.raises(
        ConfigError, match="3 steps is not even in thousandths; take one of 1, 2, 4"
    ):
        even_grid(["a", "b"], 3)
