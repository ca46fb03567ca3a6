"""The study's rows on a network of four layers: what each promises, what is kept of it and when."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dynmerge.bank.calibration import Calibration
from dynmerge.calibration import draws
from dynmerge.calibration.learned import Learned, weighted
from dynmerge.calibration.plan import Objective, Plan
from dynmerge.errors import CalibrationError
from dynmerge.student import Student
from study import run
from study.bench import Bench, Part, by
from study.cells import read_cells
from study.inputs import inputs_of
from study.methods import ALL_ROWS, ROWS, counted
from study.places import CENTRE
from study.plans import at_centre
from study.trained import PerTask, Run, key_of, trained
from tests.calibration.network import SHAPES, Network, Points, network_bank

NAMES = ("ada", "bob", "cyd")
SIZES = {"calibration": 6, "validation": 5, "guard": 4, "test": 7}


def short(plan: Plan) -> Plan:
    return replace(plan, steps=min(plan.steps, 4), check=2, batch=3)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    for place in ("study.cells", "study.trained"):
        monkeypatch.setattr(f"{place}.cache_folder", lambda: tmp_path)
    student = Student(Network(), network_bank())
    splits = {
        split: {
            name: Part(Points(student.model, 10 * place + task, size, task), size)
            for task, name in enumerate(NAMES)
        }
        for place, (split, size) in enumerate(SIZES.items())
    }
    yield Bench("encoder", 1, student, splits, {}, short)
    student.close()


@pytest.mark.parametrize("name", ALL_ROWS)
def test_every_row_merges_what_it_has_and_tells_the_same_again(name: str, bench: Bench) -> None:
    row = ALL_ROWS[name]
    first, second = (row.make(bench)[0](bench.centre) for _ in range(2))
    found, again = bench.test(first), bench.test(second)
    assert list(found) == list(NAMES)
    for skill in NAMES:
        assert found[skill].counts.sum() == sum(bench.splits["test"][skill].counts(range(7)))
        assert_close(found[skill].nats, again[skill].nats)
    base = bench.test(weighted(bench.bank, torch.zeros(3)))
    moved = any(not torch.equal(found[skill].nats, base[skill].nats) for skill in NAMES)
    assert moved == (name != "zero-shot")


def test_the_mean_with_its_norm_has_the_adapters_mean_norm_in_every_layer(bench: Bench) -> None:
    made = ROWS["mean-gamma"].make(bench)[0](bench.centre)
    assert isinstance(made, list)
    for module, core in zip(bench.bank.modules, made, strict=True):
        deltas = [(module.U @ module.core(task) @ module.V.mT).double() for task in range(3)]
        wanted = sum(float(delta.norm()) for delta in deltas) / 3
        assert float(core.norm()) == pytest.approx(wanted, rel=1e-5)
        mean = torch.stack(deltas).mean(0)
        found = (module.U @ core @ module.V.mT).double()
        assert_close(found, mean * (wanted / mean.norm()), atol=1e-6, rtol=1e-4)


def test_a_tuned_scale_is_the_best_on_validation_and_none_on_test(bench: Bench) -> None:
    def quality(scale: float) -> tuple[float, float]:
        made = by(bench.bank, f"linear;p=inf;scale={scale:g}")(bench.centre)
        found = bench.scores("validation", made).values()
        return round(sum(one.accuracy for one in found), 9), -sum(one.loss for one in found)

    _, chosen = ROWS["tuned"].make(bench)
    assert chosen == {"scale": max((n / 10 for n in range(2, 11)), key=quality)}


def written_out_weights(bench: Bench, objective: str, plan: Plan) -> Tensor:
    """(tasks,) after all steps, the updates added to float64 weights and no core anywhere."""
    model = Network().double()
    base = {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in SHAPES}
    deltas = [
        {f"{m.name}.weight": (m.U @ m.core(task) @ m.V.mT).double() for m in bench.bank.modules}
        for task in range(len(NAMES))
    ]
    texts = [bench.splits["calibration"][name] for name in NAMES]

    def logits(task: int, rows: Sequence[int], weights: Sequence[Tensor | float]) -> Tensor:
        own = texts[task].whole
        x = torch.cat([own.x[row, : 1 + row % 2] for row in rows]).double()
        merged = {
            name: W + sum(w * delta[name] for w, delta in zip(weights, deltas, strict=True))
            for name, W in base.items()
        }
        return torch.func.functional_call(model, merged, (x,))

    def losses(task: int, rows: Sequence[int], weights: Sequence[Tensor | float]) -> Tensor:
        log_p = logits(task, rows, weights).log_softmax(-1)
        if objective == "labels":
            right = texts[task].targets(rows)
            return -torch.stack([own[place] for own, place in zip(log_p, right, strict=True)])
        if objective == "entropy":
            return -(log_p.exp() * log_p).sum(-1)
        alone = [float(other == task) for other in range(len(NAMES))]
        teacher = logits(task, rows, alone).log_softmax(-1)
        return (teacher.exp() * (teacher - log_p)).sum(-1)

    weights = torch.full((len(NAMES),), 0.4, dtype=torch.float64, requires_grad=True)
    whole = [range(len(own)) for own in texts]
    alone = torch.eye(len(NAMES)).tolist()
    anchors, sizes = [], []
    for task, rows in enumerate(whole):
        best = losses(task, rows, alone[task]).mean().item() if objective == "entropy" else 0.0
        sizes.append(abs(losses(task, rows, weights.tolist()).mean().item() - best))
        anchors.append(best)
    scales = [max(size, 0.1 * sum(sizes) / len(sizes)) for size in sizes]
    optimizer = torch.optim.AdamW([weights], lr=0.2 * plan.rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(plan.seed)
    drawn = [draws.Rows(own.lengths(), plan.batch, generator) for own in texts]
    for _ in range(plan.steps):
        gaps = [
            (losses(task, rows.take(), weights).mean() - anchors[task]) / scales[task]
            for task, rows in enumerate(drawn)
        ]
        loss = torch.stack([gap / len(NAMES) for gap in gaps]).exp().sum().log()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return weights.detach()


@pytest.mark.parametrize("objective", get_args(Objective))
def test_one_weight_per_task_is_learned_as_if_written_out(
    objective: Objective, bench: Bench
) -> None:
    plan = replace(at_centre("per-task", objective), steps=4)
    run = trained(bench, plan, PerTask.of(bench.bank))
    wanted = written_out_weights(bench, objective, replace(short(plan), seed=bench.seed))
    assert_close(run.last.tables[0]["fixed"][0].double(), wanted, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(wanted, torch.full_like(wanted, 0.4), atol=1e-3)


@pytest.mark.parametrize("objective", get_args(Objective))
def test_by_entropy_the_last_step_counts_and_else_what_the_guard_kept(
    objective: Objective, bench: Bench
) -> None:
    best = Learned.start(bench.bank, "adamerging", "fixed")
    last = best.clone()
    found = counted(at_centre("adamerging", objective), Run(best, last, []))
    assert found is (last if objective == "entropy" else best)


def test_what_is_shipped_is_served_by_its_own_bank_or_linear_where_it_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker, scores = ROWS["tuned-norm"].make(bench)
    assert isinstance(scores, dict)
    best = min(scores, key=lambda name: scores[name])
    assert_close(
        [one.nats for one in bench.test(maker(bench.centre)).values()],
        [one.nats for one in bench.test(by(bench.bank, best)(bench.centre)).values()],
    )

    def refuse(*_: object) -> Calibration:
        raise CalibrationError("no better than linear's")

    monkeypatch.setattr("study.methods.calibrate", refuse)
    maker, told = ROWS["regmean-plain"].make(bench)
    assert told == {"refused": "no better than linear's"}
    assert_close(
        [one.nats for one in bench.test(maker(bench.centre)).values()],
        [one.nats for one in bench.test(by(bench.bank, "linear")(bench.centre)).values()],
    )


def test_a_kept_calibration_is_that_of_its_plan_start_bank_and_texts(bench: Bench) -> None:
    plan = Plan("adamerging", "ratio", seed=bench.seed)
    start = Learned.start(bench.bank, "adamerging", "ratio")
    other = replace(bench, splits=bench.splits | {"guard": bench.splits["validation"]})
    keys = [
        key_of(bench, plan, start),
        key_of(bench, replace(plan, steps=7), start),
        key_of(bench, plan, Learned.start(bench.bank, "adamerging", "ratio", 1.0)),
        key_of(bench, plan, Learned.start(bench.bank, "tara-a", "ratio")),
        key_of(other, plan, start),
    ]
    assert len(set(keys)) == len(keys)
    assert key_of(bench, plan, start.clone()) == keys[0]


def test_what_is_kept_is_what_was_found(bench: Bench) -> None:
    plan = at_centre("tara-a", "distil")
    first, again = trained(bench, plan), trained(bench, plan)
    assert first.checks == again.checks
    for one, other in zip(first.best.parameters(), again.best.parameters(), strict=True):
        assert_close(one[1], other[1])


def test_a_row_is_measured_once_and_again_where_what_it_depends_on_changed(
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = [bench]
    monkeypatch.setattr(run, "open_bench", lambda suite, seed: now[0])
    monkeypatch.setattr(run, "places", lambda tasks: {CENTRE: draws.centre(tasks)})

    def measured(*names: str, again: bool = False) -> list[str]:
        run.run("encoder", 1, frozenset(names), again)
        return [line.split()[2].strip(":") for line in capsys.readouterr().err.splitlines()]

    assert measured("mean", "tuned", "single") == ["single", "mean", "tuned"]
    assert measured("mean", "tuned") == []
    assert measured("tuned", again=True) == ["tuned"]
    assert measured("adamerging-labels") == ["adamerging-labels"]
    (kept,) = (tmp_path / "learned").iterdir()
    kept.write_bytes(b"of a version before")
    assert measured("adamerging-labels", again=True) == ["adamerging-labels"]
    assert torch.load(kept, weights_only=True)["checks"]
    fewer = {name: Part(bench.splits["test"][name], 6) for name in NAMES}
    now[0] = replace(bench, splits=bench.splits | {"test": fewer})
    assert measured("mean") == ["mean"]
    cells = read_cells("encoder", 1)
    assert [cell.inputs for cell in cells if cell.method == "mean"] == [
        inputs_of("mean", now[0])
    ] * 3
    assert {len(cell.right) for cell in cells if cell.method == "mean"} == {6}
    assert {len(cell.right) for cell in cells if cell.method == "tuned"} == {7}
    assert {cell.at for cell in cells} == {CENTRE}
