"""Bytes on each GPU and in each node's host memory, by kind, for every pipeline stage.

Activations are the tensors that our layers really save between forward and backward.
With e bytes an element, h heads and g key-value heads of width d, H hidden, F feed-forward, t the tensor-parallel size
and r = t under sequence parallelism, else 1, a language layer keeps for each token (docs/parallelism.md):

    norms       2 (4 + 2e) H / r    float32 copy, normalised, scaled (Transformer Engine: 2 (2e) H / r)
    attention   e (h + 2g) d / t    output of linear_qkv, which the values are a view of
                e (h + g) d / t     rotated queries and keys
                e h d / t           output
                4 h / t             log-sum-exp of each row
                4 e d               cosines and sines of queries and keys: not divided
    feed-forward  3 e F / t         gate and up, their product
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_vopd.config import Config
from nemo_vopd.distill.fused import default_chunk_tokens
from nemo_vopd.rollout.native.batching import PROMPT_TOKENS
from nemo_vopd.tools.planning.assumptions import GIB
from nemo_vopd.tools.planning.count import StageCount
from nemo_vopd.tools.planning.workload import Case, Packed, Prompt, Workload, patch_width

_SAMPLING_BYTES, _SORTING_BYTES = 12, 44
"""Bytes of one logit while a token is drawn: float32 scaled, less their maximum, a copy; with top_p < 1 also those of
its place in the order, float64 probabilities and running sums."""

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
    """Bytes of what exists for the whole run: weights, gradients, optimizer and teacher."""
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
    """Bytes of one microbatch's token ids, three positions, response rows and their tokens (int64), and log-probs."""
    return 32 * packed.num_tokens + 20 * packed.num_response_rows


def patch_bytes(packed: Packed, vision: Any) -> int:
    """Bytes of the float32 patches of one microbatch, as the loader makes them."""
    return 4 * patch_width(vision) * packed.num_patches


def loss_bytes(config: Config, stage: StageCount, hidden: int, e: int, num_rows: int) -> int:
    """Bytes of one chunk's float32 logits of both policies, and of the gradient of the response rows' hidden states.

    torch.topk takes as much as 2.25 copies of the logits (docs/benchmarks.md), before the teacher's are there.
    """
    rows_of_head = stage.num_head // hidden
    chunk = config.distill.chunk_tokens or default_chunk_tokens(rows_of_head, "cuda")
    logits = min(chunk, num_rows) * rows_of_head
    num_float32 = 2 if config.distill.top_k is None else 3.25
    return int(logits * 4 * num_float32) + e * num_rows * hidden


def stage_memory(case: Case, number: int) -> StageMemory:
    """Bytes on one GPU of stage `number`."""
    config, hf, model, work = case.config, case.hf, case.model, case.work
    stage, megatron, num_stages = model.stages[number], model.megatron, len(model.stages)
    e, hidden = element_bytes(megatron), megatron.hidden_size
    law = activation_law(config, hf, megatron, transformer_engine=config.model.layer_spec != "local")
    first, last = number == 0, number == num_stages - 1
    kinds = fixed_bytes(stage, megatron, config.distill.teacher.kind)
    if megatron.fp8:  # cast once for all microbatches of a pass: as they are for both passes, turned for one backward
        copies = 3 if config.distill.teacher.kind != "current" else 2
        kinds["fp8_weights"] = copies * stage.num_layer_weights * sum(stage.chunk_layers)

    ends = len(stage.chunk_layers) - 1
    chunks = [
        law.stage_bytes(work.student_most, num, first=first and index == 0, last=last and index == ends)
        for index, num in enumerate(stage.chunk_layers)
    ]
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

    decoding, longest = work.decoding, work.longest_prompt
    positions = decoding.num_positions * decoding.num_batches
    kinds["kv_cache"] = kv_cache_bytes(megatron, sum(stage.chunk_layers), positions)
    num = prompts_of_a_pass(work, longest)
    prompts = Packed(num, num * longest.num_tokens, num, num * longest.num_image_tokens, num * longest.num_patches, 0)
    per_logit = _SAMPLING_BYTES + (_SORTING_BYTES if config.rollout.top_p < 1 else 0) + 2 * e
    sampling = decoding.num_prompts * work.n * hf.text_config.vocab_size * per_logit if last else 0
    kinds["rollout_workspace"] = max(_one_layer(law, prompts, first), sampling)

    kinds["reserve"] = int(case.assume.reserve * case.gpu.memory_bytes)
    kinds["context"] = int(case.assume.context_gib * GIB)
    passing = {kind for names in PHASES.values() for kind in names}
    always = sum(number for kind, number in kinds.items() if kind not in passing)
    phases = {phase: always + sum(kinds[kind] for kind in names) for phase, names in PHASES.items()}
    return StageMemory(kinds, phases)


