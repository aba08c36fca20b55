"""Language layers, sampling and a training step of models with random weights: what `gpu_benchmark` times of them.

Everything is built by what builds a training run. A step calls the trainer's own loss and packing.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from omegaconf import OmegaConf
from transformers import AutoConfig

from benchmarks.gpu_rows import Bench, Peak, Stopwatch, measure, out_of_memory
from benchmarks.measure import Row
from nemo_vopd.batch import MicroBatch, Packing, RecordKey, Rollout, Sample, View
from nemo_vopd.cli import CONF
from nemo_vopd.config import Config, PrecisionConfig
from nemo_vopd.distill.teacher import Teacher
from nemo_vopd.mcore import cpu, fp8, parallel
from nemo_vopd.mcore.optimizer import Optimizer, learning_rate, wrap_ddp
from nemo_vopd.mcore.schedule import student_pass, teacher_pass
from nemo_vopd.mcore.stage import Stage
from nemo_vopd.mcore.teacher_weights import ShardedWeights
from nemo_vopd.rollout.engine import SamplingParams
from nemo_vopd.rollout.native.engine import Decoder
from nemo_vopd.tools.planning.compute import forward_cost
from nemo_vopd.tools.planning.count import ModelCount, count_stage
from nemo_vopd.tools.planning.workload import Packed, patch_width
from nemo_vopd.vlm.build import build_stage, build_twin, freeze

Architecture = dict[str, Any]
"""Contents of a config.json."""

PRECISIONS = ("bf16", "fp8_tensorwise", "fp8_delayed", "fp8_blockwise")


_MERGED = 4
"""Patches of an image token."""


def architecture(name: str) -> Architecture:
    """The published architecture in conf/model/`name`.yaml."""
    return OmegaConf.to_container(OmegaConf.load(Path(CONF) / "model" / f"{name}.yaml").architecture)  # type: ignore[return-value]


def hf_config(sizes: Architecture) -> Any:
    """The Hugging Face configuration of `sizes`."""
    contents = dict(sizes)
    return AutoConfig.for_model(contents.pop("model_type"), **contents)


def with_precision(config: Config, name: str) -> Config:
    """`config` with the precision of conf/precision/`name`.yaml."""
    file = OmegaConf.load(Path(CONF) / "precision" / f"{name}.yaml")
    precision: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PrecisionConfig), file))
    return dataclasses.replace(config, precision=precision)


def build(sizes: Architecture, config: Config, groups: ProcessGroupCollection) -> Stage:
    """The model of `sizes` with random weights, made on the device: on a CPU billions of them take a while."""
    fp8.check_machine(config)
    with torch.device(cpu.device()):
        stage = build_stage(hf_config(sizes), config, groups, initialize=True)
    return stage.to(cpu.device())


def layer_products(sizes: Architecture, num_tokens: int) -> list[tuple[int, int, int]]:
    """(m, n, k) of the matrix products [m, k] x [k, n] of a language layer's forward pass on `num_tokens` tokens."""
    hidden, ffn, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]
    width = hidden // heads
    qkv = (heads + 2 * sizes["num_key_value_heads"]) * width
    shapes = [(qkv, hidden), (hidden, heads * width), (2 * ffn, hidden), (hidden, ffn)]
    return [(num_tokens, n, k) for n, k in shapes]


def operations(stage: Stage, packed: Packed) -> float:
    """Of a forward pass, without the head: 2 for each weight and token, attention's and the vision tower's added."""
    count = count_stage(stage, data_parallel=1)
    model = ModelCount(count.num_text, count.num_vision, [count], stage.config, 1)
    return forward_cost(stage.chunks[0].hf, model, count, packed).total


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
        precise = with_precision(config, name)
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
    bench: Bench, config: Config, sizes: Architecture, num_tokens: int, length: int, groups: ProcessGroupCollection
) -> list[Row]:
    stage = build(sizes, config, groups)
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

    total = 3 * operations(stage, _text(num_sequences, num_tokens))
    rows: list[Row] = []
    for weights in ("cast", "kept") if config.precision.fp8.recipe is not None else ("",):
        before = ddp.set_is_first_microbatch if weights == "cast" else None
        measured = measure(both_passes, bench.repeats, warmup=3, before=before)
        row: Row = {"weights": weights, "tokens": num_tokens, "ms": measured.seconds * 1e3}
        rows.append({**row, **bench.rates(total, measured.seconds), "peak_gib": measured.peak_gib})
    return rows


