"""Granularity: what the coefficients that a calibration learned multiply, method by method.

Pure and differentiable: the request path and the calibration that learns the coefficients share it.
Shapes are those of one FactorGroup: members alike in p, q and every task's rank, N tasks in all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dynmerge.bank.bank import FactorBank, FactorGroup
from dynmerge.merging.carried.maps import Tables, pairs


def by_skill(group: FactorGroup, coefficients: Tensor) -> Tensor:
    """sum_i lambda_i M_i (members, p, q), lambda (members, N): one number per skill and layer."""
    ranks = torch.tensor(group.ranks, device=coefficients.device)
    spread = coefficients.repeat_interleave(ranks, 1, output_size=sum(group.ranks))
    return by_direction(group, spread)


def by_direction(group: FactorGroup, coefficients: Tensor) -> Tensor:
    """sum_ij phi_ij b_ij a_ij^T (members, p, q), phi (members, K): TARA-A.

    Directions are the rank-one pieces that training left. arXiv:2603.26299, variant A.
    """
    return (group.left * coefficients[:, None]) @ group.right


def by_joint_direction(group: FactorGroup, coefficients: Tensor, joint: Tensor) -> Tensor:
    """Q sum_i diag(phi_i) Q^T M_i (members, p, q), phi (members, N * R): TARA-B.

    `joint` Q (members, p, R) are the left singular vectors of [M_1 .. M_N]. Variant B.
    """
    members, _, rank = joint.shape
    phi = coefficients.reshape(members, len(group.ranks), rank).mT  # (members, R, N)
    ranks = torch.tensor(group.ranks, device=coefficients.device)
    spread = phi.repeat_interleave(ranks, 2, output_size=sum(group.ranks))
    cores: Tensor = (joint @ (spread * (joint.mT @ group.left))) @ group.right
    return cores


def joint_directions(group: FactorGroup) -> Tensor:
    """Q (members, p, R): left singular vectors of [M_1 .. M_N], R = min(K, p), in float64.

    With right_i = R_i^T Q_i^T by QR they are those of [left_1 R_1^T .. left_N R_N^T], at most K
    wide. Where the tasks' updates span less than R directions, the last are arbitrary, and
    multiply nothing.
    """
    parts = []
    for task in range(len(group.ranks)):
        left, right = group.of(task)
        parts.append(left.double() @ torch.linalg.qr(right.double().mT).R.mT)
    stacked = torch.cat(parts, dim=-1)
    members, p, width = stacked.shape
    if width < p:  # a task of more ranks than the layer has inputs
        stacked = torch.cat([stacked, stacked.new_zeros(members, p, p - width)], dim=-1)
    Q, _, _ = torch.linalg.svd(stacked, full_matrices=False)
    joint: Tensor = Q[..., : min(sum(group.ranks), p)].to(group.left.dtype)
    return joint


def with_tables(cores: Tensor, tables: Tensor, rho: Tensor) -> Tensor:
    """`cores` (members, p, q) + sum_jl sqrt(rho_j rho_l) T_jl, tables (members, pairs, p, q).

    Free in every entry, and nothing where one skill is alone.
    """
    return cores + torch.einsum("f,mfpq->mpq", pairs(rho), tables)


def by_moments(group: FactorGroup, moments: Tensor, rho: Tensor, ridge: float) -> Tensor:
    """(sum_i rho_i M_i S_i)(sum_i rho_i S_i)^-1 (members, p, q), S_i with a ridge inside.

    `moments` S_i (members, N, q, q): second moments of V^T x on task i's text under adapter i. The
    ridge is a share of S_i's mean eigenvalue; it weighs M_i too, so that {i: 1} is M_i exactly. A
    skill that leaves the layer alone has M_i = 0, and its text wants no change there. In float64:
    texts reach few directions, and the others hang on the ridge.
    Jin et al. 2023, arXiv:2212.09849, in the shared bases.
    """
    S = moments.to(torch.float64, copy=True)
    size = S.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
    S.diagonal(dim1=-2, dim2=-1).add_(ridge * size[..., None])
    shares = rho.double()
    read = torch.cat(
        [group.of(task)[1].double() @ S[:, task] for task in range(len(group.ranks))], dim=1
    )
    wanted = (group.left.double() * group.per_direction(shares)) @ read
    pooled = (shares @ S.flatten(2)).view_as(S[:, 0])
    solved: Tensor = torch.linalg.solve(pooled, wanted, left=False)
    return solved.to(moments.dtype)


def skill_owners(group: FactorGroup) -> Tensor:
    """(N,): one coefficient per skill."""
    return torch.arange(len(group.ranks), device=group.left.device)


def direction_owners(group: FactorGroup) -> Tensor:
    """(K,): one per stacked direction."""
    ranks = torch.tensor(group.ranks, device=group.left.device)
    return skill_owners(group).repeat_interleave(ranks)


def joint_owners(group: FactorGroup) -> Tensor:
    """(N * R,): one per skill and joint direction."""
    return skill_owners(group).repeat_interleave(min(sum(group.ranks), group.left.shape[1]))


def core_tables(group: FactorGroup) -> dict[str, tuple[int, ...]]:
    """`tables`: a core for each pair of skills."""
    tasks, p, q = len(group.ranks), group.left.shape[1], group.right.shape[2]
    return {"tables": (tasks * (tasks - 1) // 2, p, q)}


@dataclass(frozen=True, slots=True)
class Granularity:
    """What one coefficient multiplies: `owners` says whose each is, `cores` multiplies.

    `cores` takes a group, its coefficients (members, W), its tables and rho (N,). Among the tables
    are those of the map, `tables` (label -> shape in one layer), which are learned with them from
    0, and `constants`, which the factors alone decide. `spread` (bank, all modules' coefficients)
    -> one number for every stacked direction; None where a merge is no such diagonal.
    """

    owners: Callable[[FactorGroup], Tensor]
    cores: Callable[[FactorGroup, Tensor, Tables, Tensor], Tensor]
    tables: Callable[[FactorGroup], dict[str, tuple[int, ...]]] = lambda group: {}
    constants: Callable[[FactorGroup], dict[str, Tensor]] = lambda group: {}
    spread: Callable[[FactorBank, Tensor], Tensor] | None = None


GRANULARITIES: Mapping[str, Granularity] = {
    "adamerging": Granularity(
        skill_owners,
        lambda group, phi, own, rho: by_skill(group, phi),
        spread=lambda bank, phi: phi.view(len(bank.modules), -1)[bank.directions],
    ),
    "tara-a": Granularity(
        direction_owners,
        lambda group, phi, own, rho: by_direction(group, phi),
        spread=lambda bank, phi: phi,
    ),
    "tara-b": Granularity(
        joint_owners,
        lambda group, phi, own, rho: by_joint_direction(group, phi, own["joint"]),
        constants=lambda group: {"joint": joint_directions(group)},
    ),
    "core": Granularity(
        skill_owners,
        lambda group, phi, own, rho: with_tables(by_skill(group, phi), own["tables"], rho),
        tables=core_tables,
    ),
}


def constants_of(bank: FactorBank, method: str) -> tuple[dict[str, Tensor], ...]:
    """What the method needs of each group besides what is learned; made once for a bank."""
    return bank.keep(
        ("constants", method),
        lambda: tuple(GRANULARITIES[method].constants(group) for group in bank.groups),
    )
