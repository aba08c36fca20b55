"""What one GPU does: ceilings of products and copies, the loss, language layers, sampling, a whole training step.

Written for a machine that is lent for minutes: whatever fails is a row with its error and the others go on, the files
are written anew after every row, and nothing is begun once the time is over.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import gpu_models
from benchmarks.gpu_rows import GIB, Bench, machine, measure
from benchmarks.measure import Row
from nemo_vopd.config import Config
from nemo_vopd.distill.divergence import generalized_jsd
from nemo_vopd.distill.fused import LossOptions, Policy, fused_linear_jsd
from nemo_vopd.mcore import cpu


def run(
    config: Config,
    *,
    repeats: int,
    output: str | None,
    parts: list[str],
    budget_seconds: float,
    resume: bool,
    **sizes: Any,
) -> Bench:
    """Measure `parts` in the order given; the options are those of recipes/benchmark.py, `sizes` all others of gpu."""
    facts = {**machine(gpu_models.with_precision(config, "bf16")), "repeats": repeats, "sizes": sizes}
    bench = Bench(facts, budget_seconds, repeats, output, resume=resume)
    large, small = gpu_models.architecture("qwen2_5_vl_72b"), gpu_models.architecture("qwen2_5_vl_3b")
    todo = _todo(bench, config, large, small, **sizes)
    gc.freeze()  # what was imported is no garbage: looking through it after each row takes longer than most rows
    try:
        for number, name in enumerate(parts):
            bench.part(name, todo[name])
            if parts[number + 1 :] and bench.is_broken():
                _start_again(bench, parts[number + 1 :])
    finally:
        gc.unfreeze()
    return bench


def _todo(
    bench: Bench,
    config: Config,
    large: dict[str, Any],
    small: dict[str, Any],
    *,
    layer_tokens: int,
    sequence_tokens: int,
    loss_tokens: list[int],
    vocab_size: int,
    hidden_size: int,
    decode_batches: list[int],
    prompt_tokens: int,
    response_tokens: int,
    step_sequences: int,
    step_response_tokens: int,
    step_microbatch_tokens: int,
) -> dict[str, Callable[[], None]]:
    """Each part with its sizes; `large` and `small` are architectures."""
    distill = config.distill
    step: Any = {"prompt_tokens": prompt_tokens, "response_tokens": step_response_tokens}
    step |= {"num_sequences": step_sequences, "microbatch_tokens": step_microbatch_tokens}
    return {
        "ceilings": lambda: ceilings(bench, [(8192, 8192, 8192), *gpu_models.layer_products(large, layer_tokens)]),
        "layers": lambda: gpu_models.layers(bench, config, large, layer_tokens, sequence_tokens),
        "loss": lambda: loss(bench, loss_tokens, vocab_size, hidden_size, distill.top_k, distill.alpha),
        "decode": lambda: gpu_models.decode(bench, config, small, decode_batches, prompt_tokens, response_tokens),
        "step": lambda: gpu_models.step(bench, config, small, **step),
    }


def _start_again(bench: Bench, parts: list[str]) -> None:
    """Replace this process by one that measures `parts`: nothing else makes a GPU usable after some errors."""
    print("the GPU is unusable after an error: a new process measures the other parts", flush=True)
    options = {"gpu.parts": f"[{','.join(parts)}]", "gpu.budget_seconds": bench.left, "gpu.resume": "true"}
    os.execv(sys.executable, [sys.executable, *sys.argv, *(f"{name}={value}" for name, value in options.items())])


def ceilings(
    bench: Bench, products: list[tuple[int, int, int]], copy_bytes: int = 4 * GIB, at_least_seconds: float = 0.2
) -> None:
    """TFLOP/s of products [m, k] x [k, n], given as (m, n, k), in bf16 and FP8; GB/s of a copy, read and written."""
    device = cpu.device()

    def product(m: int, n: int, k: int, scales: str | None, fast: bool) -> Row:
        a, b = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (m, n))
        function: Callable[[], Any] = functools.partial(torch.mm, a, b.t())
        if scales is not None:
            a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
            shapes = ((m, 1), (1, n)) if scales == "row" else ((), ())
            scale_a, scale_b = (torch.ones(shape, device=device) for shape in shapes)
            options: Any = {"scale_a": scale_a, "scale_b": scale_b, "out_dtype": torch.bfloat16, "use_fast_accum": fast}
            function = functools.partial(torch._scaled_mm, a, b.t(), **options)
        measured = measure(function, bench.repeats, at_least_seconds=at_least_seconds)
        return {"ms": measured.seconds * 1e3, "tflops": 2 * m * n * k / measured.seconds / 1e12}

    kinds: dict[str, tuple[str | None, bool]] = {
        "bf16": (None, False),
        "e4m3, a scale each": ("tensor", True),
        "e4m3, a scale each, exact sums": ("tensor", False),  # as Transformer Engine's backward passes
        "e4m3, a scale each row": ("row", True),
    }
    for m, n, k in products:
        for kind, (scales, fast) in kinds.items():
            size = f"{m} x {n} x {k}"
            bench.record({"kind": kind, "size": size}, lambda p=(m, n, k), s=scales, f=fast: product(*p, s, f))

    def copy() -> Row:
        source = torch.empty(copy_bytes, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        measured = measure(lambda: target.copy_(source), bench.repeats, at_least_seconds=at_least_seconds)
        return {"ms": measured.seconds * 1e3, "gb_per_second": 2 * copy_bytes / measured.seconds / 1e9}

    bench.record({"kind": "copy", "size": f"{copy_bytes / GIB:g} GiB"}, copy)


def loss(
    bench: Bench, num_tokens: list[int], vocab_size: int, hidden_size: int, top_k: int | None, alpha: float
) -> None:
    """Forward and backward of the divergence from hidden states, for `top_k` and for the whole vocabulary.

    *Dense* is the definition on full logits, *liger* Liger's fused loss, which knows the whole vocabulary only. All add
    the gradient of the head to a buffer that exists already and is in nobody's memory: ours to float32, as in training,
    the others through autograd to one of the weights' dtype. `divergence` is the mean of a token, for comparison.
    """
    device = cpu.device()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def make(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype).mul_(scale * shape[-1] ** -0.5)

    weight, teacher_weight = make(vocab_size, hidden_size).requires_grad_(), make(vocab_size, hidden_size)
    weight.grad = torch.zeros_like(weight)
    main_grad = torch.zeros(vocab_size, hidden_size, device=device)

    def forms(num: int, k: int | None) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
        student, teacher = make(num, hidden_size, scale=40.0).requires_grad_(), make(num, hidden_size, scale=40.0)
        ones = torch.ones(num, device=device)
        options: Any = {"alpha": alpha, "top_k": k, "add_tail": True}

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
            value, _ = fused_linear_jsd(*policies, ones, LossOptions(**options), weight_grad_into=main_grad)
            value.backward()
            return value.detach() / num

        def liger() -> torch.Tensor:
            if importlib.util.find_spec("liger_kernel") is None:
                raise RuntimeError("liger-kernel is not installed")
            from liger_kernel.transformers import LigerFusedLinearJSD  # type: ignore[import-not-found]

            student.grad = None
            value = LigerFusedLinearJSD(jsd_beta=alpha)(student, weight, teacher, teacher_weight, None)
            value.backward()
            return value.detach()

        yield "dense", dense
        yield "fused", fused
        if k is None:
            yield "liger", liger

    def timed(function: Callable[[], torch.Tensor]) -> Row:
        measured = measure(function, bench.repeats)
        row: Row = {"ms": measured.seconds * 1e3, "extra_gib": measured.extra_gib}
        return {**row, "divergence": float(measured.result)}

    for num in num_tokens:
        for k in dict.fromkeys((top_k, None)):
            dense_row: Row = {}
            for name, function in forms(num, k):
                labels: Row = {"tokens": num, "top_k": "all" if k is None else k, "loss": name}
                (row,) = bench.record(labels, lambda f=function: timed(f))
                if name == "dense":
                    dense_row = row
                elif "ms" in row and "ms" in dense_row:
                    row["time_ratio"] = float(row["ms"]) / float(dense_row["ms"])
                    row["memory_ratio"] = float(row["extra_gib"]) / max(float(dense_row["extra_gib"]), 1e-9)
