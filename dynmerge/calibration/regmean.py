"""RegMean: what each adapter's own text looks like to the shared bases, and the cores it gives."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynmerge.bank.bank import FactorBank
from dynmerge.calibration.learned import in_order
from dynmerge.calibration.teachers import alone
from dynmerge.errors import ExamplesError
from dynmerge.merging.carried.granularity import by_moments
from dynmerge.merging.choice import parse_method, settled
from dynmerge.merging.parameters import number
from dynmerge.student import Student
from dynmerge.texts.batches import batches
from dynmerge.texts.examples import Examples

RIDGE = number(settled(parse_method("regmean"))[1], "ridge")  # what serves where nobody chose


@torch.no_grad()
def second_moments(
    student: Student, texts: Mapping[str, Examples], batch: int = 32
) -> list[Tensor]:
    """S (tasks, q, q) per module: the mean of z z^T, z = V^T x, x over task i's tokens.

    Under adapter i, as RegMean takes activations of the fine-tuned models. Padding is left out; a
    beginning that all of a task's examples share and that is run once a batch counts once a batch.
    Raises ExamplesError for a layer that read nothing of a task's.
    """
    modules = student.bank.modules
    sums = [torch.zeros(len(student.bank.tasks), *2 * [m.V.shape[1]]) for m in modules]
    counts = torch.zeros(len(modules), len(student.bank.tasks))
    for task, name in enumerate(student.bank.names):

        def see(module: int, x: Tensor, z: Tensor, task: int = task) -> None:
            z = z.float()
            sums[module][task] += (z.mT @ z).cpu()
            counts[module, task] += len(z)

        with student.under(alone(student.bank, task)), student.watching(see):
            for rows in batches(texts[name], batch):
                texts[name].logits(rows)
        _check_read(student.bank, name, counts[:, task])
    return [total / count[:, None, None] for total, count in zip(sums, counts, strict=True)]


def _check_read(bank: FactorBank, name: str, counts: Tensor) -> None:
    """Raise ExamplesError where a module read none of the texts of `name`; counts (modules,)."""
    for module, count in zip(bank.modules, counts.tolist(), strict=True):
        if not count:
            raise ExamplesError(
                f"{module.name} read nothing of {name!r}: there were no texts, or it does not run"
            )


def regmean_cores(bank: FactorBank, moments: Sequence[Tensor], rho: Tensor) -> list[Tensor]:
    """C(rho) (p, q) of `regmean` for every module; moments (tasks, q, q) of each."""
    return in_order(
        bank,
        [
            by_moments(
                group, torch.stack([moments[member] for member in group.members]), rho, RIDGE
            )
            for group in bank.groups
        ],
    )
