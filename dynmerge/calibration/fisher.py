"""Fisher: how sharply each skill's predictions react to each coefficient, at its own adapter.

The divergence from adapter j is 0 at adapter j, and so is its slope: near it the divergence is
(phi - c_j)^T H_j (phi - c_j) / 2 with H_j the Fisher information of the coefficients, which is the
Gauss-Newton matrix of the divergence. What minimises the weighted sum of these is known in closed
form for every preference: no optimisation, here or there.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dynmerge.calibration.examples import Examples
from dynmerge.calibration.student import Student
from dynmerge.merging.calibrated import GRANULARITIES, joint_directions


def information(
    student: Student, texts: Mapping[str, Examples], method: str, draws: int = 2, seed: int = 0
) -> list[Tensor]:
    """H (members, tasks, W, W) per group of the bank: blocks of one layer, float32.

    The mean over examples of the outer product of scores d log p(y) / d phi, y drawn from the
    adapter's own predictions `draws` times each. Scores of independent draws are uncorrelated, so
    that an example's predictions can be scored in one pass.
    """
    bank, generator = student.bank, torch.Generator().manual_seed(seed)
    granularity = GRANULARITIES[method]
    owners = [granularity.owners(group) for group in bank.groups]
    constants = [
        {"joint": joint_directions(group)} if method == "tara-b" else {} for group in bank.groups
    ]
    blocks = [
        torch.zeros(len(group.members), len(bank.tasks), len(own), len(own))
        for group, own in zip(bank.groups, owners, strict=True)
    ]
    for task, name in enumerate(bank.names):
        examples, rho = (
            texts[name],
            torch.nn.functional.one_hot(torch.tensor(task), len(bank.tasks)),
        )
        for row in range(len(examples)):
            phi = [
                (own == task).float().expand(len(group.members), -1).clone().requires_grad_()
                for group, own in zip(bank.groups, owners, strict=True)
            ]
            cores: list[Tensor] = [rho] * len(bank.modules)
            for group, coefficients, known in zip(bank.groups, phi, constants, strict=True):
                found = granularity.cores(group, coefficients, known, rho.float())
                for member, core in zip(group.members, found, strict=True):
                    cores[member] = core
            with student.under(cores):
                log_p = examples.logits([row]).log_softmax(-1)
            for draw in range(draws):
                drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
                score = log_p.gather(-1, drawn).sum()
                scores = torch.autograd.grad(score, phi, retain_graph=draw + 1 < draws)
                for block, g in zip(blocks, scores, strict=True):
                    block[:, task] += g[:, :, None] * g[:, None] / (len(examples) * draws)
    return blocks


def sensitivities(blocks: Tensor, owners: Tensor, floor: float = 1e-3) -> Tensor:
    """h (members, tasks, W) of the form `ratio` from H's diagonals: log of H_j,kk over H_i,kk.

    i is the owner of k. `floor` is the least share of a layer's mean that counts.
    """
    diagonals = blocks.diagonal(dim1=-2, dim2=-1)  # (members, tasks, W)
    least = floor * diagonals.mean((-2, -1), keepdim=True) + torch.finfo(torch.float32).tiny
    diagonals = diagonals + least
    own = diagonals.gather(1, owners.expand(len(blocks), 1, -1))
    return (diagonals / own).log()
