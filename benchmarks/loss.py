"""The fused divergence against its dense definition, and against Liger's fused loss."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.measure import Bench, Measured, Row, measure, measure_in_turn
from nemo_vopd.distill.divergence import generalized_jsd
from nemo_vopd.distill.fused import LossOptions, Policy, fused_linear_jsd
from nemo_vopd.mcore import cpu

Forms = Iterator[tuple[str, Callable[[], torch.Tensor]]]


class Losses:
    """Forward and backward of the divergence from hidden states, with two heads of one size.

    All forms add the gradient of the head to a buffer that exists already and is in nobody's memory: ours to float32,
    as in training (Megatron's main_grad), the others through autograd to one of the weights' dtype.
    """

    def __init__(self, vocab_size: int, hidden_size: int, alpha: float) -> None:
        """Random heads: bf16 on a GPU, float32 without one."""
        self.hidden_size, self.alpha, self.device = hidden_size, alpha, cpu.device()
        self.dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        self._generator = torch.Generator(self.device).manual_seed(0)
        self.weight, self.teacher_weight = (self._make(vocab_size, 1.0) for _ in range(2))
        self.weight.requires_grad_().grad = torch.zeros_like(self.weight)
        self.main_grad = torch.zeros(vocab_size, hidden_size, device=self.device)

    def _make(self, num: int, scale: float) -> torch.Tensor:
        numbers = torch.randn(num, self.hidden_size, generator=self._generator, device=self.device, dtype=self.dtype)
        return numbers.mul_(scale * self.hidden_size**-0.5)

    def forms(self, num: int, top_k: int | None) -> Forms:
        """Name and call of each form on `num` tokens; a call returns the mean of a token."""
        student, teacher = self._make(num, 40.0).requires_grad_(), self._make(num, 40.0)
        weight, teacher_weight, ones = self.weight, self.teacher_weight, torch.ones(num, device=self.device)
        options: Any = {"alpha": self.alpha, "top_k": top_k, "add_tail": True}

        def dense() -> torch.Tensor:
            student.grad = None
            with torch.no_grad():
                teacher_logits = (teacher @ teacher_weight.t()).float()
            # float32 logits, as in training: among bf16 ones are dozens of equals, which the top-k must put in order
            student_logits = (student @ weight.t()).float()
            value = (generalized_jsd(student_logits, teacher_logits, **options) * ones).sum()
            value.backward()
            return value.detach() / num

        def fused() -> torch.Tensor:
            student.grad = None
            policies = Policy(student, weight), Policy(teacher, teacher_weight)
            value, _ = fused_linear_jsd(*policies, ones, LossOptions(**options), weight_grad_into=self.main_grad)
            value.backward()
            return value.detach() / num

        def liger() -> torch.Tensor:
            if importlib.util.find_spec("liger_kernel") is None:
                raise RuntimeError("liger-kernel is not installed")
            from liger_kernel.transformers import LigerFusedLinearJSD  # type: ignore[import-not-found]

            student.grad = None
            value = LigerFusedLinearJSD(jsd_beta=self.alpha)(student, weight, teacher, teacher_weight, None)
            value.backward()
            return value.detach()

        yield "dense", dense
        yield "fused", fused
        if top_k is None:
            yield "liger", liger


def loss(
    num_tokens: list[int], vocab_size: int, hidden_size: int, top_k: int | None, alpha: float, repeats: int
) -> list[Row]:
    """Rows of the fused loss and of the dense definition for `top_k`."""
    losses, rows = Losses(vocab_size, hidden_size, alpha), []
    for num in num_tokens:
        names, functions = zip(*list(losses.forms(num, top_k))[:2], strict=True)
        dense: Row = {}
        for name, found in zip(names, measure_in_turn(list(functions), repeats, resident=True), strict=True):
            row: Row = {"loss": name, "tokens": num, "vocabulary": vocab_size, "hidden": hidden_size}
            rows.append(row | {"ms": found.seconds * 1e3, "extra_gib": found.extra_gib})
            dense = _with_ratios(rows[-1], dense)
    return rows


def _with_ratios(row: Row, dense: Row) -> Row:
    """`row` over the `dense` one, written into it; returns the dense row."""
    if "ms" in row and "ms" in dense:
        row["time_ratio"] = row["ms"] / dense["ms"]
        row["memory_ratio"] = row["extra_gib"] / max(dense["extra_gib"], 1e-9)
    return row if row["loss"] == "dense" else dense


def gpu_loss(
    bench: Bench, num_tokens: list[int], vocab_size: int, hidden_size: int, top_k: int | None, alpha: float
) -> None:
    """Rows of all forms for `top_k` and for the whole vocabulary, the only one that *liger*, Liger's fused loss, knows.

    `divergence` is the mean of a token, for comparison.
    """
    losses = Losses(vocab_size, hidden_size, alpha)

    def timed(function: Callable[[], torch.Tensor]) -> Row:
        found: Measured = measure(function, bench.repeats, warmup=2)
        return {"ms": found.seconds * 1e3, "extra_gib": found.extra_gib, "divergence": float(found.result)}

    for num in num_tokens:
        for k in dict.fromkeys((top_k, None)):
            dense: Row = {}
            for name, function in losses.forms(num, k):
                labels: Row = {"tokens": num, "top_k": "all" if k is None else k, "loss": name}
                (row,) = bench.record(labels, lambda f=function: timed(f))
                dense = _with_ratios(row, dense)
