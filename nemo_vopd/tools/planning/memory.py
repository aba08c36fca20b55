"""Bytes on each GPU and in each node's host memory, by kind, for every pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_vopd.config import Config
from nemo_vopd.distill.fused import default_chunk_tokens
from nemo_vopd.rollout.native.batching import PROMPT_TOKENS
from nemo_vopd.tools.planning.activations import ActivationLaw, activation_law, most_alive
from nemo_vopd.tools.planning.assumptions import GIB, Assumptions, Gpu
from nemo_vopd.tools.planning.count import ModelCount, StageCount
from nemo_vopd.tools.planning.workload import Packed, Prompt, Workload, patch_width

_SAMPLING_BYTES, _SORTING_BYTES = 12, 44
"""Of one logit while a token is drawn: float32 scaled, less their maximum, a copy. With top_p < 1 also its place in the
order and float64 probabilities with running sums."""

PHASES = {
    "rollout": ("kv_cache", "rollout_workspace"),
    "teacher": ("microbatches", "teacher_activations", "teacher_hidden"),
    "student": ("microbatches", "teacher_hidden", "activations", "workspace", "loss"),
}
"""Kinds that exist in one phase of a step only; all others exist always."""


@dataclass(frozen=True)
class StageMemory:
    """One GPU of a pipeline stage."""

    kinds: dict[str, int]
    """Bytes by kind."""
    phases: dict[str, int]
    """Bytes that exist together in each phase of a step."""

    @property
    def total(self) -> int:
        """Bytes in the fullest phase."""
        return max(self.phases.values())


def element_bytes(megatron: TransformerConfig) -> int:
    """Bytes of one weight or activation."""
    return 2 if megatron.bf16 else 4


def fixed_bytes(stage: StageCount, megatron: TransformerConfig, teacher_kind: str) -> dict[str, int]:
    """What exists for the whole run: weights, gradients, optimizer and teacher."""
    e, buffers = element_bytes(megatron), stage.buffers
    main = 4 if e == 2 else 0  # in float32 runs the weights are the main weights
    own_teacher = teacher_kind != "current"
    return {
        "weights": e * (buffers.num_padded + stage.num_frozen),
        "gradients": 4 * buffers.num_padded,
        "optimizer": (main + 8) * buffers.num_owned,
        # float32 shards, and a copy of the weights; frozen ones are the student's
        "teacher": 4 * buffers.num_owned + e * buffers.num_padded if own_teacher else 0,
    }


def kv_cache_bytes(megatron: TransformerConfig, num_layers: int, num_tokens: int) -> int:
    """Keys and values of `num_tokens` positions in `num_layers` layers of one rank."""
    assert megatron.num_query_groups is not None and megatron.kv_channels is not None
    groups = megatron.num_query_groups // megatron.tensor_model_parallel_size
    return 2 * num_layers * groups * megatron.kv_channels * element_bytes(megatron) * num_tokens


def id_bytes(packed: Packed) -> int:
    """Token ids, three positions, response rows and their tokens of one microbatch, int64, and log-probs."""
    return 32 * packed.num_tokens + 20 * packed.num_response_rows


def patch_bytes(packed: Packed, vision: Any) -> int:
    """The float32 patches of one microbatch, as the loader makes them."""
    return 4 * patch_width(vision) * packed.num_patches


def loss_bytes(config: Config, stage: StageCount, hidden: int, e: int, num_rows: int) -> int:
    """Float32 logits of student and teacher of one chunk, the gradient of the response rows' hidden states."""
    rows_of_head = stage.num_head // hidden
    chunk = config.distill.chunk_tokens or default_chunk_tokens(rows_of_head, "cuda")
    logits = min(chunk, num_rows) * rows_of_head
    num_float32 = 2 if config.distill.top_k is not None and config.distill.teacher.kind != "trust_region" else 4
    return logits * 4 * num_float32 + e * num_rows * hidden


