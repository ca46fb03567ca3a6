"""Objectives: how far a merged model is from what each skill wants, and one number out of them.

Pure functions of predictions. What is measured per skill: entropy (TARA, AdaMerging), divergence
from the skill's own adapter (distillation), cross-entropy (labels).
"""

import torch
from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """(n,): -sum_c p_c log p_c in nats, of predictions (n, classes)."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def divergence(teacher: Tensor, logits: Tensor) -> Tensor:
    """(n,): KL(teacher || student) in nats, both logits (n, classes)."""
    log_q = teacher.log_softmax(-1)
    return (log_q.exp() * (log_q - logits.log_softmax(-1))).sum(-1)


def cross_entropy(targets: Tensor, logits: Tensor) -> Tensor:
    """(n,): -log p of the right class, in nats; targets (n,), logits (n, classes)."""
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def smooth_tchebycheff(gaps: Tensor, rho: Tensor, mu: float) -> Tensor:
    """mu log sum_i exp(rho_i gap_i / mu), gaps f_i - z_i (skills,).

    Its gradient in f_i is rho_i softmax_i(rho gaps / mu): near the weighted sum for a large mu, the
    largest rho_i gap_i for a small one (Lin et al. 2024, arXiv:2402.19078; TARA's eq. 10, without
    the absolute value, as its code).
    """
    return mu * torch.logsumexp(rho * gaps / mu, dim=-1)
