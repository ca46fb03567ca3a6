"""OSRM: where a PEFT training starts, so that its adapter disturbs other tasks' texts little.

With W h + B A h in a merge, a task's A and B disturb a text h of another task unless A h is small;
so A starts where the other tasks' layer inputs are smallest (Zhang & Zhou 2025, arXiv:2505.22934).
B starts at zero as ever, and A trains on unless frozen. Knows no trainer: it writes into a PEFT
model that was just made. docs/osrm.md has the figures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynmerge.calibration.moments import LayerMoments, Moments
from dynmerge.errors import AdapterError, ConfigError
from dynmerge.merging.sparsify import generator


def initialise(
    others: Sequence[Moments], rank: int | Mapping[str, int], form: str = "cov", seed: int = 0
) -> dict[str, Tensor]:
    """Layer name -> A (rank, d_in) float64, orthonormal rows, from the moments of the other tasks.

    A mapping of ranks (see `ranks`) says which layers; an int takes all. `form` is a row of FORMS;
    `seed` is for the form that draws. Every other task counts the same, however many texts it has.
    Raises ConfigError where there are no others, moments lack a layer or hold NaN, a form is
    unknown, or a rank does not fit.
    """
    if form not in FORMS:
        raise ConfigError(f"no form named {form!r} (known: {', '.join(FORMS)})")
    if not others:
        raise ConfigError("OSRM needs the moments of at least one other task")
    if isinstance(rank, int):
        rank = dict.fromkeys(others[0].layers, rank)
    made = {}
    for name, size in rank.items():
        layers = [_layer(task, name) for task in others]
        if len({layer.d_in for layer in layers}) > 1:
            raise ConfigError(f"{name} reads {[layer.d_in for layer in layers]} numbers, by task")
        room = FORMS[form].room(layers)
        if not 1 <= size <= room:
            raise ConfigError(
                f"{name}: rank {size} is not within 1 to {room}, form {form!r}'s room"
            )
        made[name] = FORMS[form].make(layers, size, generator(seed, "osrm", name))
    return made


def smallest_eigenvectors(
    layers: Sequence[LayerMoments], rank: int, rng: torch.Generator
) -> Tensor:
    """The minimiser of trace(A S A^T) with A A^T = I: S's eigenvectors of the smallest eigenvalues.

    S is the sum of the other tasks' second moments; the least trace is the sum of those
    eigenvalues. Where S has a null space of more than `rank` dimensions, the eigensolver chooses
    within it.
    """
    _, vectors = torch.linalg.eigh(second_moment(layers))  # eigenvalues ascend
    smallest: Tensor = vectors[:, :rank].mT.contiguous()
    return smallest


def last_right_singular(layers: Sequence[LayerMoments], rank: int, rng: torch.Generator) -> Tensor:
    """The released code's form: the last right singular vectors of the stacked means X (k, d_in).

    X says nothing about d_in - k of these vectors. LAPACK completes the basis with Householder
    reflections, and so the last rows come out near the last coordinate axes whatever X is:
    different tasks get nearly the same A.
    """
    _, _, Vh = torch.linalg.svd(_means(layers), full_matrices=True)
    last: Tensor = Vh[-rank:].contiguous()
    return last


def random_null(layers: Sequence[LayerMoments], rank: int, rng: torch.Generator) -> Tensor:
    """Random orthonormal rows with A x = 0 for the mean x of each other task.

    The constraint of `last_right_singular` without what its SVD happens to choose.
    """
    span = _span(layers)
    draw = torch.randn(span.shape[1], rank, generator=rng, dtype=span.dtype).to(span.device)
    for _ in range(2):  # the second time removes what rounding left
        draw = draw - span.mT @ (span @ draw)
    rows: Tensor = torch.linalg.qr(draw).Q.mT.contiguous()
    return rows


@dataclass(frozen=True, slots=True)
class Form:
    """One way to choose A, and how many rows it can give."""

    make: Callable[[Sequence[LayerMoments], int, torch.Generator], Tensor]
    room: Callable[[Sequence[LayerMoments]], int]


FORMS: Mapping[str, Form] = {
    "cov": Form(smallest_eigenvectors, room=lambda layers: layers[0].d_in),
    "mean": Form(last_right_singular, room=lambda layers: layers[0].d_in),
    "null": Form(random_null, room=lambda layers: layers[0].d_in - len(_span(layers))),
}


def second_moment(layers: Sequence[LayerMoments]) -> Tensor:
    """S (d_in, d_in): the sum over tasks of H^T H / n, each over its own n tokens."""
    return torch.stack([layer.second for layer in layers]).sum(0)


def cross_activation(A: Tensor, layer: LayerMoments) -> float:
    """The mean of ||A h||² over a task's tokens: trace(A S A^T)."""
    A = A.to(layer.gram)
    return float(((A @ layer.second) * A).sum())


