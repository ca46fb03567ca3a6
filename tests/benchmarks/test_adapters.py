from benchmarks.adapters import random_adapters

SHAPES = {"layers.0.q": (12, 10), "layers.0.up": (20, 10)}


def test_the_adapters_have_the_shapes_and_the_rank_asked_for_and_differ() -> None:
    made = random_adapters(SHAPES, tasks=3, rank=2, seed=0)
    assert list(made) == ["task0", "task1", "task2"]
    for adapter in made.values():
        assert {name: update.shape for name, update in adapter.modules.items()} == SHAPES
        assert adapter.ranks == (2,)
    assert len({adapter.digest for adapter in made.values()}) == 3


def test_a_seed_makes_the_same_adapters_again() -> None:
    first, again, other = (random_adapters(SHAPES, 1, 2, seed)["task0"] for seed in (0, 0, 1))
    assert first.digest == again.digest
    assert first.digest != other.digest
