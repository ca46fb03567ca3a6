import hashlib
import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.base_model import BaseModel
from dynmerge.adapters.checkpoint import load_adapter
from dynmerge.bank.bank import BaseIdentity, FactorBank
from dynmerge.bank.build import build_bank
from dynmerge.calibration.teachers import lessons
from dynmerge.diagnostics.bank import diagnose_bank
from dynmerge.diagnostics.figures import by_layer, draw_figures
from dynmerge.diagnostics.sensitivity import (
    CENTRE,
    condition,
    jacobian,
    linear_point,
    measure_sensitivity,
    misalignment,
)
from dynmerge.errors import ExamplesError
from dynmerge.student import Student
from tests import reference


class Tokens:
    """Rows of tokens, of which every one is predicted from those before it."""

    def __init__(self, model: PreTrainedModel, seed: int, rows: int) -> None:
        self.model = model
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, 300, (rows, 6), generator=generator)
        self.digest = hashlib.sha256(str(seed).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    def counts(self, rows: Sequence[int]) -> list[int]:
        return [self.ids.shape[1] - 1 for _ in rows]

    def lengths(self) -> list[int]:
        return [self.ids.shape[1] for _ in self.ids]

    def logits(self, rows: Sequence[int]) -> Tensor:
        return self.model(input_ids=self.ids[list(rows)]).logits[:, :-1].flatten(0, 1)

    def targets(self, rows: Sequence[int]) -> Tensor | None:
        return self.ids[list(rows), 1:].flatten()


@pytest.fixture(scope="module")
def adapters(base_folder: Path, adapter_folders: dict[str, Path]) -> dict[str, Adapter]:
    base = BaseModel.open(base_folder)
    return {name: load_adapter(folder, base) for name, folder in adapter_folders.items()}


@pytest.fixture
def bank(adapters: dict[str, Adapter]) -> FactorBank:
    return build_bank(BaseIdentity("tiny", "0" * 64), adapters)


@pytest.fixture
def examples(base_model: PreTrainedModel, bank: FactorBank) -> dict[str, Tokens]:
    model = base_model.double()
    return {name: Tokens(model, seed, 2 + seed) for seed, name in enumerate(bank.names)}


def dense_directions(bank: FactorBank, adapters: dict[str, Adapter]) -> list[tuple[str, Tensor]]:
    """Every (module, b_k a_k^T), in the order of phi."""
    return [
        (module.name, direction)
        for module in bank.modules
        for name in bank.names
        if module.name in adapters[name].modules
        for direction in reference.rank_one_directions(
            adapters[name].modules[module.name].B, adapters[name].modules[module.name].A
        )
    ]


def test_the_jacobian_is_what_finite_differences_of_dense_merges_show(
    base_model: PreTrainedModel,
    bank: FactorBank,
    adapters: dict[str, Adapter],
    examples: dict[str, Tokens],
) -> None:
    model = base_model.double()
    directions = dense_directions(bank, adapters)

    def objective(texts: Tokens) -> Callable[[Tensor], float]:
        def entropy(phi: Tensor) -> float:
            deltas: dict[str, Tensor] = {}
            for weight, (name, direction) in zip(phi, directions, strict=True):
                deltas[name] = deltas.get(name, 0) + weight * direction
            written = reference.written_out(deepcopy(model), deltas)
            p = written(input_ids=texts.ids).logits[:, :-1].softmax(-1)
            return float(-(p * p.log()).sum(-1).mean())

        return entropy

    rho = torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64)
    phi = linear_point(bank, rho)
    with torch.no_grad():
        objectives = [objective(examples[name]) for name in bank.names]
        some = range(0, len(directions), 5)
        # The model takes its norms in float32, so the step is not a small one.
        expected = reference.finite_jacobian(objectives, torch.cat(phi), some, step=1e-3)
        values = [f(torch.cat(phi)) for f in objectives]
    student = Student(model, bank)
    found, J = jacobian(student, lessons(student, examples, "entropy", 2), phi, batch=2)
    assert found.tolist() == pytest.approx(values, abs=1e-6)
    assert J.shape == (4, len(directions))
    assert_close(J[:, list(some)], expected, atol=1e-4, rtol=1e-3)
    assert float(J.abs().max()) > 0.1


