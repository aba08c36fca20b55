"""Passes over the logits of a chunk of tokens, each row a token: normalisers, the divergence, gradients in place.

On a GPU each pass is one Triton kernel, which reads and writes the logits once (`kernels.py`). Elsewhere PyTorch
computes the same in blocks of rows, so that no second tensor of the size of the logits exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_vopd.distill.vocabulary import Vocabulary

_BLOCK_ELEMENTS = 2**21
"""Logits of one block of rows on a CPU: 8 MiB in float32, which stays in its cache."""


class Normaliser(NamedTuple):
    """What makes log-probabilities of logits: log p = (logits - maximum) - log_total, both [c, 1].

    The largest logit comes off first: a logsumexp of its own would round at the size of the logits.
    """

    maximum: Tensor
    log_total: Tensor

    def log_probs(self, logits: Tensor) -> Tensor:
        """Log-probabilities of `logits` [c, ...]."""
        return (logits - self.maximum) - self.log_total


def _kernels(logits: Tensor):
    """The Triton kernels if `logits` lie on a GPU, else None."""
    if not logits.is_cuda or logits.dtype != torch.float32:
        return None
    from nemo_vopd.distill import kernels  # Triton comes with PyTorch for CUDA only

    return kernels


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK_ELEMENTS // logits.size(-1))
    return (slice(start, start + rows) for start in range(0, logits.size(0), rows))


def normalise(logits: Tensor, vocabulary: Vocabulary) -> tuple[Normaliser, Tensor]:
    """The normaliser of [c, V / tp] logits over the whole vocabulary, and the entropy [c] in nats."""
    if kernels := _kernels(logits):
        maximum, sums = kernels.statistics(logits)
    else:
        maximum, sums = logits.amax(dim=-1), logits.new_empty(2, logits.size(0))
        for rows in _blocks(logits):
            below = logits[rows] - maximum[rows, None]
            weights = below.exp()
            sums[0, rows], sums[1, rows] = weights.sum(-1), below.mul_(weights).sum(-1)
    if vocabulary.group is not None:  # the sums refer to this rank's maximum: make them refer to that of all
        own = maximum.clone()
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=vocabulary.group)
        lower = own - maximum
        sums[1].add_(lower * sums[0])
        vocabulary.sum(sums.mul_(lower.exp()))
    log_total = sums[0].log()
    return Normaliser(maximum[:, None], log_total[:, None]), log_total - sums[1] / sums[0]


def softmax_times_(logits: Tensor, normaliser: Normaliser, factor: Tensor) -> Tensor:
    """Turn `logits` into factor [c] * softmax in place; a row of factor 0 becomes 0 whatever it holds."""
    if kernels := _kernels(logits):
        return kernels.softmax_times_(logits, *normaliser, factor)
    shift = normaliser.maximum + normaliser.log_total
    for rows in _blocks(logits):
        logits[rows].sub_(shift[rows]).exp_().mul_(factor[rows, None])
    return logits.masked_fill_((factor == 0)[:, None], 0.0)


def divergence_sums(
    student: Tensor, of_student: Normaliser, teacher: Tensor, of_teacher: Normaliser, alpha: float
) -> tuple[Tensor, Tensor]:
    """The generalised JSD of two policies' logits over this rank's classes, and the sum of its slopes: [c] each.

    With s = log p of the student, the slope dD/ds is (1 - alpha) p (s - m), where m is the logarithm of the mixture:
    how the mixture moves cancels. A term p, which normalisation cancels too, is left out.
    """
    if kernels := _kernels(student):
        return kernels.divergence_sums(student, *of_student, teacher, *of_teacher, alpha)
    divergence, slope_sum = (student.new_empty(student.size(0)) for _ in range(2))
    for rows in _blocks(student):
        slope, own = _slope(student, of_student, teacher, of_teacher, alpha, rows)
        slope_sum[rows] = slope.sum(-1)
        # for alpha = 0 the teacher's part is all there is, and the slope is no part of the sum
        divergence[rows] = own if alpha == 0 else slope_sum[rows] + own
    return divergence, slope_sum


def divergence_gradient_(
    student: Tensor,
    of_student: Normaliser,
    teacher: Tensor,
    of_teacher: Normaliser,
    alpha: float,
    slope_sum: Tensor,
    factor: Tensor,
) -> Tensor:
    """Turn the student's logits into factor * (slope - softmax * slope_sum) in place, the gradient of factor * D.

    `slope_sum` [c] is over all ranks; a row of factor 0 becomes 0 whatever it holds.
    """
    if kernels := _kernels(student):
        return kernels.divergence_gradient_(student, *of_student, teacher, *of_teacher, alpha, slope_sum, factor)
    for rows in _blocks(student):
        slope, _ = _slope(student, of_student, teacher, of_teacher, alpha, rows)
        probs = Normaliser(*(part[rows] for part in of_student)).log_probs(student[rows]).exp_()
        student[rows] = slope.addcmul_(probs, slope_sum[rows, None], value=-1).mul_(factor[rows, None])
    return student.masked_fill_((factor == 0)[:, None], 0.0)


def _slope(
    student: Tensor, of_student: Normaliser, teacher: Tensor, of_teacher: Normaliser, alpha: float, rows: slice
) -> tuple[Tensor, Tensor]:
    """The slopes of `rows` and the teacher's part of the divergence."""
    s, t = (
        Normaliser(*(part[rows] for part in normaliser)).log_probs(logits[rows])
        for logits, normaliser in ((student, of_student), (teacher, of_teacher))
    )
    if alpha == 0:
        q = t.exp()
        return -q, (q * (t - s)).sum(-1)
    if alpha == 1:
        return s.exp() * (s - t), s.new_zeros(s.size(0))
    p, q = s.exp(), t.exp()
    # a class that neither policy gives a probability counts as nothing, not as 0 times infinity
    mixture = p.lerp(q, alpha).clamp_min_(torch.finfo(s.dtype).tiny).log_()
    return p.mul_(s.sub_(mixture)).mul_(1 - alpha), q.mul_(t.sub_(mixture)).sum(-1).mul_(alpha)
