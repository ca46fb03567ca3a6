import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.lowrank import LowRank
from dynmerge.diagnostics.bank import (
    ALL,
    Diagnosis,
    Spectrum,
    diagnose_bank,
    spectrum,
)
from dynmerge.diagnostics.figures import draw_figures, save_figures
from tests import reference
from tests.bank_factory import SHAPES, random_adapter, random_adapters, random_bank

ADAPTERS = random_adapters()
BANK = random_bank(ADAPTERS)
FOUND = diagnose_bank(BANK)
EQUAL = dict.fromkeys(ADAPTERS, 1 / 3)
MODULES = pytest.mark.parametrize("found", FOUND.modules, ids=lambda found: found.name)


def factors(module: str) -> dict[str, reference.Task]:
    """Skill -> (B, A), float64, of those that change `module`."""
    return {
        name: (adapter.modules[module].B.double(), adapter.modules[module].A.double())
        for name, adapter in ADAPTERS.items()
        if module in adapter.modules
    }


def agree(found: Spectrum, dense: torch.Tensor) -> bool:
    expected = reference.spectrum(dense)
    return {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-4)


@MODULES
def test_coverage_is_that_of_the_vectorised_dense_updates(found: Diagnosis) -> None:
    tasks = factors(found.name)
    deltas = [B @ A for B, A in tasks.values()]
    rank_one = [piece for B, A in tasks.values() for piece in reference.rank_one_directions(B, A)]
    singular = []
    for delta, (B, _) in zip(deltas, tasks.values(), strict=True):
        U, S, Vh = torch.linalg.svd(delta)
        singular += [S[k] * torch.outer(U[:, k], Vh[k]) for k in range(B.shape[1])]
    coverage = found.coverage
    independent = sum(reference.effective_rank(delta) for delta in deltas)
    assert coverage.independent == pytest.approx(independent, rel=1e-5)
    for share, value, stack in (
        (coverage.dense_share, coverage.dense, deltas),
        (coverage.rank_one_share, coverage.rank_one, rank_one),
        (coverage.singular_share, coverage.singular, singular),
    ):
        assert value == pytest.approx(reference.stacked_effective_rank(stack), rel=1e-5)
        assert share == pytest.approx(value / independent)


@MODULES
def test_the_stacked_spectrum_is_that_of_all_b_before_and_after_pico_s_s(found: Diagnosis) -> None:
    Bs = {name: B for name, (B, _) in factors(found.name).items()}
    stacked = torch.cat(list(Bs.values()), dim=1)
    S = reference.pico_s(Bs, dict.fromkeys(Bs, 1 / len(Bs)))
    assert agree(found.stacked.before, stacked)
    assert agree(found.stacked.after, S @ stacked)
    assert found.skills == len(Bs)


@MODULES
def test_the_merged_spectrum_is_that_of_the_dense_merges(found: Diagnosis) -> None:
    parameters = {"gauge": "raw", "pool": "static", "restore": "norm", "scale": 1.0, "p": 1.0}
    linear = reference.merged_deltas(ADAPTERS, EQUAL)[found.name]
    pico = reference.merged_by("pico+linear", ADAPTERS, EQUAL, parameters)[found.name]
    assert agree(found.merged.before, linear)
    assert agree(found.merged.after, pico)


@MODULES
def test_overlap_and_factors_are_those_of_the_dense_factors(found: Diagnosis) -> None:
    tasks = list(factors(found.name).values())
    Bs, As = [B for B, _ in tasks], [A for _, A in tasks]
    assert found.B.effective_rank == pytest.approx(np.mean([*map(reference.effective_rank, Bs)]))
    assert found.A.effective_rank == pytest.approx(np.mean([*map(reference.effective_rank, As)]))
    assert found.B.omax == pytest.approx(np.mean([reference.spectrum(B)["omax"] for B in Bs]))
    if len(tasks) < 2:
        assert found.asymmetry is None
        return
    (B, A), (D, C) = tasks  # no module of these adapters has three
    asymmetry = found.asymmetry
    assert asymmetry is not None
    assert asymmetry.pairs == 1
    larger = max(B.shape[1], D.shape[1])
    O_A, O_B = reference.overlap(A.mT, C.mT), reference.overlap(B, D)
    assert asymmetry.A.measured == pytest.approx(O_A, rel=1e-5)
    assert asymmetry.B.measured == pytest.approx(O_B, rel=1e-5)
    assert asymmetry.A.excess == pytest.approx(O_A - larger / len(A.mT), abs=1e-5)
    assert asymmetry.B.excess == pytest.approx(O_B - larger / len(B), abs=1e-5)
    assert asymmetry.higher == (O_B > O_A)
    assert asymmetry.further == (O_B - larger / len(B) > O_A - larger / len(A.mT))


