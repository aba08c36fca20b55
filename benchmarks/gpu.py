"""What one GPU does: ceilings of products and copies, the loss, language layers, sampling, a whole training step.

Written for a machine that is lent for minutes: whatever fails is a row with its error and the others go on, the files
are written anew after every row, and nothing is begun once the time is over.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from benchmarks import models
from benchmarks.loss import gpu_loss
from benchmarks.measure import GIB, Bench, Row, machine, measure
from benchmarks.models import Architecture
from benchmarks.step import gpu_step
from nemo_vopd.batch import Packing
from nemo_vopd.config import Config
from nemo_vopd.mcore import cpu, parallel
from nemo_vopd.mcore.optimizer import wrap_ddp
from nemo_vopd.rollout.engine import SamplingParams
from nemo_vopd.rollout.native.engine import Decoder

PRECISIONS = ("bf16", "fp8_tensorwise", "fp8_delayed", "fp8_blockwise")


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
    facts = {**machine(models.with_precision(config, "bf16")), "repeats": repeats, "sizes": sizes}
    bench = Bench(facts, budget_seconds, repeats, output, resume=resume)
    large, small = models.architecture("qwen2_5_vl_72b"), models.architecture("qwen2_5_vl_3b")
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
    large: Architecture,
    small: Architecture,
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
        "ceilings": lambda: ceilings(bench, [(8192, 8192, 8192), *models.layer_products(large, layer_tokens)]),
        "layers": lambda: layers(bench, config, large, layer_tokens, sequence_tokens),
        "loss": lambda: gpu_loss(bench, loss_tokens, vocab_size, hidden_size, distill.top_k, distill.alpha),
        "decode": lambda: decode(bench, config, small, decode_batches, prompt_tokens, response_tokens),
        "step": lambda: gpu_step(bench, config, small, **step),
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
        measured = measure(function, bench.repeats, warmup=2, at_least_seconds=at_least_seconds)
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
        measured = measure(lambda: target.copy_(source), bench.repeats, warmup=2, at_least_seconds=at_least_seconds)
        return {"ms": measured.seconds * 1e3, "gb_per_second": 2 * copy_bytes / measured.seconds / 1e9}

    bench.record({"kind": "copy", "size": f"{copy_bytes / GIB:g} GiB"}, copy)


def layers(
    bench: Bench,
    config: Config,
    sizes: Architecture,
    num_tokens: int,
    sequence_tokens: int,
    precisions: tuple[str, ...] = PRECISIONS,
) -> None:
    """Forward and backward of two language layers of `sizes` on one packed microbatch, in each precision.

    All layers are in FP8 where the precision says so, also the first and the last, which training may keep in bf16.
    In FP8 weights are cast at the first microbatch of a step and *kept* for the others: a row each.
    """
    groups = parallel.initialize(config.parallel, seed=config.seed)
    tower = {"depth": 1, "hidden_size": 64, "num_heads": 4, "intermediate_size": 64, "fullatt_block_indexes": [0]}
    reduced = {"num_hidden_layers": 2, "vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0}
    sizes = {**sizes, **reduced, "vision_config": {**sizes["vision_config"], **tower}}
    in_bf16: float | None = None
    for name in precisions:
        precise = models.with_precision(config, name)
        precise.precision.fp8.first_layers_bf16 = precise.precision.fp8.last_layers_bf16 = 0
        rows = bench.record(
            {"precision": name}, lambda c=precise: _layers(bench, c, sizes, num_tokens, sequence_tokens, groups)
        )
        for row in rows:
            if name == "bf16" and "ms" in row:
                in_bf16 = float(row["ms"])
            if in_bf16 is not None and "ms" in row:
                row["speed_over_bf16"] = in_bf16 / float(row["ms"])


def _layers(
    bench: Bench,
    config: Config,
    sizes: Architecture,
    num_tokens: int,
    length: int,
    groups: ProcessGroupCollection,
) -> list[Row]:
    stage = models.build(sizes, config, groups)
    (ddp,) = wrap_ddp(stage.chunks, groups)
    device = cpu.device()
    num_sequences = num_tokens // length
    num_tokens = num_sequences * length
    token_ids = torch.randint(0, sizes["vocab_size"], (num_tokens,), device=device)
    position_ids = torch.arange(length, device=device).repeat(num_sequences).expand(3, -1)
    packing = Packing.of([length] * num_sequences).to(device)
    gradient = torch.randn(num_tokens, 1, sizes["hidden_size"], device=device, dtype=stage.config.params_dtype)

    def both_passes() -> None:
        ddp(token_ids, position_ids, packing).backward(gradient)

    total = 3 * models.operations(stage, models.text(num_sequences, num_tokens))
    rows: list[Row] = []
    for weights in ("cast", "kept") if config.precision.fp8.recipe is not None else ("",):
        before = ddp.set_is_first_microbatch if weights == "cast" else None
        measured = measure(both_passes, bench.repeats, warmup=3, before=before)
        row: Row = {"weights": weights, "tokens": num_tokens, "ms": measured.seconds * 1e3}
        rows.append({**row, **bench.rates(total, measured.seconds), "peak_gib": measured.peak_gib})
    return rows


def decode(
    bench: Bench,
    config: Config,
    sizes: Architecture,
    batches: list[int],
    prompt_tokens: int,
    response_tokens: int,
    precision: str = "bf16",
    n: int = 8,
) -> None:
    """Tokens a second of the native engine, text only: `batches` responses at a time, n to a prompt and one to each.

    No response ends before `response_tokens`. `prefill_ms` is a call that draws one token of each.
    """
    config = models.with_precision(config, precision)
    groups = parallel.initialize(config.parallel, seed=config.seed)
    stage = models.build(sizes, config, groups)
    random = torch.Generator().manual_seed(0)
    forbidden = sizes["image_token_id"], sizes["video_token_id"]

    def sample(num_prompts: int, n: int) -> Row:
        views = [models.view(sizes, prompt_tokens, 0, random) for _ in range(num_prompts)]
        names = [str(i) for i in range(num_prompts)]

        def call(length: int) -> int:
            params = SamplingParams(n=n, max_response_length=length, forbidden_token_ids=forbidden)
            decoder = Decoder(stage, groups, num_prompts * (prompt_tokens + n * length))
            return sum(len(tokens) for pairs in decoder(views, names, params) for tokens, _ in pairs)

        whole = measure(lambda: call(response_tokens), bench.repeats, warmup=1)
        prefill = measure(lambda: call(1), bench.repeats, warmup=1)
        row: Row = {
            "tokens": whole.result,
            "ms": whole.seconds * 1e3,
            "tokens_per_second": whole.result / whole.seconds,
        }
        per_step = (whole.seconds - prefill.seconds) / max(1, response_tokens - 1)
        return {**row, "prefill_ms": prefill.seconds * 1e3, "ms_per_step": per_step * 1e3, "peak_gib": whole.peak_gib}

    for each in (n, 1):
        for batch in batches:
            prompts = max(1, batch // each)
            labels: Row = {"responses": prompts * each, "prompts": prompts, "n": each}
            bench.record(labels, lambda p=prompts, e=each: sample(p, e))