def stage_memory(
    config: Config, hf: Any, model: ModelCount, number: int, work: Workload, gpu: Gpu, assume: Assumptions
) -> StageMemory:
    """Bytes on one GPU of stage `number`."""
    stage, megatron, num_stages = model.stages[number], model.megatron, len(model.stages)
    e, hidden = element_bytes(megatron), megatron.hidden_size
    law = activation_law(config, hf, megatron, transformer_engine=config.model.layer_spec != "local")
    first, last = number == 0, number == num_stages - 1
    kinds = fixed_bytes(stage, megatron, config.distill.teacher.kind)
    if megatron.fp8:  # cast once for all microbatches of a pass: as they are for both passes, turned for one backward
        copies = 3 if config.distill.teacher.kind != "current" else 2
        kinds["fp8_weights"] = copies * stage.num_layer_weights * sum(stage.chunk_layers)

    chunks = _chunk_bytes(law, work.student_most, stage.chunk_layers, first=first, last=last)
    kinds["activations"] = most_alive(work.num_microbatches, num_stages, number, chunks)
    kinds["workspace"] = _one_layer(law, work.student_most, first)
    if first:
        kinds["workspace"] += patch_bytes(work.student_most, hf.vision_config)
    kinds["teacher_activations"] = _one_layer(law, work.teacher_most, first) + 2 * e * hidden * (
        work.teacher_most.num_tokens
    )
    rows = work.num_sequences * work.response_tokens
    kinds["teacher_hidden"] = e * hidden * rows if last and not config.distill.teacher.offload else 0
    kinds["loss"] = loss_bytes(config, stage, hidden, e, work.student_most.num_response_rows) if last else 0
    # patches stay in host memory until the first stage runs their microbatch
    kinds["microbatches"] = work.num_microbatches * (id_bytes(work.student_mean) + id_bytes(work.teacher_mean))

    lanes, longest = work.lanes, work.longest_prompt
    kinds["kv_cache"] = kv_cache_bytes(megatron, sum(stage.chunk_layers), lanes.num_positions * lanes.num_lanes)
    num = prompts_of_a_pass(work, longest)
    prompts = Packed(num, num * longest.num_tokens, num, num * longest.num_image_tokens, num * longest.num_patches, 0)
    per_logit = _SAMPLING_BYTES + (_SORTING_BYTES if config.rollout.top_p < 1 else 0) + 2 * e
    sampling = lanes.num_prompts * work.n * hf.text_config.vocab_size * per_logit if last else 0
    kinds["rollout_workspace"] = max(_one_layer(law, prompts, first), sampling)

    kinds["reserve"] = int(assume.reserve * gpu.memory_bytes)
    kinds["context"] = int(assume.context_gib * GIB)
    return StageMemory(kinds, _phases(kinds))


def prompts_of_a_pass(work: Workload, prompt: Prompt) -> int:
    """How many prompts like `prompt` the native engine computes together."""
    return max(1, min(work.lanes.num_prompts, PROMPT_TOKENS["cuda"] // prompt.num_tokens))


def _phases(kinds: dict[str, int]) -> dict[str, int]:
    passing = {kind for names in PHASES.values() for kind in names}
    always = sum(number for kind, number in kinds.items() if kind not in passing)
    return {phase: always + sum(kinds[kind] for kind in names) for phase, names in PHASES.items()}


def _chunk_bytes(law: ActivationLaw, packed: Packed, layers: tuple[int, ...], *, first: bool, last: bool) -> list[int]:
    ends = len(layers) - 1
    return [
        law.stage_bytes(packed, num, first=first and index == 0, last=last and index == ends)
        for index, num in enumerate(layers)
    ]


def _one_layer(law: ActivationLaw, packed: Packed, first: bool) -> int:
    """What is in use while one layer, or one block of the tower, computes."""
    return max(packed.num_tokens * law.layer, packed.num_patches * law.tower_block if first else 0)


def host_bytes(
    config: Config, hf: Any, model: ModelCount, work: Workload, gpus_per_node: int, assume: Assumptions
) -> dict[str, int]:
    """Host memory of one node by kind, the processes of its GPUs together."""
    images = 4 * patch_width(hf.vision_config) * (work.student.num_patches + work.teacher.num_patches)
    per_step = sum(patch_bytes(packed, hf.vision_config) for packed in (work.student_mean, work.teacher_mean))
    kinds = {
        "processes": int(assume.host_process_gib * GIB),
        # the step's prompts, those the loader prepares meanwhile, and their copies for the n responses
        "prompts": 2 * work.num_prompts * images,
        "microbatches": work.num_microbatches * per_step,
    }
    if config.distill.teacher.offload:
        rows = work.num_sequences * work.response_tokens
        kinds["teacher_hidden"] = element_bytes(model.megatron) * model.megatron.hidden_size * rows
    if config.checkpoint.asynchronous:
        teacher = 4 if config.distill.teacher.kind != "current" else 0
        kinds["checkpoint_copy"] = (12 + teacher) * max(stage.buffers.num_owned for stage in model.stages)
    return {kind: gpus_per_node * number for kind, number in kinds.items()}