def test_kinds_are_means_over_the_modules_that_several_skills_change() -> None:
    shared = [module for module in FOUND.modules if module.skills > 1]
    assert [(kind.name, kind.modules) for kind in FOUND.kinds] == [("q", 2), ("v", 1), (ALL, 3)]
    q = [module for module in shared if module.name.endswith(".q")]
    kind = FOUND.kinds[0]
    assert kind.coverage.independent == pytest.approx(
        np.mean([module.coverage.independent for module in q])
    )
    assert kind.merged.after.norm == pytest.approx(np.mean([one.merged.after.norm for one in q]))
    widths = [len(module.stacked.before.values) for module in q]
    assert len(kind.stacked.before.values) == max(widths)
    assert kind.stacked.before.values[-1] == pytest.approx(
        max(q, key=lambda one: len(one.stacked.before.values)).stacked.before.values[-1] / 2
    )


def test_pico_flattens_what_skills_share_and_leaves_one_skill_alone() -> None:
    for module in FOUND.modules:
        before, after = module.stacked.before, module.stacked.after
        if module.skills == 1:
            assert after.values == pytest.approx(before.values)
            continue
        assert after.omax < before.omax
        assert after.effective_rank > before.effective_rank
        assert after.condition < before.condition


def test_orthogonal_skills_keep_all_of_their_rank_and_equal_ones_that_of_one() -> None:
    eye = torch.eye(12)
    apart = {
        name: Adapter(
            {"layers.0.q": LowRank(A=eye[start : start + 2, :10], B=eye[:, start : start + 2])},
            "random",
        )
        for name, start in (("ada", 0), ("bob", 2))
    }
    coverage = diagnose_bank(random_bank(apart)).kinds[-1].coverage
    assert coverage.rank_one_share == coverage.singular_share == pytest.approx(1)
    assert coverage.dense == pytest.approx(2)
    one = random_adapter({"layers.0.q": 3}, 0)
    coverage = diagnose_bank(random_bank({"ada": one, "bob": one})).kinds[-1].coverage
    assert coverage.dense == pytest.approx(1)
    assert coverage.singular_share == pytest.approx(1 / 2)


def test_a_skill_that_changes_nothing_adds_nothing() -> None:
    silent = LowRank(A=torch.ones(2, 10), B=torch.zeros(12, 2))
    found = diagnose_bank(random_bank({"nil": Adapter({"layers.0.q": silent}, "random")}))
    (module,) = found.modules
    assert module.stacked.before == Spectrum((), 0, 0, 0, 0, 0)
    assert module.merged.after.norm == module.coverage.rank_one_share == 0
    assert found.kinds == ()
    assert draw_figures(found).axes[0].texts[0].get_text().startswith("No module")


def test_a_spectrum_leaves_out_what_float32_cannot_tell_from_zero() -> None:
    found = spectrum(torch.diag(torch.tensor([3.0, 4.0, 1e-9], dtype=torch.float64)))
    assert found.values == pytest.approx((4, 3))
    assert (found.norm, found.condition) == pytest.approx((5, 4 / 3))
    assert found.energies == pytest.approx((0.64, 0.36))
    assert found.top(1) == pytest.approx(found.omax)


def test_the_report_is_json_and_progress_reaches_its_end() -> None:
    steps = []
    found = diagnose_bank(BANK, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (len(SHAPES), len(SHAPES))
    told = json.loads(found.to_json())
    assert [module["name"] for module in told["modules"]] == [*SHAPES]
    assert told["kinds"][-1]["coverage"]["dense"] == found.kinds[-1].coverage.dense


def test_figures_show_the_report_s_numbers(tmp_path: Path) -> None:
    save_figures(FOUND, None, tmp_path / "full.png")
    assert imread(tmp_path / "full.png").shape[1] > 1500
    figure = draw_figures(FOUND)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    pairs = [kind.asymmetry for kind in FOUND.kinds if kind.asymmetry]
    assert heights == [item.A.measured for item in pairs] + [item.B.measured for item in pairs]
    line = figure.axes[2].lines[0].get_ydata()
    assert line[2] == pytest.approx(100 * FOUND.kinds[-1].stacked.before.top(3))
