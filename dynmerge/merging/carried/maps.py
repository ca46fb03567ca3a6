"""Maps: from a preference to the coefficients that a calibration learned, one batched expression.

A coefficient belongs to one skill: it multiplies that skill's update in one layer, or one direction
of it. In every form the coefficients of a skill that is absent are 0, and those of the only skill
are 1: {a: 1} is adapter a, whatever was learned.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Of `ratio`, before training: exp(h) as tuned merges were found to have it, and as `linear` has it.
MINDED, LINEAR = 0.11, 1.0

# Learned tensors by label, stacked over the layers they are for: (members, ...).
Tables = Mapping[str, Tensor]


def ratio(tables: Tables, owners: Tensor, rho: Tensor) -> Tensor:
    """phi_k = rho_i (1 + sum_j rho_j u_jk) / (rho_i + sum_j rho_j exp(h_jk)), i the owner of k and
    j the others; (members, W).

    Tables: `ratio` h and `gain` u, both (members, N, W). It minimises
    rho_i (phi - 1)^2 + sum_j rho_j (exp(h_jk) phi^2 - 2 rho_i u_jk phi): exp(h_jk) says how much
    skill j minds direction k beside how much its owner needs it, u_jk how much more of it the two
    want together. Where others do not mind, little of a preference buys nearly all of a direction.
    """
    log_rho = rho.log()[:, None]  # -inf where absent
    own = torch.nn.functional.one_hot(owners, len(rho)).mT.bool()  # (N, W)
    minded = torch.where(own, log_rho, tables["ratio"] + log_rho)
    shares = (log_rho[owners, 0] - torch.logsumexp(minded, dim=-2)).exp()
    gained = torch.where(own, 0, rho[:, None] * tables["gain"]).sum(-2)
    found: Tensor = shares * (1 + gained)
    return found


def bubbles(tables: Tables, owners: Tensor, rho: Tensor) -> Tensor:
    """phi_k = base_i + sum_jl sqrt(rho_j rho_l) Q_jlk over pairs j < l, i the owner; (members, W).

    base = sqrt(rho) / ||sqrt(rho)||_4. Tables: `bubbles` Q (members, pairs, W).
    """
    root = rho.sqrt()
    base = root / torch.linalg.vector_norm(root, 4)
    lifted = torch.einsum("f,mfw->mw", pairs(rho), tables["bubbles"])
    phi: Tensor = (base[owners] + lifted) * (rho[owners] > 0)
    return phi


def gauss_newton(tables: Tables, owners: Tensor, rho: Tensor) -> Tensor:
    """phi = argmin sum_j rho_j (phi - c_j)^T H_j (phi - c_j) in each layer, over the skills that
    are present; c_j is adapter j: 1 where j is the owner, else 0. (members, W).

    Tables: `information` H (members, N, W, W), positive definite. With c = sum_j rho_j c_j it is
    c + (sum_j rho_j H_j)^-1 sum_j rho_j H_j (c_j - c), in float64: c to the last bit where one
    skill is alone.
    """
    H, present = tables["information"], rho[owners] > 0
    adapters = torch.nn.functional.one_hot(owners, len(rho)).mT.to(rho.dtype)  # c_j, (N, W)
    mean = rho @ adapters
    pooled = torch.einsum("j,mjvw->mvw", rho, H).double()
    pulls = torch.einsum("mjvw,jw->mjv", H, adapters - mean)
    wanted = torch.einsum("j,mjv->mv", rho, pulls).double()
    among = torch.where(present[:, None] & present, pooled, 0)
    among = among + torch.diag_embed((~present).double())
    # Without the check for singular layers, which nobody could answer to at request time.
    moved: Tensor = torch.linalg.solve_ex(among, wanted * present)[0]
    return mean + moved.to(rho.dtype)


def fixed(tables: Tables, owners: Tensor, rho: Tensor) -> Tensor:
    """phi as it was found for one preference, (members, W); no other may ask. Table: `fixed`."""
    shares = rho[owners]
    found: Tensor = torch.where(shares < 1, tables["fixed"], 1.0) * (shares > 0)
    return found


def pairs(rho: Tensor) -> Tensor:
    """(N (N - 1) / 2,): sqrt(rho_j rho_l) for j < l; all 0 where one skill is alone."""
    first, second = torch.triu_indices(len(rho), len(rho), offset=1, device=rho.device)
    return (rho[first] * rho[second]).sqrt()


@dataclass(frozen=True, slots=True)
class Form:
    """How coefficients depend on the preference. `start` are its tables before any training, and
    `starts` what else it takes than modules, N and W: constants to begin with, the best wins.

    `coupled` says that one coefficient depends on what was learned for others of its layer;
    otherwise tables of several layers may stand side by side as those of one.
    """

    coefficients: Callable[[Tables, Tensor, Tensor], Tensor]
    # (modules, N, W, a constant of `starts` if any) -> tables that nearly give Task Arithmetic
    start: Callable[..., dict[str, Tensor]]
    starts: tuple[float, ...] = ()
    coupled: bool = False


def _ratio_start(modules: int, tasks: int, width: int, minded: float = MINDED) -> dict[str, Tensor]:
    # At the uniform preference 1 / (1 + (N - 1) s): 0.65 for six skills, near `linear;p=4` and
    # tuned Task Arithmetic there (docs/merge-methods.md).
    shape = (modules, tasks, width)
    return {"ratio": torch.full(shape, minded).log(), "gain": torch.zeros(shape)}


def _bubbles_start(modules: int, tasks: int, width: int) -> dict[str, Tensor]:
    return {"bubbles": torch.zeros(modules, tasks * (tasks - 1) // 2, width)}


def _fixed_start(modules: int, tasks: int, width: int) -> dict[str, Tensor]:
    return {"fixed": torch.full((modules, width), 0.4)}  # TARA's and AdaMerging's on LoRA


def _gauss_newton_start(modules: int, tasks: int, width: int) -> dict[str, Tensor]:
    return {"information": torch.eye(width).repeat(modules, tasks, 1, 1)}  # gives phi = rho


FORMS: Mapping[str, Form] = {
    "ratio": Form(ratio, _ratio_start, starts=(MINDED, LINEAR)),
    "bubbles": Form(bubbles, _bubbles_start),
    "fixed": Form(fixed, _fixed_start),
    "gauss-newton": Form(gauss_newton, _gauss_newton_start, coupled=True),
}
