"""Engine against trainer: how far their log-probs lie apart, and truncated importance weights that correct for it.

docs/algorithm.md section 3, step 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

MISMATCH_BOUND = 0.1
"""Nats. Rounding of bfloat16 moves most tokens by less; `mismatch_share` counts those beyond."""


def mismatch(log_probs: Tensor, rollout_log_probs: Tensor) -> Tensor:
    """[3] float32: sum of |log p_trainer - log p_engine|, number above MISMATCH_BOUND, largest, over [T] tokens."""
    if not log_probs.numel():
        return torch.zeros(3, device=log_probs.device)
    difference = (log_probs.float() - rollout_log_probs.float()).abs()
    return torch.stack([difference.sum(), (difference > MISMATCH_BOUND).float().sum(), difference.max()])


def importance_weights(log_probs: Tensor, rollout_log_probs: Tensor, *, max_weight: float | None) -> Tensor:
    """w = min(p_student / p_rollout, max_weight) of each sampled token, detached.

    Args:
        log_probs: [T], the trainer's log p of the sampled tokens.
        rollout_log_probs: [T], the engine's log p of the same tokens.
        max_weight: upper bound; None gives ones (the published run).

    Returns:
        [T] in the dtype of `log_probs`.
    """
    if max_weight is None:
        return torch.ones_like(log_probs)
    log_ratio = (log_probs - rollout_log_probs).detach().clamp(-20.0, 20.0)
    return log_ratio.exp().clamp(max=max_weight)
