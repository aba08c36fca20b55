"""`logit_passes.py` in Triton: a program for each row of float32 logits, which walks over the vocabulary once.

TRITON_INTERPRET=1 runs the kernels without a GPU (tests/distill/test_kernels.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_WARPS = 8


def _launch(kernel, logits: Tensor, *arguments, **constants) -> None:
    assert logits.is_contiguous() and logits.dtype == torch.float32
    block = min(_BLOCK, triton.next_power_of_2(logits.size(1)))
    kernel[(logits.size(0),)](logits, *arguments, logits.size(1), BLOCK=block, num_warps=_WARPS, **constants)


def statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit x of each row, and the sums of exp(z - x) and of exp(z - x) (z - x): [c], [2, c]."""
    maximum, sums = logits.new_empty(logits.size(0)), logits.new_empty(2, logits.size(0))
    _launch(_statistics, logits, maximum, sums[0], sums[1])
    return maximum, sums


@triton.jit
def _statistics(logits, maximum, total, weighted, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    # each lane keeps sums of its own, which refer to its own largest logit so far
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    sum_exp = tl.zeros([BLOCK], tl.float32)
    sum_weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + columns < width
        z = tl.load(logits + row * width + start + columns, mask=inside, other=-float("inf"))
        higher = tl.maximum(largest, z)
        below = tl.where(largest == higher, 0.0, largest - higher)
        scale = tl.where(largest == -float("inf"), 0.0, tl.exp(below))
        sum_weighted = tl.where(sum_exp == 0, 0.0, scale * (sum_weighted + below * sum_exp))
        sum_exp = scale * sum_exp
        x = tl.where(z == higher, 0.0, z - higher)
        e = tl.where(inside, tl.exp(x), 0.0)
        sum_exp += e
        sum_weighted += tl.where(inside, e * x, 0.0)
        largest = tl.where(inside, higher, largest)
    top = tl.max(largest, 0)
    below = largest - top
    scale = tl.where(sum_exp == 0, 0.0, tl.exp(below))
    sum_weighted = tl.where(sum_exp == 0, 0.0, scale * (sum_weighted + below * sum_exp))
    tl.store(maximum + row, top)
    tl.store(total + row, tl.sum(scale * sum_exp, 0))
    tl.store(weighted + row, tl.sum(sum_weighted, 0))


def softmax_times_(logits: Tensor, maximum: Tensor, log_total: Tensor, factor: Tensor) -> Tensor:
    """See `logit_passes.softmax_times_`."""
    _launch(_softmax_times, logits, maximum, log_total, factor)
    return logits


@triton.jit
def _softmax_times(logits, maximum, log_total, factor, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    shift, total, by = tl.load(maximum + row), tl.load(log_total + row), tl.load(factor + row)
    for start in range(0, width, BLOCK):
        inside = start + columns < width
        place = logits + row * width + start + columns
        z = tl.load(place, mask=inside, other=0.0)
        value = by * tl.exp((z - shift) - total)
        tl.store(place, tl.where(by == 0, 0.0, value), mask=inside)


def divergence_sums(
    student: Tensor, maximum: Tensor, log_total: Tensor,
    teacher: Tensor, teacher_maximum: Tensor, teacher_log_total: Tensor, alpha: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `logit_passes.divergence_sums`."""
    divergence, slope_sum = (student.new_empty(student.size(0)) for _ in range(2))
    arguments = teacher, maximum, log_total, teacher_maximum, teacher_log_total, divergence, slope_sum
    _launch(_divergence_sums, student, *arguments, ALPHA=alpha)
    return divergence, slope_sum


@triton.jit
def _terms(z, u, shift, total, teacher_shift, teacher_total, inside, ALPHA: tl.constexpr):
    """The student's probability of some classes, the slope of the divergence and the teacher's part of it."""
    s = (z - shift) - total
    t = (u - teacher_shift) - teacher_total
    p = tl.where(inside, tl.exp(s), 0.0)
    q = tl.where(inside, tl.exp(t), 0.0)
    if ALPHA == 0:
        slope = -q
        own = tl.where(inside, q * (t - s), 0.0)
    elif ALPHA == 1:
        slope = tl.where(inside, p * (s - t), 0.0)
        own = tl.zeros_like(s)
    else:
        mixture = tl.log(tl.maximum((1 - ALPHA) * p + ALPHA * q, 1.1754943508222875e-38))
        slope = tl.where(inside, (1 - ALPHA) * p * (s - mixture), 0.0)
        own = tl.where(inside, ALPHA * q * (t - mixture), 0.0)
    return p, slope, own


@triton.jit
def _divergence_sums(
    logits, teacher, maximum, log_total, teacher_maximum, teacher_log_total, divergence, slope_sum, width,
    ALPHA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    shift, total = tl.load(maximum + row), tl.load(log_total + row)
    teacher_shift, teacher_total = tl.load(teacher_maximum + row), tl.load(teacher_log_total + row)
    slopes = tl.zeros([BLOCK], tl.float32)
    owns = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + columns < width
        place = row * width + start + columns
        z = tl.load(logits + place, mask=inside, other=0.0)
        u = tl.load(teacher + place, mask=inside, other=0.0)
        _, slope, own = _terms(z, u, shift, total, teacher_shift, teacher_total, inside, ALPHA)
        slopes += slope
        owns += own
    sum_of_slopes = tl.sum(slopes, 0)
    result = tl.sum(owns, 0)
    if ALPHA != 0:
        result += sum_of_slopes
    tl.store(slope_sum + row, sum_of_slopes)
    tl.store(divergence + row, result)


def divergence_gradient_(
    student: Tensor, maximum: Tensor, log_total: Tensor,
    teacher: Tensor, teacher_maximum: Tensor, teacher_log_total: Tensor,
    alpha: float, slope_sum: Tensor, factor: Tensor,
) -> Tensor:  # fmt: skip
    """See `logit_passes.divergence_gradient_`."""
    arguments = teacher, maximum, log_total, teacher_maximum, teacher_log_total, slope_sum, factor
    _launch(_divergence_gradient, student, *arguments, ALPHA=alpha)
    return student


@triton.jit
def _divergence_gradient(
    logits, teacher, maximum, log_total, teacher_maximum, teacher_log_total, slope_sum, factor, width,
    ALPHA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    shift, total = tl.load(maximum + row), tl.load(log_total + row)
    teacher_shift, teacher_total = tl.load(teacher_maximum + row), tl.load(teacher_log_total + row)
    slopes, by = tl.load(slope_sum + row), tl.load(factor + row)
    for start in range(0, width, BLOCK):
        inside = start + columns < width
        place = row * width + start + columns
        z = tl.load(logits + place, mask=inside, other=0.0)
        u = tl.load(teacher + place, mask=inside, other=0.0)
        p, slope, _ = _terms(z, u, shift, total, teacher_shift, teacher_total, inside, ALPHA)  # type: ignore
        value = by * (slope - p * slopes)
        tl.store(logits + place, tl.where(by == 0, 0.0, value), mask=inside)
