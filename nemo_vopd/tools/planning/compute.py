"""Operations and seconds of one step, from data-sheet peaks and stated efficiencies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_vopd.tools.planning.assumptions import Assumptions
from nemo_vopd.tools.planning.count import StageCount
from nemo_vopd.tools.planning.memory import element_bytes, kv_cache_bytes, prompts_of_a_pass
from nemo_vopd.tools.planning.workload import Case, Packed


@dataclass(frozen=True)
class Cost:
    """Operations of one forward pass on one GPU."""

    language: float
    vision: float
    fp8: float = 0.0
    """Operations of the language model that FP8 computes."""

    @property
    def total(self) -> float:
        """Operations of both, in any precision."""
        return self.language + self.vision

    def seconds(self, peak: float, assume: Assumptions) -> float:
        """Seconds at the assumed shares of `peak` operations per second."""
        language = self.language - self.fp8 + self.fp8 / assume.fp8_gain
        return language / (peak * assume.efficiency) + self.vision / (peak * assume.vision_efficiency)


def forward_cost(
    hf: Any, megatron: TransformerConfig, stage: StageCount, packed: Packed, *, sampling: bool = False
) -> Cost:
    """Cost of the layers and the tower of one stage on one microbatch, without the head; `sampling` is never in FP8."""
    assert megatron.kv_channels is not None
    vision, t = hf.vision_config, megatron.tensor_model_parallel_size
    length = packed.num_tokens / max(1, packed.num_sequences)
    # causal: a position attends to half of them on average; scores and their product with the values
    attention = 4 * (megatron.num_attention_heads // t) * megatron.kv_channels * length / 2
    products = packed.num_tokens * stage.num_layers * 2 * stage.num_layer_weights
    language = products + packed.num_tokens * stage.num_layers * attention
    in_bf16 = 0
    if megatron.first_last_layers_bf16:
        in_bf16 = megatron.num_layers_at_start_in_bf16 + megatron.num_layers_at_end_in_bf16
    fp8 = products * (1 - in_bf16 / megatron.num_layers) if megatron.fp8 and not sampling else 0.0
    if not stage.num_vision_blocks or not packed.num_patches:
        return Cost(language, 0.0, fp8)
    patches = packed.num_patches / max(1, packed.num_prompts)  # of two images in a prompt, windows hide most of it
    full = len(getattr(vision, "fullatt_block_indexes", range(vision.depth)))
    window = (getattr(vision, "window_size", 0) // int(vision.patch_size)) ** 2
    keys = full * patches + (vision.depth - full) * min(window, patches)
    tower = packed.num_patches * (2 * stage.num_vision_blocks + 4 * vision.hidden_size * keys)
    return Cost(language, tower + 2 * stage.num_merger * packed.num_image_tokens, fp8)


class Timing:
    """Operations and seconds of one step."""

    def __init__(self, case: Case) -> None:
        config, hf, model, work, assume = case.config, case.hf, case.model, case.work, case.config.assume
        megatron = model.megatron
        peak = case.gpu.flops["bf16" if megatron.bf16 else "fp32"]
        stages, chunks = model.stages, config.parallel.virtual_pipeline
        assert megatron.ffn_hidden_size is not None and megatron.kv_channels is not None and megatron.num_query_groups
        feed_forward = 3 * megatron.ffn_hidden_size
        attention = 2 * megatron.kv_channels * (megatron.num_attention_heads + megatron.num_query_groups)
        again = {"none": 0, "mlp": feed_forward / (feed_forward + attention), "layers": 1}[config.trainer.recompute]
        student, teacher = [], []
        for stage in stages:
            cost = forward_cost(hf, megatron, stage, work.student_mean)
            # of each response row the student's logits and both gradients, and the teacher's logits
            head = work.student_mean.num_response_rows * 2 * stage.num_head * 4
            language = 3 * cost.language + again * cost.language + head
            vision = 3 * cost.vision + (cost.vision if config.trainer.recompute_vision else 0.0)
            student.append(Cost(language, vision, 3 * cost.fp8 + again * cost.fp8))
            teacher.append(forward_cost(hf, megatron, stage, work.teacher_mean))

        num, ranks = work.num_microbatches, config.parallel.tensor * model.data_parallel
        self.stage_seconds = [cost.seconds(peak, assume) for cost in student]
        """Seconds of the student's forward and backward pass on one mean microbatch, by stage."""
        prefill, prefill_seconds = _prefill(case, peak)
        decode, decode_seconds = _decode(case, peak)
        self.flops = {
            "rollout": ranks * (prefill + decode),
            "teacher": ranks * num * sum(cost.total for cost in teacher),
            "student": ranks * num * sum(cost.total for cost in student),
        }
        """Operations of all GPUs by phase; the vision tower counts once for every tensor-parallel rank that runs it."""
        self.seconds = {
            "rollout": prefill_seconds + decode_seconds,
            "teacher": _pipeline_seconds([cost.seconds(peak, assume) for cost in teacher], num, chunks),
            "student": _pipeline_seconds(self.stage_seconds, num, chunks),
            "optimizer": _update_seconds(case),
        }
        self.step_seconds = sum(self.seconds.values())
        fill = (len(stages) - 1) / chunks
        self.bubble = fill / (num + fill)
        """Share of the student's pass in which a stage waits because the pipeline fills or drains."""


