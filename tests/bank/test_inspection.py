import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import combinations

import pytest
import torch

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.lowrank import LowRank
from dynmerge.bank.edit import with_calibration
from dynmerge.bank.inspection import (
    Overlap,
    PairReport,
    column_space,
    compare,
    effective_rank,
    inspect_bank,
    readable,
)
from tests import reference
from tests.bank_factory import (
    SHAPES,
    flat_cores,
    random_adapter,
    random_adapters,
    random_bank,
    random_calibrations,
)

ADAPTERS = random_adapters()
BANK = random_bank(ADAPTERS)
REPORT = inspect_bank(BANK)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def shared_modules(first: str, second: str) -> list[str]:
    return sorted(ADAPTERS[first].modules.keys() & ADAPTERS[second].modules.keys())


def factors(name: str, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    update = ADAPTERS[name].modules[module]
    return update.A.mT, update.B


def test_norms_and_effective_ranks_are_those_of_the_dense_updates() -> None:
    assert [task.name for task in REPORT.tasks] == ["ada", "bob", "cyd"]
    for task in REPORT.tasks:
        deltas = [
            reference.delta(ADAPTERS[task.name], name) for name in ADAPTERS[task.name].modules
        ]
        assert task.modules == len(deltas)
        assert task.norm == pytest.approx(sum(float(d.square().sum()) for d in deltas) ** 0.5)
        expected = mean([reference.effective_rank(delta) for delta in deltas])
        assert task.effective_rank == pytest.approx(expected, rel=1e-5)


def test_the_uniform_merge_s_effective_rank_is_that_of_the_dense_merge() -> None:
    merged = reference.merged_deltas(ADAPTERS, dict.fromkeys(ADAPTERS, 1 / 3))
    for module in REPORT.modules:
        expected = reference.effective_rank(merged[module.name])
        assert module.merge_effective_rank == pytest.approx(expected, rel=1e-5)
    whole = mean([module.merge_effective_rank for module in REPORT.modules])
    assert REPORT.merge_effective_rank == pytest.approx(whole)


@pytest.mark.parametrize("pair", REPORT.pairs, ids=lambda pair: f"{pair.first}-{pair.second}")
def test_overlap_minus_chance_is_that_of_the_dense_factors(pair: PairReport) -> None:
    modules = shared_modules(pair.first, pair.second)
    assert pair.modules == len(modules)
    if not modules:
        assert (pair.first, pair.second) == ("ada", "cyd")
        assert pair.A is pair.B is None
        return
    for side, found in enumerate((pair.A, pair.B)):
        overlaps, chances = [], []
        for module in modules:
            first, second = factors(pair.first, module)[side], factors(pair.second, module)[side]
            overlaps.append(reference.overlap(first, second))
            chances.append(max(first.shape[1], second.shape[1]) / first.shape[0])
        assert found is not None
        assert found.measured == pytest.approx(mean(overlaps), rel=1e-5)
        assert found.chance == pytest.approx(mean(chances))
        assert found.excess == pytest.approx(mean(overlaps) - mean(chances), abs=1e-5)


def test_every_pair_is_reported_once() -> None:
    pairs = [(pair.first, pair.second) for pair in REPORT.pairs]
    assert pairs == list(combinations(BANK.names, 2))


@pytest.mark.parametrize("ranks", [(2, 2), (2, 5), (7, 1)])
def test_chance_is_what_random_subspaces_show(ranks: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)

    def subspace(rank: int) -> torch.Tensor:
        gaussian = torch.randn(24, rank, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(gaussian)[0]

    measured = []
    for _ in range(400):
        overlap, chance = compare([subspace(rank) for rank in ranks], dimension=24)
        measured.append(float(overlap[0, 1]))
    assert mean(measured) == pytest.approx(float(chance[0, 1]), rel=0.05)


def test_a_subspace_overlaps_one_that_contains_it_entirely() -> None:
    one = random_adapter({"layers.0.q": 2}, 0)
    update, more = one.modules["layers.0.q"], random_adapter({"layers.0.q": 3}, 1).modules
    wider = LowRank(
        A=torch.cat([2 * update.A, more["layers.0.q"].A]),
        B=torch.cat([update.B @ torch.tensor([[1.0, 2.0], [0.0, 3.0]]), more["layers.0.q"].B], 1),
    )
    (pair,) = inspect_bank(
        random_bank({"one": one, "two": Adapter({"layers.0.q": wider}, "random")})
    ).pairs
    assert Overlap(pytest.approx(1), 5 / 10, pytest.approx(1 / 2)) == pair.A
    assert Overlap(pytest.approx(1), pytest.approx(5 / 12), pytest.approx(7 / 12)) == pair.B


def test_a_factor_of_lower_rank_than_its_size_counts_for_what_it_spans() -> None:
    direction = torch.randn(12, 1, generator=torch.Generator().manual_seed(0))
    assert column_space(direction @ torch.ones(1, 3)).shape == (12, 1)
    assert column_space(torch.zeros(12, 3)).shape == (12, 0)
    assert column_space(torch.zeros(12, 0)).shape == (12, 0)


def test_an_adapter_that_changes_nothing_overlaps_nothing() -> None:
    silent = LowRank(A=torch.ones(2, 10), B=torch.zeros(12, 2))
    report = inspect_bank(
        random_bank({**ADAPTERS, "nil": Adapter({"layers.0.q": silent}, "random")})
    )
    nil = report.tasks[3]
    assert (nil.norm, nil.effective_rank, nil.modules) == (0, 0, 1)
    assert all(pair.B is None for pair in report.pairs if "nil" in (pair.first, pair.second))


def test_effective_rank_counts_equal_directions_and_ignores_absent_ones() -> None:
    assert effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([1.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(4)) == 0


def test_bytes_are_those_of_the_tensors() -> None:
    tensors = [t for m in BANK.modules for t in (m.U, m.V, m.left, m.right)]
    assert REPORT.bytes.factors == sum(tensor.nbytes for tensor in tensors)
    assert REPORT.bytes.merge_fp32 == flat_cores(BANK)[0].nbytes
    assert REPORT.bytes.merge_bf16 == flat_cores(BANK)[0].bfloat16().nbytes
    assert readable(7 << 20) == "7 MiB"
    assert [readable(n) for n in (0, 999, 1000, 3 << 40)] == [
        "0 B",
        "999 B",
        "0.977 KiB",
        "3072 GiB",
    ]


def test_modules_state_their_sizes() -> None:
    for module in REPORT.modules:
        assert (module.d_out, module.d_in) == SHAPES[module.name]
        assert module.p == min(module.d_out, module.K)
        assert module.q == min(module.d_in, module.K)
        assert module.ranks == tuple(
            update.rank if (update := ADAPTERS[name].modules.get(module.name)) else 0
            for name in BANK.names
        )


def test_the_report_is_json_and_says_all() -> None:
    told = json.loads(json.dumps(asdict(REPORT)))
    assert told["digest"] == BANK.digest
    assert [task["name"] for task in told["tasks"]] == list(BANK.names)
    assert told["pairs"][1]["A"] is None
    assert told["pairs"][0]["B"].keys() == {"measured", "chance", "excess"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({}, (None, None, None, None)),
        (
            {
                "settings": {"objective": "distil", "steps": 50},
                "checks": [{"score": 0.4}, {"score": 0.2}, {"score": None}],
                "kept": "learned",
            },
            ("distil", "learned", 0.4, 0.2),
        ),
        ({"scores": {"linear": 0.5, "regmean": 0.25}}, (None, None, 0.5, 0.25)),
        ({"settings": "x", "checks": [1, {}], "scores": [], "kept": 3}, (None, "3", None, None)),
        ({"settings": {"objective": 1}, "checks": 1, "scores": {"a": "b"}}, ("1",) + (None,) * 3),
    ],
)
def test_a_calibration_is_told_with_what_its_record_has(
    record: Mapping[str, object], expected: tuple[object, ...]
) -> None:
    tuned = replace(random_calibrations(BANK)[-1], record=record)
    (told,) = inspect_bank(with_calibration(BANK, tuned)).calibrations
    assert (told.method, told.form, told.digest) == ("tuned", "norm", tuned.digest)
    assert (told.objective, told.kept, told.start, told.best) == expected


def test_one_skill_has_no_pairs() -> None:
    report = inspect_bank(random_bank({"ada": ADAPTERS["ada"]}))
    assert report.pairs == ()
    assert report.merge_effective_rank == pytest.approx(report.tasks[0].effective_rank)
