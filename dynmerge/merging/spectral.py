"""Methods on singular values: TSV-M, Iso-C, Iso-CTS. All in the shared bases, batched over modules.

U and V are orthonormal, so a core's singular values are the update's, and its singular vectors are
U and V times the core's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dynmerge.adapters.lowrank import LowRank
from dynmerge.bank.bank import FactorGroup
from dynmerge.merging.outcome import Cores, Thin, Triplets
from dynmerge.merging.parameters import Values, number
from dynmerge.merging.support import Support, normed


def tsv_m(support: Support, weights: Tensor, values: Values) -> Cores:
    """P⊥ diag(λ_i Σ_i) Q⊥^T: each skill's singular directions, all made orthogonal to each other.

    k is the skill's own rank: more would be null directions that bend the polar factor. Gargiulo et
    al. 2025, arXiv:2412.00081.
    """
    stacked = support.keep("tsv-m", lambda: [_orthogonal(group) for group in support.groups])
    lambdas = normed(weights, number(values, "p"))
    cores = []
    for P, S, Q, skills in stacked:
        cores.append((P * (S * lambdas[skills])[:, None]) @ Q.mT)
    return Cores(cores)


def iso_c(support: Support, weights: Tensor, values: Values) -> Cores:
    """All singular values of sum_i λ_i X_i that are not rounding become their mean.

    Cut to the real directions; Marczak et al. 2025, arXiv:2502.04959.
    """
    lambdas = normed(weights, number(values, "p"))
    triplets = [svd(group.weighted(lambdas)) for group in support.groups]
    return _composed([_flat(_only(found, real(found[1]))) for found in triplets])


def iso_c_dense(support: Support, weights: Tensor, values: Values) -> Thin:
    """Iso-C over all min(d_out, d_in) directions, as its code runs on a full matrix.

    The null directions are completed by Householder QR of the real ones: they are arbitrary.
    """
    lambdas = normed(weights, number(values, "p"))
    updates: dict[int, LowRank] = {}
    for group in support.groups:
        if not group.present:
            continue
        P, S, Q = svd(group.weighted(lambdas))
        for index, member in enumerate(group.members):
            support.check_wanted()
            module = support.bank.modules[member]
            kept = real(S[index])
            width = min(len(module.U), len(module.V))
            left = _completed(module.U.to(P) @ P[index][:, kept], width)
            right = _completed(module.V.to(Q) @ Q[index][:, kept], width)
            updates[member] = LowRank(A=right.mT, B=left * (S[index].sum() / width))
    return Thin(updates)


def iso_cts(support: Support, weights: Tensor, values: Values) -> Cores:
    """The common directions of the sum, then each skill's own outside them, all equally strong.

    Marczak et al. 2025, arXiv:2502.04959.
    """
    lambdas, common = normed(weights, number(values, "p")), number(values, "common")
    return _composed([_common_and_own(group, lambdas, common) for group in support.groups])


def svd(matrices: Tensor) -> Triplets:
    """P, S, Q with matrices = P diag(S) Q^T; P and Q hold singular vectors as columns."""
    P, S, Qh = torch.linalg.svd(matrices, full_matrices=False)
    return P, S, Qh.mT


def real(S: Tensor, top: Tensor | None = None) -> Tensor:
    """Which singular values (..., k) are more than float32's rounding of the largest, or of `top`.

    Factors are float32: what float32 cannot tell from zero is no direction of an update.
    """
    if not S.shape[-1]:
        return S > 0
    top = S.amax(-1, keepdim=True) if top is None else top
    rounding = top * (S.shape[-1] * torch.finfo(torch.float32).eps)
    return rounding < S


def polar(stacked: Tensor) -> Tensor:
    """The polar factor of (members, d, k): the nearest orthonormal columns.

    Columns of zeros stay zero, and dependent columns give a partial isometry.
    """
    # By the Gram matrix, whose eigenvalues are squares: float64 keeps what float32 can tell apart.
    squares, Q = torch.linalg.eigh(stacked.mT.double() @ stacked.double())
    S = squares.clamp(min=0).sqrt()
    inverse = torch.where(real(S), 1 / S, 0)
    factor: Tensor = stacked.double() @ ((Q * inverse[:, None]) @ Q.mT)
    return factor.to(stacked.dtype)


def singular_directions(left: Tensor, right: Tensor) -> Triplets:
    """The thin SVD of left (members, p, r) @ right (members, r, q), on r x r matrices."""
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right.mT)
    P, S, Q = svd(R_left @ R_right.mT)
    return Q_left @ P, S, Q_right @ Q


def _orthogonal(group: FactorGroup) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every skill's triplets, stacked and made orthogonal, and the skill (k,) of each.

    In float64, for nearly parallel skills.
    """
    parts, skills = [], []
    for skill in range(len(group.ranks)):
        left, right = group.of(skill)
        part = singular_directions(left.double(), right.double())
        parts.append(_only(part, real(part[1])))
        skills += [skill] * part[1].shape[1]
    P, S, Q = _stacked(parts)
    owners = torch.tensor(skills, dtype=torch.int64, device=S.device)
    dtype = group.left.dtype
    return polar(P).to(dtype), S.to(dtype), polar(Q).to(dtype), owners


def _only(triplets: Triplets, kept: Tensor) -> Triplets:
    """The triplets with all others than `kept` (members, k) made zero."""
    P, S, Q = triplets
    return P * kept[:, None], S * kept, Q * kept[:, None]


def _stacked(parts: Sequence[Triplets]) -> Triplets:
    P, S, Q = zip(*parts, strict=True)
    return torch.cat(P, dim=-1), torch.cat(S, dim=-1), torch.cat(Q, dim=-1)


def _flat(triplets: Triplets) -> Triplets:
    """The triplets with every S that is not zero made their mean."""
    P, S, Q = triplets
    kept = S > 0
    mean = S.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1)
    return P, kept * mean, Q


def _composed(directions: Sequence[Triplets]) -> Cores:
    return Cores([(P * S[:, None]) @ Q.mT for P, S, Q in directions], directions)


def _common_and_own(group: FactorGroup, lambdas: Tensor, common: float) -> Triplets:
    P, S, Q = svd(group.weighted(lambdas))
    width = min(*group.left.shape[1:], *group.right.shape[1:]) if group.present else 0
    first = round(common * 1000) * width // 1000
    shared = P[..., :first], S[:, :first], Q[..., :first]
    parts = [_only(shared, real(shared[1]))]
    most = (width - first) // max(len(group.present), 1)
    for skill in group.present:
        left, right = group.of(skill)
        left = left * lambdas[skill]
        top = singular_directions(left, right)[1].amax(1, keepdim=True)
        P, S, Q = singular_directions(left - shared[0] @ (shared[0].mT @ left), right)
        own = P[..., :most], S[:, :most], Q[..., :most]
        parts.append(_only(own, real(own[1], top)))
    P, S, Q = _stacked(parts)
    return _flat((polar(P), S, polar(Q)))


def _completed(columns: Tensor, width: int) -> Tensor:
    """Orthonormal columns (d, k) and as many more as make `width`."""
    Q, _ = torch.linalg.qr(columns, mode="complete")
    # QR may turn a column around; the given ones are kept as they are.
    return torch.cat([columns, Q[:, columns.shape[1] : width]], dim=1)