def test_the_linear_point_is_the_linear_merge(bank: FactorBank) -> None:
    rho = torch.tensor([0.5, 0.2, -0.1, 0.4])
    for module, phi in zip(bank.modules, linear_point(bank, rho), strict=True):
        merged = sum(rho[task] * module.core(task) for task in range(4))
        assert_close((module.left * phi) @ module.right, merged)


def test_the_report_reads_off_the_jacobian(
    base_model: PreTrainedModel, bank: FactorBank, examples: dict[str, Tokens]
) -> None:
    student = Student(base_model.double(), bank)
    steps = []
    report = measure_sensitivity(
        student, examples, "labels", batch=3, progress=lambda *step: steps.append(step)
    )
    phi = linear_point(bank, torch.full((4,), 1 / 4))
    values, J = jacobian(student, lessons(student, examples, "labels", 3), phi, batch=3)
    assert report.values == tuple(values.tolist())
    assert report.predictions == (10, 15, 20, 25)
    assert steps[-1] == (len(steps), len(steps))
    start = 0
    for place, module in enumerate(bank.modules):
        part = J[:, start : start + sum(module.ranks)]
        assert [row[place] for row in report.norms] == pytest.approx(part.norm(dim=1).tolist())
        start += sum(module.ranks)
    singular = torch.linalg.svdvals(J)
    assert report.condition == pytest.approx(float(singular[0] / singular[-1]))
    balanced = torch.linalg.svdvals(J / J.norm(dim=1, keepdim=True))
    assert report.balanced_condition == pytest.approx(float(balanced[0] / balanced[-1]))
    assert report.preferences == (*bank.names, CENTRE)
    corners = [[float(i == j) for i in range(4)] for j in range(4)]
    for first, rho in enumerate([*corners, [0.25] * 4]):
        for second, other in enumerate([*corners, [0.25] * 4]):
            expected = reference.sensitivity_misalignment(J, rho, other)
            assert report.misalignment[first][second] == pytest.approx(expected, abs=1e-9)
    assert json.loads(json.dumps(asdict(report)))["condition"] == report.condition
    figure = draw_figures(diagnose_bank(bank), report)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert any(title.startswith("|| d f_i / d phi ||") for title in titles)
    layers, table = by_layer(report)
    assert layers == ["0", "1"]
    assert (table**2).sum(axis=1) == pytest.approx(J.square().sum(dim=1).numpy())


def test_a_skill_without_examples_is_named(
    base_model: PreTrainedModel, bank: FactorBank, examples: dict[str, Tokens]
) -> None:
    del examples["cyd"]
    with pytest.raises(ExamplesError, match="cyd"):
        measure_sensitivity(Student(base_model.double(), bank), examples)


def test_predictions_that_are_no_numbers_are_named(
    base_model: PreTrainedModel, bank: FactorBank, examples: dict[str, Tokens]
) -> None:
    base_model.get_output_embeddings().weight.data[7] = float("nan")
    with pytest.raises(ExamplesError, match="on the texts of 'ada' equal shares predict NaN"):
        measure_sensitivity(Student(base_model.double(), bank), examples)


def test_a_condition_number_is_none_where_a_skill_has_no_say_of_its_own() -> None:
    J = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.0]], dtype=torch.float64)
    assert condition(J) == pytest.approx(2)
    assert condition(torch.stack([J[0], J[0]])) is None
    assert condition(torch.zeros(2, 3)) is None


def test_misalignment_does_not_count_sign_or_size() -> None:
    J = torch.tensor([[2.0, 0.0], [-3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    xi = misalignment(J, torch.eye(3, dtype=torch.float64))
    assert_close(xi, torch.tensor([[0.0, 0, 1], [0, 0, 1], [1, 1, 0]], dtype=torch.float64))
