"""Fisher: how sharply each skill's predictions react to each coefficient, at its own adapter.

The divergence from adapter j is 0 at adapter j, and so is its slope: near it the divergence is
(phi - c_j)^T H_j (phi - c_j) / 2 with H_j the Fisher information of the coefficients, which is the
Gauss-Newton matrix of the divergence. What minimises the weighted sum of these is known in closed
form for every preference: no optimisation, here or there.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot

from dynmerge.bank.bank import FactorBank
from dynmerge.calibration.learned import cores_of
from dynmerge.merging.carried.granularity import GRANULARITIES, constants_of
from dynmerge.student import Student
from dynmerge.texts.examples import Examples

FLOOR = 1e-3  # the least sensitivity that counts, a share of the layer's mean
SMALLEST = 1e-12  # where a layer changes nothing at all

Progress = Callable[[int, int], None]


def information(
    student: Student,
    texts: Mapping[str, Examples],
    method: str,
    draws: int = 2,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> list[Tensor]:
    """H (members, tasks, W, W) per group of the bank: blocks of one layer, float32.

    The mean over predictions of E[s s^T], s = d log p(y) / d phi, y drawn `draws` times from the
    adapter's own prediction p. Scores of independent draws are uncorrelated: all predictions of an
    example are scored in one pass, and the square of the sum estimates the sum of squares.
    """
    bank, generator = student.bank, torch.Generator().manual_seed(seed)
    owners = [GRANULARITIES[method].owners(group) for group in bank.groups]
    constants = constants_of(bank, method)
    blocks = [
        torch.zeros(len(group.members), len(bank.names), len(own), len(own))
        for group, own in zip(bank.groups, owners, strict=True)
    ]
    total, done = sum(len(texts[name]) for name in bank.names), 0
    for task, name in enumerate(bank.names):
        examples, rho = texts[name], one_hot(torch.tensor(task), len(bank.names)).float()
        share = draws * sum(examples.counts(range(len(examples))))
        for row in range(len(examples)):
            phi = _adapter(bank, owners, task)
            with student.under(cores_of(bank, method, phi, constants, rho)):
                log_p = examples.logits([row]).log_softmax(-1)
            for scores in _scores(log_p, phi, draws, generator):
                for block, s in zip(blocks, scores, strict=True):
                    block[:, task] += s[:, :, None] * s[:, None] / share
            done += 1
            progress(done, total)
    return blocks


def _adapter(bank: FactorBank, owners: Sequence[Tensor], task: int) -> list[Tensor]:
    """c_task for each group, (members, W), taking gradients: 1 where the task is the owner."""
    return [
        (own == task).float().repeat(len(group.members), 1).requires_grad_()
        for group, own in zip(bank.groups, owners, strict=True)
    ]


def _scores(
    log_p: Tensor, phi: Sequence[Tensor], draws: int, generator: Generator
) -> list[tuple[Tensor, ...]]:
    """d log p(y) / d phi, for each of several draws y of all the predictions (n, classes)."""
    found = []
    chances = log_p.detach().exp().cpu()
    for draw in range(draws):
        drawn = torch.multinomial(chances, 1, generator=generator).to(log_p.device)
        likelihood = log_p.gather(-1, drawn).sum()
        found.append(torch.autograd.grad(likelihood, phi, retain_graph=draw + 1 < draws))
    return found


def ridged(blocks: Tensor, ridge: float) -> Tensor:
    """H (members, tasks, W, W) with `ridge` times its own diagonal added: at a large ridge every
    coefficient is on its own. Positive definite.
    """
    diagonals = blocks.diagonal(dim1=-2, dim2=-1)
    return blocks + torch.diag_embed(ridge * diagonals + _least(diagonals))


def _least(diagonals: Tensor) -> Tensor:
    """(members, 1, 1): what is added to sensitivities (members, tasks, W)."""
    return (FLOOR * diagonals.mean((-2, -1), keepdim=True)).clamp(min=SMALLEST)