def _pipeline_seconds(times: list[float], num_microbatches: int, chunks: int) -> float:
    """The slowest stage sets the pace; the others' time passes once, while the pipeline fills and drains."""
    slowest = max(times)
    return num_microbatches * slowest + (sum(times) - slowest) / chunks


def _prefill(case: Case, peak: float) -> tuple[float, float]:
    """(operations of one model-parallel group's rank 0s, seconds) of computing every prompt once."""
    work = case.work
    passes = -(-work.num_prompts // prompts_of_a_pass(work, work.student))
    packed = work.student.packed(work.num_prompts / passes)
    costs = [forward_cost(case.hf, case.model.megatron, stage, packed, sampling=True) for stage in case.model.stages]
    total = passes * sum(cost.total for cost in costs)
    return total, _pipeline_seconds([cost.seconds(peak, case.config.assume) for cost in costs], passes, 1)


def _decode(case: Case, peak: float) -> tuple[float, float]:
    """(operations, seconds) of decoding. What does not fit follows as responses end; the last go on to the longest.

    Each token of a batch reads a stage's weights and the batch's keys and values once; launching the kernels of a layer
    takes `decode_layer_seconds` whatever they compute.
    """
    model, work, assume, decoding = case.model, case.work, case.config.assume, case.work.decoding
    e, prompts = element_bytes(model.megatron), min(work.num_prompts / decoding.num_batches, decoding.num_prompts)
    rows = prompts * work.n
    speed = case.gpu.bandwidth * assume.bandwidth_efficiency
    positions = round(prompts * work.student.num_tokens + rows * work.longest_response / 2)
    times, operations = [], 0.0
    for stage in model.stages:
        layers = stage.num_layers
        weights = layers * stage.num_layer_weights + stage.num_head
        cache = kv_cache_bytes(model.megatron, layers, positions)
        work_seconds = max((e * weights + cache) / speed, 2 * rows * weights / (peak * assume.efficiency))
        times.append(max(work_seconds, layers * assume.decode_layer_seconds))
        operations += 2 * weights
    # a token returns to the first stage when all batches have passed the slowest, or one has passed them all
    per_token = max(decoding.num_batches * max(times), sum(times))
    refills = work.num_prompts / (decoding.num_batches * prompts) - 1
    steps = work.longest_response + refills * work.response_tokens
    return operations * work.num_sequences * work.response_tokens, steps * per_token


def _update_seconds(case: Case) -> float:
    """Gradients reduced, weights and the teacher's weights gathered, every state read and written once."""
    model, assume = case.model, case.config.assume
    e, size = element_bytes(model.megatron), model.data_parallel
    own_teacher = case.config.distill.teacher.kind not in ("current", "fixed", "trust_region")
    crossing = 4 + e + (e if own_teacher else 0)
    fullest = max(stage.num_padded for stage in model.stages)
    sent = crossing * fullest * (size - 1) / size
    touched = fullest * 8 + fullest / size * 48
    return sent / assume.network_bytes_per_second + touched / (case.gpu.bandwidth * assume.bandwidth_efficiency)
