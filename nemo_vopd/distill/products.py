"""Products of bf16 matrices with a float32 result, which a GPU computes without rounding to bf16 in between."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_ROWS = 8192
"""Number of rows in which a product is computed where PyTorch cannot add it directly."""


@functools.cache
def _adds_to_float32() -> bool:
    """Whether this PyTorch adds a product of bf16 matrices to a float32 one; those before 2.10 refuse."""
    target, factor = (torch.zeros(8, 8, dtype=dtype, device="cuda") for dtype in (torch.float32, torch.bfloat16))
    try:
        torch.addmm(target, factor, factor, out_dtype=target.dtype, out=target)
    except RuntimeError:
        return False
    return True


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a [m, k] @ b [k, n] in `dtype`, which is theirs or float32, without gradient.

    On a CPU the product is rounded to the operands' dtype first.
    """
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def add_product_(target: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a [m, k] @ b [k, n] to `target` [m, n] in place; on a GPU no other [m, n] tensor is made."""
    if target.dtype == a.dtype:
        target.addmm_(a, b)
    elif a.is_cuda and _adds_to_float32():
        torch.addmm(target, a, b, out_dtype=target.dtype, out=target)
    elif a.is_cuda:
        for part, rows in zip(target.split(_ROWS), a.split(_ROWS), strict=True):
            part += torch.mm(rows, b, out_dtype=target.dtype)
    else:
        target += a @ b