def _text(num_sequences: int, num_tokens: int) -> Packed:
    none = {"num_image_tokens": 0, "num_patches": 0, "num_response_rows": 0}
    return Packed(num_sequences=num_sequences, num_tokens=num_tokens, num_prompts=num_sequences, **none)


def _view(sizes: Architecture, num_tokens: int, grid: int, random: torch.Generator) -> View:
    """A prompt of `num_tokens` random tokens, the first of them an image of `grid` x `grid` tokens (0: none)."""
    side, width = grid * math.isqrt(_MERGED), patch_width(hf_config(sizes).vision_config) if grid else 1
    # the first half of the vocabulary: special tokens, which would stand for images, are in the other
    token_ids = torch.randint(0, sizes["vocab_size"] // 2, (num_tokens,), generator=random)
    token_ids[: grid * grid] = sizes["image_token_id"]
    return View(
        token_ids=token_ids,
        position_ids=torch.arange(num_tokens).expand(3, -1),
        pixel_values=torch.randn(side * side, width, generator=random),
        grid_thw=torch.tensor([[1, side, side]] if grid else [], dtype=torch.int64).view(-1, 3),
    )


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
    config = with_precision(config, precision)
    groups = parallel.initialize(config.parallel, seed=config.seed)
    stage = build(sizes, config, groups)
    random = torch.Generator().manual_seed(0)
    forbidden = sizes["image_token_id"], sizes["video_token_id"]

    def sample(num_prompts: int, n: int) -> Row:
        views = [_view(sizes, prompt_tokens, 0, random) for _ in range(num_prompts)]
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


def step(
    bench: Bench,
    config: Config,
    sizes: Architecture,
    *,
    num_sequences: int,
    prompt_tokens: int,
    response_tokens: int,
    microbatch_tokens: int,
    precision: str = "bf16",
) -> None:
    """A training step on made-up responses: teacher, student, optimizer, moving average; in FP8 where layers ran in it.

    What does not fit the GPU is tried again with half the microbatch, then with half the layers.
    """
    groups = parallel.initialize(config.parallel, seed=config.seed)
    half = {**sizes, "num_hidden_layers": sizes["num_hidden_layers"] // 2}
    attempts = [(sizes, microbatch_tokens), (sizes, microbatch_tokens // 2), (half, microbatch_tokens)]
    ran = {row.get("precision") for row in bench.parts.get("layers", []) if "ms" in row}
    for name in (precision, *(["fp8_tensorwise"] if "fp8_tensorwise" in ran else [])):
        while attempts:
            tried, most = attempts[0]
            precise = with_precision(config, name)
            precise.trainer = dataclasses.replace(precise.trainer, max_tokens_per_microbatch=most)
            labels: Row = {"precision": name, "layers": tried["num_hidden_layers"], "microbatch": most}
            rollouts = _rollouts(tried, num_sequences, config.rollout.n, prompt_tokens, response_tokens)
            (row,) = bench.record(labels, lambda c=precise, s=tried, r=rollouts: _step(bench, c, s, r, groups))
            if not out_of_memory(row):
                break
            attempts.pop(0)  # no precision needs less memory than the first


def _rollouts(
    sizes: Architecture, num_sequences: int, n: int, prompt_tokens: int, response_tokens: int
) -> list[Rollout]:
    """n random responses to each prompt; an image fills about three quarters of either view."""
    random, grid = torch.Generator().manual_seed(0), math.isqrt(prompt_tokens * 3 // 4)
    rollouts: list[Rollout] = []
    while len(rollouts) < num_sequences:
        views = [_view(sizes, prompt_tokens, grid, random) for _ in range(2)]
        sample = Sample(str(len(rollouts)), RecordKey(0, len(rollouts)), *views, question="")
        for index in range(min(n, num_sequences - len(rollouts))):
            tokens = torch.randint(0, sizes["vocab_size"] // 2, (response_tokens,), generator=random)
            log_probs = torch.full((response_tokens,), -math.log(sizes["vocab_size"]))
            rollouts.append(Rollout(sample, tokens, log_probs, index))
    return rollouts


def _step(
    bench: Bench, config: Config, sizes: Architecture, rollouts: list[Rollout], groups: ProcessGroupCollection
) -> Row:
    from nemo_vopd.model import VisionOPDModel

    student = build(sizes, config, groups)
    freeze(student, config.model.freeze)
    ddp = wrap_ddp(student.chunks, groups)
    optimizer = Optimizer(ddp, config.optimizer, groups, bf16=student.config.bf16)
    teacher_model = build_twin(student, config, groups).eval()
    weights = ShardedWeights(teacher_model, student, optimizer, groups)
    main = {name: shard for name, (shard, _) in weights.main.items()}
    teacher = Teacher(config.distill.teacher, main, weights.publish)
    # what the trainer's own methods read of the trainer
    trainer: Any = SimpleNamespace(config=config, groups=groups, student=student, teacher_model=teacher_model)
    trainer.processor = SimpleNamespace(pad_token_id=0)
    students, teachers = VisionOPDModel._microbatches(trainer, rollouts)
    state: dict[str, Any] = {}

    def teacher_phase() -> None:
        state["hidden"] = teacher_pass(teacher_model, teachers, groups)

    def student_phase() -> None:
        optimizer.zero_grad()
        loss = VisionOPDModel._loss(trainer, students, state["hidden"])
        state["statistics"] = student_pass(student, ddp, students, loss, groups)

    def optimizer_phase() -> None:
        lr = learning_rate(0, config.optimizer, config.trainer.max_steps)
        _, state["grad_norm"] = optimizer.step(lr)

    phases: dict[str, Callable[[], None]] = {
        "teacher": teacher_phase,
        "student": student_phase,
        "optimizer": optimizer_phase,
        "average": lambda: teacher.update(0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in phases}
    peak = Peak()
    for number in range(bench.repeats + 1):  # the first makes the optimizer's state and does not count
        for name, phase in phases.items():
            with Stopwatch() as watch:
                phase()
            if number:
                seconds[name].append(watch.seconds)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    packed = _packed(rollouts, students)
    # the head on response rows: logits of both policies and the student's two gradients (the loss is in this phase)
    head = 4 * 2 * packed.num_response_rows * student.output_weight().numel()
    loss_sum, num_tokens = torch.stack(state["statistics"])[:, :2].double().sum(0).tolist()
    return {
        "microbatches": len(students),
        "tokens": packed.num_tokens,
        "response_tokens": packed.num_response_rows,
        "step_ms": 1e3 * sum(medians.values()),
        **{f"{name}_ms": 1e3 * median for name, median in medians.items()},
        "tokens_per_second": packed.num_tokens / sum(medians.values()),
        **{
            f"student_{k}": v
            for k, v in bench.rates(3 * operations(student, packed) + head, medians["student"]).items()
        },
        **{f"teacher_{k}": v for k, v in bench.rates(operations(teacher_model, packed), medians["teacher"]).items()},
        "loss": loss_sum / num_tokens,
        "grad_norm": state["grad_norm"],
        "peak_gib": peak.gib()[0],
    }


def _packed(rollouts: list[Rollout], batches: list[MicroBatch]) -> Packed:
    """Sizes of the microbatches of one view together, padding left out; both views have the same."""
    rows, patches = sum(r.token_ids.numel() for r in rollouts), sum(batch.pixel_values.size(0) for batch in batches)
    return Packed(
        num_sequences=len(rollouts),
        num_tokens=rows + sum(rollout.sample.student.num_tokens for rollout in rollouts),
        num_prompts=sum(len(batch.grid_thw) for batch in batches),  # as often as the tower reads their image
        num_image_tokens=patches // _MERGED,
        num_patches=patches,
        num_response_rows=rows,
    )
