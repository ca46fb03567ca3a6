"""Inspect a bank: what each skill changes, how alike the skills are, and what a merge costs.

Everything is computed in float64 from the factors in the shared orthonormal bases, where it is
exact: no `d_out x d_in` array is made. Knows no files and draws nothing (`plot.py` does).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dynmerge.bank.bank import FactorBank, ModuleFactors
from dynmerge.bank.calibration import Calibration


@dataclass(frozen=True, slots=True)
class TaskReport:
    """One skill: its update's Frobenius norm over all modules, and its mean effective rank."""

    name: str
    digest: str
    ranks: tuple[int, ...]  # distinct, ascending
    modules: int
    norm: float
    effective_rank: float
    provenance: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One linear layer; rank, norm and effective rank by task, in order, 0 where it is absent."""

    name: str
    d_out: int
    d_in: int
    p: int
    q: int
    K: int
    ranks: tuple[int, ...]
    norms: tuple[float, ...]
    effective_ranks: tuple[float, ...]
    merge_effective_rank: float


@dataclass(frozen=True, slots=True)
class Overlap:
    """How alike two subspaces are: 1 the same, 0 orthogonal, `chance` what random ones would show.

    `excess` is measured - chance: the part that means something.
    """

    measured: float
    chance: float
    excess: float


@dataclass(frozen=True, slots=True)
class PairReport:
    """Overlap of two skills, each number a mean over the `modules` that both change.

    `A` compares row spaces (what the skills read), `B` column spaces (what they write); None where
    the two share no module.
    """

    first: str
    second: str
    modules: int
    A: Overlap | None
    B: Overlap | None


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """What was learned for one method, and of its record what is there.

    `kept` is `start` where nothing learned was better. `start` and `best` are held-out scores: 0 is
    every adapter itself, 1 the base model.
    """

    method: str
    form: str
    digest: str
    objective: str | None
    kept: str | None
    start: float | None
    best: float | None

    @classmethod
    def of(cls, calibration: Calibration) -> "CalibrationReport":
        """Of a calibration, whose record may be anything."""
        record = calibration.record
        settings = record.get("settings")
        objective = settings.get("objective") if isinstance(settings, Mapping) else None
        scores = _scores(record)
        return cls(
            calibration.method,
            calibration.form,
            calibration.digest,
            None if objective is None else str(objective),
            None if record.get("kept") is None else str(record["kept"]),
            scores[0] if scores else None,
            min((score for score in scores if score is not None), default=None),
        )


@dataclass(frozen=True, slots=True)
class BytesReport:
    """Bytes of the factors as kept (float32), and of one resident merge: sum of p * q numbers."""

    factors: int
    merge_bf16: int
    merge_fp32: int


@dataclass(frozen=True, slots=True)
class BankReport:
    """What `dynmerge inspect` says. `merge_effective_rank` is of the merge with equal weights."""

    base: str
    fingerprint: str
    digest: str
    tasks: tuple[TaskReport, ...]
    calibrations: tuple[CalibrationReport, ...]
    modules: tuple[ModuleReport, ...]
    pairs: tuple[PairReport, ...]
    bytes: BytesReport
    merge_effective_rank: float


def inspect_bank(
    bank: FactorBank, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> BankReport:
    """Measure `bank`. `progress(done, total)` is called after each module."""
    modules: list[ModuleReport] = []
    overlaps: list[Tensor] = []
    for done, module in enumerate(bank.modules, start=1):
        modules.append(measure(module))
        overlaps.append(compare_tasks(module))
        progress(done, len(bank.modules))
    return BankReport(
        base=bank.base.name,
        fingerprint=bank.base.fingerprint,
        digest=bank.digest,
        tasks=tuple(_task(bank, index, modules) for index in range(len(bank.tasks))),
        calibrations=tuple(CalibrationReport.of(each) for each in bank.calibrations),
        modules=tuple(modules),
        pairs=_pairs(bank.names, overlaps),
        bytes=BytesReport(
            factors=sum(
                4 * tensor.numel()
                for module in bank.modules
                for tensor in (module.U, module.V, module.left, module.right)
            ),
            merge_bf16=2 * bank.layout.size,
            merge_fp32=4 * bank.layout.size,
        ),
        merge_effective_rank=_mean([module.merge_effective_rank for module in modules]),
    )


def readable(count: float) -> str:
    """Bytes for people: 7340032 is `7 MiB`."""
    unit = 0
    while count >= 1000 and unit < 3:
        count, unit = count / 1024, unit + 1
    digits = ".3g" if count < 1000 else ".0f"
    return f"{count:{digits}} {('B', 'KiB', 'MiB', 'GiB')[unit]}"


def split_name(module: str) -> tuple[str, str]:
    """(layer, kind) of a module: `model.layers.3.mlp.up_proj` is `3` and `mlp.up_proj`.

    Further numbers (experts) become `*`; a module outside the layers has the layer `-`.
    """
    match = re.match(r"(?:.*?\.)?(\d+)\.(.+)", module)
    layer, kind = (match[1], match[2]) if match else ("-", module)
    return layer, re.sub(r"(?<![^.])\d+(?![^.])", "*", kind)


def effective_rank(singular_values: Tensor) -> float:
    """exp(-sum p log p), p_k = sigma_k / sum sigma; 0 for a zero matrix (Roy & Vetterli 2007)."""
    total = singular_values.sum()
    if total == 0:
        return 0.0
    p = singular_values / total
    return float(torch.special.entr(p).sum().exp())


def column_space(factor: Tensor) -> Tensor:
    """Orthonormal basis (d, r) of what the columns of `factor` (d, r') span, as float32 sees it."""
    if not factor.shape[1]:
        return factor
    Q, S, _ = torch.linalg.svd(factor, full_matrices=False)
    tolerance = max(factor.shape) * torch.finfo(torch.float32).eps
    basis: Tensor = Q[:, : int((tolerance * S[0] < S).sum())]
    return basis


def compare_tasks(module: ModuleFactors) -> Tensor:
    """(4, tasks, tasks): overlap of A, chance of A, overlap of B, chance of B; NaN where absent.

    Computed in the shared bases, where subspaces keep their angles.
    """
    rows = [column_space(module.right[span].mT.double()) for span in module.slices()]
    columns = [column_space(module.left[:, span].double()) for span in module.slices()]
    A = compare(rows, dimension=module.V.shape[0])
    B = compare(columns, dimension=module.U.shape[0])
    return torch.stack([*A, *B])


def compare(bases: Sequence[Tensor], dimension: int) -> tuple[Tensor, Tensor]:
    """Overlap and chance (tasks, tasks) of subspaces with the given orthonormal bases (d, r_i).

    O_ij = ||Q_i^T Q_j||_F^2 / min(r_i, r_j), 1 where one subspace contains the other. For a random
    subspace of R^d the expected ||Q_i^T Q_j||_F^2 is r_i r_j / d, so chance is max(r_i, r_j) / d.
    """
    widths = torch.tensor([basis.shape[1] for basis in bases])
    owner = one_hot(torch.repeat_interleave(torch.arange(len(bases)), widths), len(bases)).double()
    stacked = torch.cat(list(bases), dim=1).cpu()
    shared = owner.mT @ (stacked.mT @ stacked).square() @ owner
    ranks = torch.where(widths > 0, widths.double(), torch.nan)
    smaller = torch.minimum(ranks[:, None], ranks[None, :])
    larger = torch.maximum(ranks[:, None], ranks[None, :])
    return shared / smaller, larger / dimension


def measure(module: ModuleFactors) -> ModuleReport:
    """Sizes, norms and effective ranks of one module."""
    spectra = [
        _spectrum(module.left[:, span].double(), module.right[span].double())
        for span in module.slices()
    ]
    merged = torch.linalg.svdvals(module.left.double() @ module.right.double())
    return ModuleReport(
        name=module.name,
        d_out=module.U.shape[0],
        d_in=module.V.shape[0],
        p=module.U.shape[1],
        q=module.V.shape[1],
        K=sum(module.ranks),
        ranks=module.ranks,
        norms=tuple(float(spectrum.norm()) for spectrum in spectra),
        effective_ranks=tuple(effective_rank(spectrum) for spectrum in spectra),
        merge_effective_rank=effective_rank(merged),
    )


def _spectrum(left: Tensor, right: Tensor) -> Tensor:
    """Singular values (r,) of left @ right: those of an r x r matrix, r the task's rank."""
    _, R_left = torch.linalg.qr(left)
    _, R_right = torch.linalg.qr(right.mT)
    spectrum: Tensor = torch.linalg.svdvals(R_left @ R_right.mT)
    return spectrum


def _task(bank: FactorBank, index: int, modules: Sequence[ModuleReport]) -> TaskReport:
    touched = [module for module in modules if module.ranks[index]]
    task = bank.tasks[index]
    return TaskReport(
        name=task.name,
        digest=task.digest,
        ranks=bank.ranks[index],
        modules=len(touched),
        norm=sum(module.norms[index] ** 2 for module in touched) ** 0.5,
        effective_rank=_mean([module.effective_ranks[index] for module in touched]),
        provenance=dict(task.provenance),
    )


def _pairs(names: Sequence[str], overlaps: Sequence[Tensor]) -> tuple[PairReport, ...]:
    """Every pair, averaged over the modules that both tasks change."""
    stacked = torch.stack(list(overlaps))  # (modules, 4, tasks, tasks)
    shared = ~stacked.isnan().any(dim=1)
    counts = shared.sum(dim=0)
    means = torch.where(shared[:, None], stacked, 0.0).sum(dim=0) / counts

    def pair(first: int, second: int) -> PairReport:
        both = int(counts[first, second])
        A, chance_A, B, chance_B = means[:, first, second].tolist()
        return PairReport(
            names[first],
            names[second],
            modules=both,
            A=Overlap(A, chance_A, A - chance_A) if both else None,
            B=Overlap(B, chance_B, B - chance_B) if both else None,
        )

    return tuple(pair(*tasks) for tasks in combinations(range(len(names)), 2))


def _scores(record: Mapping[str, object]) -> list[float | None]:
    """Held-out scores, that of the start first: of a training's checks, or of what was tried."""
    checks, tried = record.get("checks"), record.get("scores")
    found: list[object] = []
    if isinstance(checks, Sequence):
        found = [check.get("score") for check in checks if isinstance(check, Mapping)]
    elif isinstance(tried, Mapping):
        found = list(tried.values())
    return [float(score) if isinstance(score, int | float) else None for score in found]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
