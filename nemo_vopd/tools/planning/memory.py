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


def element_bytes(megatron: TransformerConfig) -> int:
    """Bytes of one weight or activation."""
    return 2 if megatron.bf16 else 4


def fixed_bytes(stage: StageCount, megatron: TransformerConfig, teacher_kind: str) -> dict[str, int]:
    """Bytes of what exists for the whole run: weights, gradients, optimizer and teacher."""
    e = element_bytes(megatron)
    main = 4 if e == 2 else 0  # in float32 runs the weights are the main weights
    own_teacher = teacher_kind != "current"
    return {
        "weights": e * (stage.num_padded + stage.num_frozen),
        "gradients": 4 * stage.num_padded,
        "optimizer": (main + 8) * stage.num_owned,
        # float32 shards, and a copy of the weights; frozen ones are the student's
        "teacher": 4 * stage.num_owned + e * stage.num_padded if own_teacher else 0,
    }


def kv_cache_bytes(megatron: TransformerConfig, num_layers: int, num_tokens: int) -> int:
    """Keys and values of `num_tokens` positions in `num_layers` layers of one rank."""
    assert megatron.num_query_groups is not None and megatron.kv_channels is not None
    groups = megatron.num_query_groups // megatron.tensor_model_parallel_size
    return 2 * num_layers * groups * megatron.kv_channels * element_bytes(megatron) * num_tokens


class StageMemory:
    """One GPU of a pipeline stage."""

    def __init__(self, case: Case, number: int) -> None:
        """`number` is that of the stage."""
        config, hf, model, work, teacher = case.config, case.hf, case.model, case.work, case.config.distill.teacher
        stage, megatron, num_stages = model.stages[number], model.megatron, len(model.stages)
        e, hidden = element_bytes(megatron), megatron.hidden_size
        law = ActivationLaw(config, hf, megatron, transformer_engine=config.model.layer_spec != "local")
        first, last = number == 0, number == num_stages - 1
        kinds = self.kinds = fixed_bytes(stage, megatron, teacher.kind)
        """Bytes by kind."""
        if megatron.fp8:
            # cast once for all microbatches of a pass: as they are for both passes, turned for one backward
            kinds["fp8_weights"] = (3 if teacher.kind != "current" else 2) * stage.num_layer_weights * stage.num_layers

        ends = len(stage.chunk_layers) - 1
        chunks = [
            law.stage_bytes(work.student_most, num, first=first and index == 0, last=last and index == ends)
            for index, num in enumerate(stage.chunk_layers)
        ]
        kinds["activations"] = most_alive(work.num_microbatches, num_stages, number, chunks)
        patches = 4 * patch_width(hf.vision_config) * work.student_most.num_patches if first else 0  # in float32
        kinds["workspace"] = law.workspace(work.student_most, first) + patches
        teacher_states = 2 * e * hidden * work.teacher_most.num_tokens
        kinds["teacher_activations"] = law.workspace(work.teacher_most, first) + teacher_states
        rows = work.num_sequences * work.response_tokens
        kinds["teacher_hidden"] = e * hidden * rows if last and not teacher.offload else 0
        kinds["loss"] = 0
        if last:
            # float32 logits of one chunk under both policies, and the gradient of the response rows' hidden states;
            # before the teacher's are there torch.topk takes as much as 2.25 copies (docs/benchmarks.md)
            rows, head_rows = work.student_most.num_response_rows, stage.num_head // hidden
            chunk = min(config.distill.chunk_tokens or default_chunk_tokens(head_rows, "cuda"), rows)
            num_float32 = 2 if config.distill.top_k is None else 3.25
            kinds["loss"] = int(chunk * head_rows * 4 * num_float32) + e * rows * hidden
        # token ids, three positions, response rows and their tokens (int64), and log-probs of both views; patches stay
        # in host memory until the first stage runs their microbatch
        views = work.student_mean, work.teacher_mean
        ids = sum(32 * packed.num_tokens + 20 * packed.num_response_rows for packed in views)
        kinds["microbatches"] = work.num_microbatches * ids

        decoding, longest = work.decoding, work.longest_prompt
        positions = decoding.num_positions * decoding.num_batches
        kinds["kv_cache"] = kv_cache_bytes(megatron, stage.num_layers, positions)
        per_logit = _SAMPLING_BYTES + (_SORTING_BYTES if config.rollout.top_p < 1 else 0) + 2 * e
        sampling = decoding.num_prompts * work.n * hf.text_config.vocab_size * per_logit if last else 0
        prompts = longest.packed(prompts_of_a_pass(work, longest))
        kinds["rollout_workspace"] = max(law.workspace(prompts, first), sampling)

        kinds["reserve"] = int(config.assume.reserve * case.gpu.memory_bytes)
        kinds["context"] = int(config.assume.context_gib * GIB)
        passing = {kind for names in PHASES.values() for kind in names}
        always = sum(num_bytes for kind, num_bytes in kinds.items() if kind not in passing)
        self.phases = {phase: always + sum(kinds[kind] for kind in names) for phase, names in PHASES.items()}
        """Bytes that exist together in each phase of a step."""
        self.total = max(self.phases.values())
        """Bytes in the fullest phase."""