def prompts_of_a_pass(work: Workload, prompt: Prompt) -> int:
    """How many prompts like `prompt` the native engine computes together."""
    return max(1, min(work.decoding.num_prompts, PROMPT_TOKENS["cuda"] // prompt.num_tokens))


def _one_layer(law: ActivationLaw, packed: Packed, first: bool) -> int:
    """Bytes in use while one layer, or one block of the tower, computes."""
    return max(packed.num_tokens * law.layer, packed.num_patches * law.tower_block if first else 0)


def host_bytes(case: Case, gpus_per_node: int) -> dict[str, int]:
    """Host memory of one node by kind, the processes of its GPUs together."""
    config, hf, model, work = case.config, case.hf, case.model, case.work
    images = 4 * patch_width(hf.vision_config) * (work.student.num_patches + work.teacher.num_patches)
    per_step = sum(patch_bytes(packed, hf.vision_config) for packed in (work.student_mean, work.teacher_mean))
    kinds = {
        "processes": int(case.assume.host_process_gib * GIB),
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


@dataclass(frozen=True)
class ActivationLaw:
    """Activations of each token or patch on one rank."""

    layer: int
    """Bytes of one language layer for each token."""
    final_norm: int
    """Bytes of the norm after the last layer for each token."""
    kept: int
    """Bytes of one language layer for each token until the backward pass, fewer with `trainer.recompute`."""
    boundary: int
    """Bytes of the hidden states that a stage receives or sends and keeps for the backward pass, for each token."""
    tower: int
    """Bytes of the whole vision tower for each patch; 0 when neither it nor its projector is trained."""
    tower_block: int
    """Bytes of one block of the tower for each patch."""

    def stage_bytes(self, packed: Packed, num_layers: int, *, first: bool, last: bool) -> int:
        """Bytes that one microbatch keeps alive in a chunk of `num_layers` layers."""
        # the boundary: what a neighbour sent and what goes to the next stage
        each = num_layers * self.kept + last * self.final_norm + self.boundary * ((not first) + (not last))
        return packed.num_tokens * each + first * packed.num_patches * self.tower


def activation_law(config: Config, hf: Any, megatron: TransformerConfig, *, transformer_engine: bool) -> ActivationLaw:
    """The module's law for the layers of `megatron`, Transformer Engine's or our own."""
    e = 2 if megatron.bf16 else 4
    t = megatron.tensor_model_parallel_size
    split = t if megatron.sequence_parallel else 1
    heads, groups, d = megatron.num_attention_heads, megatron.num_query_groups, megatron.kv_channels
    assert groups is not None and d is not None and megatron.ffn_hidden_size is not None
    hidden = megatron.hidden_size
    norm = 2 * e if transformer_engine else 4 + 2 * e
    attention = e * (heads + 2 * groups) * d + e * (heads + groups) * d + e * heads * d + 4 * heads
    if megatron.qk_layernorm:
        attention += norm * (heads + groups) * d
    feed_forward = 3 * e * megatron.ffn_hidden_size / t
    layer = 2 * norm * hidden / split + attention / t + feed_forward + 4 * e * d
    # computed again from its input: the norm's output, or the hidden states and the angles
    kept = {"none": layer, "mlp": layer - feed_forward, "layers": e * hidden / split}[config.trainer.recompute]
    vision = hf.vision_config
    block = _tower_block(vision, e)
    options = config.model.freeze
    kept_block = e * vision.hidden_size if config.trainer.recompute_vision else block  # its input
    tower = (
        0
        if options.vision
        else vision.depth * kept_block + e * patch_width(vision) + 8 * (vision.hidden_size // vision.num_heads)
    )
    if not options.projector or tower:
        tower += (4 + 2 * e) * vision.hidden_size + 2 * e * vision.hidden_size
    return ActivationLaw(
        layer=round(layer),
        kept=round(kept),
        final_norm=round((e if transformer_engine else 4 + e) * hidden / split),
        boundary=round(e * hidden / split),
        tower=tower,
        tower_block=block,
    )


def _tower_block(vision: Any, e: int) -> int:
    """Bytes of a block of Hugging Face's tower for each patch; tensor-parallel ranks do not divide it."""
    width = vision.hidden_size
    gated = vision.hidden_act == "silu"
    # RMSNorm written out, as in our own layers; LayerNorm keeps its input, its output is the next product's
    norms = 2 * (4 + 2 * e if gated else 2 * e) * width
    attention = 6 * e * width + 4 * vision.num_heads
    return norms + attention + (4 if gated else 2) * e * vision.intermediate_size


def most_alive(num_microbatches: int, num_stages: int, stage: int, chunk_bytes: list[int]) -> int:
    """Highest sum of activations alive on `stage` under Megatron's 1F1B schedule, interleaved with several chunks.

    `chunk_bytes` is what one microbatch keeps in each chunk of the stage. With one chunk this is
    min(stages - stage, microbatches) microbatches.
    """
    chunks = len(chunk_bytes)
    total = num_microbatches * chunks
    warmup = num_stages - stage - 1 if chunks == 1 else (num_stages - stage - 1) * 2 + (chunks - 1) * num_stages
    round_length = num_stages if chunks > 1 else 1
    alive = highest = 0
    for forward in range(total):
        alive += chunk_bytes[forward // round_length % chunks]
        highest = max(highest, alive)
        backward = forward - min(warmup, total - 1)
        if backward >= 0:
            alive -= chunk_bytes[chunks - 1 - backward // round_length % chunks]
    return highest