def overlap(one: Tensor, other: Tensor) -> float:
    """How far two A's (r, d_in) span the same rows: 1 is the same, r / d_in is chance.

    ||P Q^T||² over the smaller rank, P and Q orthonormal bases of the rows.
    """
    bases = [torch.linalg.qr(A.double().mT).Q for A in (one, other)]
    return float((bases[0].mT @ bases[1]).square().sum() / min(len(one), len(other)))


def ranks(model: nn.Module, adapter_name: str = "default") -> dict[str, int]:
    """Layer name, as in the base model -> rank of a PEFT model's adapter, `rank_pattern` included.

    Raises AdapterError where there is no such adapter, or it changes an embedding.
    """
    layers = _adapted(model, adapter_name)
    return {name: int(A.weight.shape[0]) for name, (A, _) in layers.items()}


def apply(model: nn.Module, A: Mapping[str, Tensor], adapter_name: str = "default") -> None:
    """Write A into a PEFT model's `lora_A`; `lora_B` is zero and stays so: the start is the base.

    Call it between `get_peft_model` and the training. The rows have norm 1 where those of PEFT's
    own start are near 1/sqrt(3); nothing rescales them, as in the released code. Either all
    is written or nothing: raises AdapterError where the adapter and A differ in layers or shapes,
    A holds NaN, or `lora_B` is not zero.
    """
    layers = _adapted(model, adapter_name)
    if layers.keys() != A.keys():
        name = min(layers.keys() ^ A.keys())
        lacking = "A" if name in layers else f"adapter {adapter_name!r}"
        raise AdapterError(f"{lacking} has no {name} (the adapter has: {', '.join(layers)})")
    for name, (lora_A, lora_B) in layers.items():
        shape = tuple(lora_A.weight.shape)
        if tuple(A[name].shape) != shape:
            raise AdapterError(f"{name}: lora_A is {shape}, but A is {tuple(A[name].shape)}")
        if not A[name].isfinite().all():
            raise AdapterError(f"{name}: A holds NaN or infinity")
        if lora_B.weight.any():
            raise AdapterError(f"{name}: lora_B is not zero; OSRM comes before any training")
    with torch.no_grad():
        for name, (lora_A, _) in layers.items():
            lora_A.weight.copy_(A[name])


def freeze(model: nn.Module, adapter_name: str = "default") -> None:
    """Let B alone train from here on. PEFT's `set_adapter` lets A train again."""
    for lora_A, _ in _adapted(model, adapter_name).values():
        lora_A.requires_grad_(False)


def _layer(task: Moments, name: str) -> LayerMoments:
    if name not in task.layers:
        raise ConfigError(f"no moments of a layer {name!r} (known: {', '.join(task.layers)})")
    if not task.layers[name].is_finite:
        raise ConfigError(f"{name}: a task's moments hold NaN or infinity")
    return task.layers[name]


def _means(layers: Sequence[LayerMoments]) -> Tensor:
    return torch.stack([layer.mean for layer in layers])


def _span(layers: Sequence[LayerMoments]) -> Tensor:
    """(rank X, d_in): an orthonormal basis of the means' span."""
    X = _means(layers)
    _, sigma, Vh = torch.linalg.svd(X, full_matrices=False)
    basis: Tensor = Vh[sigma > sigma[0] * max(X.shape) * torch.finfo(X.dtype).eps]
    return basis


def _adapted(model: nn.Module, adapter_name: str) -> dict[str, tuple[Any, Any]]:
    """Layer name -> the linear modules lora_A and lora_B of one adapter."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    found, known = {}, set()
    for name, layer in base.named_modules():
        for lora_A in (getattr(layer, "lora_A", {}), getattr(layer, "lora_embedding_A", {})):
            known |= set(lora_A)
        if adapter_name in getattr(layer, "lora_embedding_A", {}):
            raise AdapterError(f"{name} is an embedding: OSRM is for linear layers")
        if adapter_name in getattr(layer, "lora_A", {}):
            found[name] = (layer.lora_A[adapter_name], layer.lora_B[adapter_name])
    if not found:
        raise AdapterError(f"no adapter named {adapter_name!r} (known: {', '.join(sorted(known))})")
    return found