def prompts_of_a_pass(work: Workload, prompt: Prompt) -> int:
    """How many prompts like `prompt` the native engine computes together."""
    return max(1, min(work.decoding.num_prompts, PROMPT_TOKENS["cuda"] // prompt.num_tokens))


def host_bytes(case: Case) -> dict[str, int]:
    """Host memory of one node by kind, the processes of its GPUs together."""
    config, model, work, patch = case.config, case.model, case.work, 4 * patch_width(case.hf.vision_config)
    patches = work.student_mean.num_patches + work.teacher_mean.num_patches
    kinds = {
        "processes": int(config.assume.host_process_gib * GIB),
        # the step's prompts, those the loader prepares meanwhile, and their copies for the n responses
        "prompts": 2 * work.num_prompts * patch * (work.student.num_patches + work.teacher.num_patches),
        "microbatches": work.num_microbatches * patch * patches,
    }
    if config.distill.teacher.offload:
        rows = work.num_sequences * work.response_tokens
        kinds["teacher_hidden"] = element_bytes(model.megatron) * model.megatron.hidden_size * rows
    if config.checkpoint.asynchronous:
        teacher = 4 if config.distill.teacher.kind != "current" else 0
        kinds["checkpoint_copy"] = (12 + teacher) * max(stage.num_owned for stage in model.stages)
    return {kind: config.gpus_per_node * number for kind, number in kinds.items()}


class ActivationLaw:
    """Bytes of activations of each token or patch on one rank: the module's law for the layers of `megatron`."""

    def __init__(self, config: Config, hf: Any, megatron: TransformerConfig, *, transformer_engine: bool) -> None:
        """`transformer_engine` says whether the layers are its or our own."""
        e, t = element_bytes(megatron), megatron.tensor_model_parallel_size
        heads, groups, d = megatron.num_attention_heads, megatron.num_query_groups, megatron.kv_channels
        assert groups is not None and d is not None and megatron.ffn_hidden_size is not None
        hidden = megatron.hidden_size / (t if megatron.sequence_parallel else 1)
        norm = 2 * e if transformer_engine else 4 + 2 * e
        attention = e * (heads + 2 * groups) * d + e * (heads + groups) * d + e * heads * d + 4 * heads
        if megatron.qk_layernorm:
            attention += norm * (heads + groups) * d
        feed_forward = 3 * e * megatron.ffn_hidden_size / t
        layer = 2 * norm * hidden + attention / t + feed_forward + 4 * e * d
        self.layer = round(layer)
        """One language layer for each token."""
        # computed again from its input: the norm's output, or the hidden states and the angles
        self.kept = round({"none": layer, "mlp": layer - feed_forward, "layers": e * hidden}[config.trainer.recompute])
        """One language layer for each token until the backward pass."""
        self.final_norm = round((e if transformer_engine else 4 + e) * hidden)
        """The norm after the last layer for each token."""
        self.boundary = round(e * hidden)
        """Hidden states that a stage receives or sends and keeps for the backward pass, for each token."""

        vision, freeze = hf.vision_config, config.model.freeze
        width, gated = vision.hidden_size, vision.hidden_act == "silu"
        # Hugging Face's tower, which tensor-parallel ranks do not divide. RMSNorm is written out, as in our own layers;
        # LayerNorm keeps its input, its output is the next product's
        block = 2 * (4 + 2 * e if gated else 2 * e) * width + 6 * e * width + 4 * vision.num_heads
        self.tower_block = block + (4 if gated else 2) * e * vision.intermediate_size
        """One block of the tower for each patch."""
        self.tower = 0
        """The whole vision tower for each patch; 0 when neither it nor its projector is trained."""
        if not freeze.vision:
            kept = e * width if config.trainer.recompute_vision else self.tower_block  # its input
            self.tower += vision.depth * kept + e * patch_width(vision) + 8 * (width // vision.num_heads)
        if self.tower or not freeze.projector:
            self.tower += (4 + 4 * e) * width

    def stage_bytes(self, packed: Packed, num_layers: int, *, first: bool, last: bool) -> int:
        """Bytes that one microbatch keeps alive in a chunk of `num_layers` layers."""
        # the boundary: what a neighbour sent and what goes to the next stage
        each = num_layers * self.kept + last * self.final_norm + self.boundary * ((not first) + (not last))
        return packed.num_tokens * each + first * packed.num_patches * self.tower

    def workspace(self, packed: Packed, first: bool) -> int:
        """Bytes in use while one layer, or one block of the tower, computes."""
        return max(packed.num_tokens * self.layer, packed.num_patches * self.tower_block if first else 0)


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
