"""The token-level divergence between student and teacher, written for clarity (docs/algorithm.md section 3).

This is the definition that `fused.fused_linear_jsd` must equal without ever holding [T, V].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TAIL_CLAMP = -1e-7
"""Upper bound of the support's log-mass, so that the tail keeps a finite logarithm."""


def generalized_jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float,
    top_k: int | None,
    add_tail: bool,
) -> Tensor:
    """Generalised Jensen-Shannon divergence of each token over the student's top-k support, in nats.

    Args:
        student_logits: [T, V], divided by the rollout temperature; row t predicts response token t.
        teacher_logits: [T, V], likewise; no gradient flows into it.
        alpha: weight of the teacher, in [0, 1]: 0 is KL(teacher || student), 1 is KL(student || teacher).
        top_k: size of the support (the student's largest logits); None takes the full vocabulary.
        add_tail: append the remaining probability mass as one class; False renormalises over the support.

    Returns:
        [T], differentiable in `student_logits`; float64 stays float64, everything else is computed in float32.

    Raises:
        ValueError: when `top_k` exceeds V or `alpha` leaves [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: must lie in [0, 1]")
    if top_k is not None and not 1 <= top_k <= student_logits.size(-1):
        raise ValueError(f"top_k={top_k}: must lie between 1 and the vocabulary size, {student_logits.size(-1)}")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student = torch.log_softmax(student_logits.to(dtype), dim=-1)
    teacher = torch.log_softmax(teacher_logits.detach().to(dtype), dim=-1)
    if top_k is not None:
        # the choice of the support is a constant: gradient flows through the values only
        support = top_k_support(student_logits.detach(), top_k)[1]
        student, teacher = close_support(student.gather(-1, support), add_tail), teacher.gather(-1, support)
        teacher = close_support(teacher, add_tail)
    return jsd_of_log_probs(student, teacher, alpha)


def top_k_support(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices [T, k] of the largest logits [T, V]; of equal ones those with the lowest indices.

    torch.topk leaves the choice among equal values open, which would make the loss depend on how the vocabulary is
    split. Rows in which the k-th value occurs beyond the k are rare and are sorted again.
    """
    values, indices = logits.topk(k, dim=-1)
    crowded = ((logits >= values[:, -1:]).sum(-1) > k).nonzero().squeeze(-1)
    if crowded.numel():
        ordered = logits[crowded].sort(dim=-1, descending=True, stable=True)
        values[crowded], indices[crowded] = ordered.values[:, :k], ordered.indices[:, :k]
    return values, indices


def close_support(log_probs: Tensor, add_tail: bool) -> Tensor:
    """Make [T, K] log-probs a distribution: append the tail's log-mass ([T, K + 1]) or renormalise ([T, K])."""
    log_mass = torch.logsumexp(log_probs, dim=-1, keepdim=True)
    if not add_tail:
        return log_probs - log_mass
    tail = torch.log(-torch.expm1(log_mass.clamp(max=TAIL_CLAMP)))
    return torch.cat([log_probs, tail], dim=-1)


def jsd_of_log_probs(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """Generalised JSD of two log-distributions [T, C] over the same classes; returns [T]."""
    if alpha == 0:
        return _kl(teacher, student)
    if alpha == 1:
        return _kl(student, teacher)
    mixture = torch.logaddexp(student + math.log(1 - alpha), teacher + math.log(alpha))
    return (1 - alpha) * _kl(student, mixture) + alpha * _kl(teacher, mixture)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension; classes of probability 0 in p contribute 0."""
    mass = p.exp()
    # masked before the product: -inf - (-inf) would pass on a NaN gradient even where it is not selected
    return (mass * torch.where(mass > 0, p - q, torch.zeros_like(mass))).sum(-1)
