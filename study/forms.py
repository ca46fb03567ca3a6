"""Maps from preference to coefficients that the study compares with the ones dynmerge serves.

Affine and product are proposals for TARA's phi(rho), neither exact where one skill is alone; the
network is what PWE-MoE (arXiv:2406.09770) does, made exact there. Interpolation of what was found
for each skill alone needs no form: under distillation that is the skill itself, and the merge
`linear`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dynmerge.merging.carried.maps import Form, Tables

HIDDEN = 16


def affine(tables: Tables, owners: Tensor, rho: Tensor) -> Tensor:
    """phi0 + Phi (rho - 1/N), (members, W)."""
    return tables["offset"] + torch.einsum("n,mnw->mw", rho - 1 / len(rho), tables["slope"])


def product(tables: Tables, owners: Tensor, rho: Tensor) -> Tensor:
    """rho_i N c_k + d_k, (members, W)."""
    return rho[owners] * len(rho) * tables["factor"] + tables["offset"]


def network(tables: Tables, owners: Tensor, rho: Tensor) -> Tensor:
    """rho_i / ||rho||_4 + (1 - ||rho||_2^2) MLP(rho)_k, an MLP per layer, (members, W)."""
    base = rho / torch.linalg.vector_norm(rho, 4)
    hidden = torch.relu(torch.einsum("n,mnh->mh", rho, tables["inner"]) + tables["bias"])
    outer = torch.einsum("mh,mhw->mw", hidden, tables["outer"])
    found: Tensor = (base[owners] + (1 - rho.square().sum()) * outer) * (rho[owners] > 0)
    return found


def _affine(modules: int, tasks: int, width: int) -> dict[str, Tensor]:
    return {
        "offset": torch.full((modules, width), 0.64),
        "slope": torch.zeros(modules, tasks, width),
    }


def _product(modules: int, tasks: int, width: int) -> dict[str, Tensor]:
    start = 0.64 / 2
    return {
        "factor": torch.full((modules, width), start),
        "offset": torch.full((modules, width), start),
    }


def _network(modules: int, tasks: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "inner": torch.randn(modules, tasks, HIDDEN, generator=generator),
        "bias": torch.zeros(modules, HIDDEN),
        "outer": torch.zeros(modules, HIDDEN, width),
    }


COMPARED: Mapping[str, Form] = {
    "affine": Form(affine, _affine),
    "product": Form(product, _product),
    "network": Form(network, _network),
}
