"""The phases of a training step: of a real one on one batch, and on a GPU of one with made-up responses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from benchmarks import models
from benchmarks.measure import Bench, Row, measure_in_turn, out_of_memory
from nemo_vopd.batch import MicroBatch, RecordKey, Rollout, Sample
from nemo_vopd.config import Config
from nemo_vopd.distill.teacher import Teacher
from nemo_vopd.mcore import parallel
from nemo_vopd.mcore.optimizer import Optimizer, learning_rate, wrap_ddp
from nemo_vopd.mcore.pipeline_passes import student_pass, teacher_pass
from nemo_vopd.mcore.teacher_weights import ShardedWeights
from nemo_vopd.model import VisionOPDModel
from nemo_vopd.tools.planning.workload import Packed
from nemo_vopd.vlm.build import build_twin, freeze

_BYTES_OF_STATE = 24
"""Bytes of each parameter on one GPU: bf16 weights, float32 gradient, master and two moments; bf16 teacher and its
float32 average."""
_SHARE_OF_STATE = 0.8
"""Largest share of the memory that they may take; activations and logits need the rest."""


def step(config: Config, repeats: int) -> list[Row]:
    """The phases of a training step on one batch."""
    model = VisionOPDModel(config, parallel.initialize(config.parallel, seed=config.seed))
    samples = next(iter(model.train_dataloader())).samples
    rollouts: list[Rollout] = model.engine.generate(samples)
    students, teachers = model._microbatches(rollouts)
    hidden = teacher_pass(model.teacher_model, teachers, model.groups)
    lr = learning_rate(0, config.optimizer, config.trainer.max_steps)

    def student() -> None:
        model.student_optimizer.zero_grad()
        student_pass(model.student, model.student_ddp, students, model._loss(students, hidden), model.groups)

    def optimizer() -> None:
        model.student_optimizer.step(lr)
        model.teacher.update(0)

    phases: dict[str, Callable[[], object]] = {
        "rollout": lambda: model.engine.generate(samples),
        "teacher": lambda: teacher_pass(model.teacher_model, teachers, model.groups),
        "student": student,
        "optimizer and EMA": optimizer,
    }
    num_tokens = sum(rollout.token_ids.numel() for rollout in rollouts)
    found = measure_in_turn(list(phases.values()), repeats, resident=True)
    return [
        {"phase": name, "ms": m.seconds * 1e3, "extra_gib": m.extra_gib, "response_tokens": num_tokens}
        for name, m in zip(phases, found, strict=True)
    ]


def gpu_step(
    bench: Bench,
    config: Config,
    sizes: models.Architecture,
    *,
    num_sequences: int,
    prompt_tokens: int,
    response_tokens: int,
    microbatch_tokens: int,
    precision: str = "bf16",
) -> None:
    """A training step on made-up responses: teacher, student, optimizer, moving average; in FP8 where layers ran in it.

    What does not fit the GPU is tried again with half the microbatch, then with half the layers. What cannot fit is
    not tried: an allocation that fails in a pass leaves its memory taken.
    """
    groups = parallel.initialize(config.parallel, seed=config.seed)
    half = {**sizes, "num_hidden_layers": sizes["num_hidden_layers"] // 2}
    attempts = [(sizes, microbatch_tokens), (sizes, microbatch_tokens // 2), (half, microbatch_tokens)]
    attempts = [one for one in attempts if _may_fit(one[0])] or attempts[-1:]
    ran = {row.get("precision") for row in bench.parts.get("layers", []) if "ms" in row}
    for name in (precision, *(["fp8_tensorwise"] if "fp8_tensorwise" in ran else [])):
        while attempts:
            tried, most = attempts[0]
            precise = models.with_precision(config, name)
            precise.trainer = dataclasses.replace(precise.trainer, max_tokens_per_microbatch=most)
            labels: Row = {"precision": name, "layers": tried["num_hidden_layers"], "microbatch": most}
            rollouts = _rollouts(tried, num_sequences, config.rollout.n, prompt_tokens, response_tokens)
            (row,) = bench.record(labels, lambda c=precise, s=tried, r=rollouts: _step(bench, c, s, r, groups))
            if not out_of_memory(row):
                break
            attempts.pop(0)  # no precision needs less memory than the first


def _may_fit(sizes: models.Architecture) -> bool:
    """Whether the weights and the state of training leave room for activations and logits; without a GPU they do."""
    if not torch.cuda.is_available():
        return True
    most_bytes = _SHARE_OF_STATE * torch.cuda.get_device_properties(0).total_memory
    return _BYTES_OF_STATE * models.num_parameters(sizes) <= most_bytes


def _rollouts(
    sizes: models.Architecture, num_sequences: int, n: int, prompt_tokens: int, response_tokens: int
) -> list[Rollout]:
    """n random responses to each prompt; an image fills about three quarters of either view."""
    random, grid = torch.Generator().manual_seed(0), math.isqrt(prompt_tokens * 3 // 4)
    rollouts: list[Rollout] = []
    while len(rollouts) < num_sequences:
        views = [models.view(sizes, prompt_tokens, grid, random) for _ in range(2)]
        sample = Sample(str(len(rollouts)), RecordKey(0, len(rollouts)), *views, question="")
        for index in range(min(n, num_sequences - len(rollouts))):
            tokens = torch.randint(0, sizes["vocab_size"] // 2, (response_tokens,), generator=random)
            log_probs = torch.full((response_tokens,), -math.log(sizes["vocab_size"]))
            rollouts.append(Rollout(sample, tokens, log_probs, index))
    return rollouts


def _step(
    bench: Bench, config: Config, sizes: models.Architecture, rollouts: list[Rollout], groups: ProcessGroupCollection
) -> Row:
    student = models.build(sizes, config, groups)
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
    # the warm-up makes the optimizer's state
    found = dict(zip(phases, measure_in_turn(list(phases.values()), bench.repeats), strict=True))
    medians = {name: measured.seconds for name, measured in found.items()}
    packed = _packed(rollouts, students)
    # the head on response rows: logits of both policies and the student's two gradients (the loss is in this phase)
    head = 4 * 2 * packed.num_response_rows * student.output_weight().numel()
    work = {"student": 3 * models.operations(student, packed) + head}
    work["teacher"] = models.operations(teacher_model, packed)
    rates = {name: bench.rates(number, medians[name]) for name, number in work.items()}
    loss_sum, num_tokens = torch.stack(state["statistics"])[:, :2].double().sum(0).tolist()
    return {
        "microbatches": len(students),
        "tokens": packed.num_tokens,
        "response_tokens": packed.num_response_rows,
        "step_ms": 1e3 * sum(medians.values()),
        **{f"{name}_ms": 1e3 * median for name, median in medians.items()},
        "tokens_per_second": packed.num_tokens / sum(medians.values()),
        **{f"{name}_{key}": value for name, row in rates.items() for key, value in row.items()},
        "loss": loss_sum / num_tokens,
        "grad_norm": state["grad_norm"],
        "peak_gib": max(measured.peak_gib for measured in found.values()),
    }


def _packed(rollouts: list[Rollout], batches: list[MicroBatch]) -> Packed:
    """Sizes of the microbatches of one view together, padding left out; both views have the same."""
    rows, patches = sum(r.token_ids.numel() for r in rollouts), sum(batch.pixel_values.size(0) for batch in batches)
    return Packed(
        num_sequences=len(rollouts),
        num_tokens=rows + sum(rollout.sample.student.num_tokens for rollout in rollouts),
        num_prompts=sum(len(batch.grid_thw) for batch in batches),  # as often as the tower reads their image
        num_image_tokens=patches // models.MERGED,
        num_patches=patches,
        num_response_rows=rows,
    )
