"""Bytes autograd keeps between forward and backward, from the tensors our layers really save.

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
from nemo_vopd.tools.planning.workload import Packed, patch_width


@dataclass(frozen=True)
class ActivationLaw:
    """Bytes for each token or patch on one rank."""

    layer: int
    """Of one language layer, a token."""
    final_norm: int
    """After the last layer, a token."""
    kept: int
    """Of one language layer, a token, until the backward pass: less than `layer` where `trainer.recompute` says so."""
    boundary: int
    """Hidden states a stage receives or sends and keeps for the backward pass, a token."""
    tower: int
    """Of the whole vision tower, a patch; 0 when neither it nor its projector is trained."""
    tower_block: int
    """Of one block of the tower, a patch."""

    def stage_bytes(self, packed: Packed, num_layers: int, *, first: bool, last: bool) -> int:
        """What one microbatch keeps alive in a chunk of `num_layers` layers."""
        tokens = packed.num_tokens
        total = tokens * num_layers * self.kept
        if first:
            total += packed.num_patches * self.tower
        if last:
            total += tokens * self.final_norm
        # what a neighbour sent and what goes to the next stage
        return total + tokens * self.boundary * (int(not first) + int(not last))


def activation_law(config: Config, hf: Any, megatron: TransformerConfig, *, transformer_engine: bool) -> ActivationLaw:
    """The law above for the layers of `megatron`, Transformer Engine's or our own."""
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
    tower = 0 if options.vision else vision.depth * kept_block + e * patch_width(vision) + 8 * _head_dim(vision)
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
    """Hugging Face's block for each patch: it is not divided over tensor-parallel ranks."""
    width = vision.hidden_size
    norms = 2 * (4 + 2 * e) * width  # RMSNorm written out, as in our own layers
    if not _gated(vision):
        norms = 2 * 2 * e * width  # LayerNorm keeps its input; its output is the next product's
    attention = 3 * e * width + 2 * e * width + e * width + 4 * vision.num_heads
    feed_forward = (4 if _gated(vision) else 2) * e * vision.intermediate_size
    return norms + attention + feed_forward


def _gated(vision: Any) -> bool:
    return vision.hidden_act == "silu"


def _head_dim(vision: Any) -> int:
    return vision.hidden_size // vision.num_heads


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
