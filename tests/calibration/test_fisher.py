"""Fisher information against all classes enumerated, on a network small enough to write out."""

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.lowrank import LowRank
from dynmerge.bank.bank import BaseIdentity
from dynmerge.bank.build import build_bank
from dynmerge.calibration.fisher import information, ridged
from dynmerge.merging.carried.granularity import GRANULARITIES
from dynmerge.merging.carried.maps import gauss_newton, ratio
from dynmerge.student import Student
from tests import reference
from tests.bank_factory import random_adapter

SHAPES = {"first": (4, 3), "last": (3, 4)}
RANKS: Mapping[str, Mapping[str, int]] = {"ada": {"first": 1, "last": 2}, "bob": {"last": 1}}


class Tiny(nn.Module):
    """Three numbers -> three classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


class Points:
    """Examples of one or two predictions."""

    digest = ""

    def __init__(self, model: nn.Module, seed: int, rows: int) -> None:
        self.model = model
        self.x = torch.randn(rows, 2, 3, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.x)

    def counts(self, rows: Sequence[int]) -> list[int]:
        return [1 + row % 2 for row in rows]

    def lengths(self) -> list[int]:
        return [1] * len(self)

    def inputs(self, rows: Sequence[int]) -> Tensor:
        return torch.cat([self.x[row, : 1 + row % 2] for row in rows])

    def logits(self, rows: Sequence[int]) -> Tensor:
        found: Tensor = self.model(self.inputs(rows))
        return found

    def targets(self, rows: Sequence[int]) -> Tensor | None:
        return None


@pytest.fixture(scope="module")
def adapters() -> dict[str, Adapter]:
    """Small ones: where a prediction is nearly certain, rare draws count for much."""
    found = {}
    for seed, (name, ranks) in enumerate(RANKS.items()):
        modules = random_adapter(ranks, seed, SHAPES).modules
        small = {module: LowRank(A=update.A, B=update.B / 3) for module, update in modules.items()}
        found[name] = Adapter(small, "tiny")
    return found


@pytest.fixture
def student(adapters: dict[str, Adapter]) -> Student:
    return Student(Tiny(), build_bank(BaseIdentity("tiny", "0" * 64), adapters))


@pytest.fixture
def texts(student: Student) -> dict[str, Points]:
    return {"ada": Points(student.model, 1, 3), "bob": Points(student.model, 2, 2)}


def pieces(method: str, adapters: dict[str, Adapter], module: str) -> list[tuple[int, Tensor]]:
    """Whose each coefficient of a layer is, and the dense matrix that it multiplies."""
    found = []
    for i, adapter in enumerate(adapters.values()):
        update = adapter.modules.get(module)
        if method == "tara-b":
            u = reference.joint_left_vectors(adapters, module)
            delta = torch.zeros(SHAPES[module], dtype=torch.float64)
            if update is not None:
                delta = reference.delta(adapter, module)
            found += [(i, torch.outer(u[:, k], u[:, k] @ delta)) for k in range(u.shape[1])]
        elif method == "adamerging":
            none = torch.zeros(SHAPES[module], dtype=torch.float64)
            found.append((i, none if update is None else reference.delta(adapter, module)))
        elif update is not None:
            directions = reference.rank_one_directions(update.B, update.A)
            found += [(i, direction.double()) for direction in directions]
    return found


def log_likelihoods(
    module: str, elsewhere: Mapping[str, Tensor], own: Sequence[Tensor], x: Tensor
) -> Callable[[Tensor], Tensor]:
    """phi -> log p (n, classes): W + sum_k phi_k own_k in `module`, W + delta elsewhere."""
    model = Tiny().double().requires_grad_(False)

    def log_p(phi: Tensor) -> Tensor:
        weights = {layer: model.get_submodule(layer).weight for layer in SHAPES}
        for layer, delta in elsewhere.items():
            if layer != module:
                weights[layer] = weights[layer] + delta
        for coefficient, piece in zip(phi, own, strict=True):
            weights[module] = weights[module] + coefficient * piece
        hidden = nn.functional.linear(x.double(), weights["first"], model.first.bias).tanh()
        last = nn.functional.linear(hidden, weights["last"], model.last.bias)
        return last.log_softmax(-1)

    return log_p


@pytest.mark.parametrize("method", ["adamerging", "tara-a", "tara-b"])
def test_information_is_that_of_all_classes_enumerated(
    method: str, student: Student, adapters: dict[str, Adapter], texts: dict[str, Points]
) -> None:
    found = information(student, texts, method, draws=200)
    for group, blocks in zip(student.bank.groups, found, strict=True):
        (member,) = group.members
        module = student.bank.modules[member].name
        owners, own = zip(*pieces(method, adapters, module), strict=True)
        assert GRANULARITIES[method].owners(group).tolist() == list(owners)
        for task, name in enumerate(student.bank.names):
            x = texts[name].inputs(range(len(texts[name])))
            elsewhere = reference.merged_deltas(adapters, {name: 1.0})
            point = torch.tensor([float(owner == task) for owner in owners], dtype=torch.float64)
            expected = reference.fisher(log_likelihoods(module, elsewhere, own, x), point)
            near = 0.15 * float(expected.abs().max())
            assert_close(blocks[0, task].double(), expected, atol=near, rtol=0)


def test_a_seed_draws_the_same_and_progress_is_told(
    student: Student, texts: dict[str, Points]
) -> None:
    seen: list[tuple[int, int]] = []

    def found(seed: int) -> list[Tensor]:
        return information(
            student, texts, "tara-a", seed=seed, progress=lambda *step: seen.append(step)
        )

    one, again, other = found(0), found(0), found(1)
    assert seen[:5] == [(done, 5) for done in range(1, 6)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, again, strict=True))
    assert not all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


def test_a_ridge_makes_every_block_positive_definite(
    student: Student, texts: dict[str, Points]
) -> None:
    silent = torch.zeros(1, 2, 3, 3)
    for blocks in (*information(student, texts, "tara-b"), silent):
        for ridge in (0.0, 1.0):
            assert (torch.linalg.eigvalsh(ridged(blocks, ridge).double()) > 0).all()
        before = blocks.diagonal(dim1=-2, dim2=-1)
        after = ridged(blocks, 1.0).diagonal(dim1=-2, dim2=-1)
        assert (after > 2 * before).all()


def sensitivities(blocks: Tensor, owners: Tensor) -> Tensor:
    """h (members, tasks, W) of the form `ratio`: log of H_j,kk over H_i,kk, i the owner of k."""
    diagonals = ridged(blocks, 0).diagonal(dim1=-2, dim2=-1)
    own = diagonals.gather(1, owners.expand(len(blocks), 1, -1))
    return (diagonals / own).log()


def test_at_a_large_ridge_gauss_newton_is_ratio_with_the_sensitivities(
    student: Student, texts: dict[str, Points]
) -> None:
    rho = torch.tensor([0.3, 0.7])
    for group, blocks in zip(
        student.bank.groups, information(student, texts, "tara-a"), strict=True
    ):
        owners = GRANULARITIES["tara-a"].owners(group)
        whole = gauss_newton({"information": ridged(blocks, 1e6)}, owners, rho)
        apart = ratio(
            {"ratio": (h := sensitivities(blocks, owners)), "gain": torch.zeros_like(h)},
            owners,
            rho,
        )
        assert_close(whole, apart, atol=2e-3, rtol=0)
