"""Qwen2.5-VL: the Hugging Face vision tower and a Megatron-Core language model, built from the model's config.json."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    apply_rotary_pos_emb_vision,
)
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from nemo_vopd.config import ParallelConfig
from nemo_vopd.vlm.hf_weights import Split
from nemo_vopd.vlm.layout import ModelShape, check_layout, megatron_layout
from nemo_vopd.vlm.model import VisionLanguageModel


def model_shape(hf: Qwen2_5_VLConfig) -> ModelShape:
    """What a layout has to divide, with parameter counts from the configuration."""
    text: Any = hf.text_config
    vision: Any = hf.vision_config
    hidden, head_dim = text.hidden_size, text.hidden_size // text.num_attention_heads
    attention = 2 * hidden * head_dim * (text.num_attention_heads + text.num_key_value_heads)
    tower_layer = vision.hidden_size * (4 * vision.hidden_size + 3 * vision.intermediate_size)
    return ModelShape(
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        ffn_hidden_size=text.intermediate_size,
        vocab_size=text.vocab_size,
        layer_parameters=attention + 3 * hidden * text.intermediate_size,
        vision_parameters=vision.depth * tower_layer,
        head_parameters=text.vocab_size * hidden,
    )


def transformer_config(hf: Qwen2_5_VLConfig, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration of the language model. Raises OptionError when the layout cannot divide it."""
    check_layout(model_shape(hf), parallel)
    text: Any = hf.text_config
    layers = parallel.pipeline_layout
    return TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=text.hidden_size // text.num_attention_heads,
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mrope_section=list(text.rope_parameters["mrope_section"]),
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        pipeline_model_parallel_layout=megatron_layout(layers) if layers else None,  # type: ignore[arg-type]
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        # microbatches of different lengths cross the pipeline stages; Megatron accepts that only with this dispatcher
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # gradients are divided once by the global number of response tokens, whatever the layout
        calculate_per_token_loss=True,
        persist_layer_norm=torch.cuda.is_available(),
        batch_p2p_comm=torch.cuda.is_available(),
    )


class VisionTower(Qwen2_5_VisionTransformerPretrainedModel):
    """Hugging Face's tower with its own weights; windows of equal size are attended in one call.

    The original loops over windows in Python and recomputes their indices in every call. Values are the same.
    """

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:  # type: ignore[override]
        """Merged features [N / merge^2, out_hidden] of patches `pixel_values` [N, D], in the order of the images."""
        grids = tuple(map(tuple, grid_thw.tolist()))
        sizes: Any = (self.spatial_merge_size, self.window_size, self.patch_size)
        geometry = _geometry(grids, *sizes).to(pixel_values.device)
        # the patch convolution does not overlap, so it is one matrix product, which is several times faster
        projection = self.patch_embed.proj.weight
        x = F.linear(pixel_values.to(projection.dtype), projection.flatten(1))
        merge = self.spatial_merge_unit
        x = x.view(-1, merge, x.size(-1))[geometry.window_index].flatten(0, 1)
        cos, sin = self.rotary_pos_emb(x, geometry.position_ids)
        blocks: Any = self.blocks
        for i, block in enumerate(blocks):
            segments = geometry.full if i in self.fullatt_block_indexes else geometry.windows
            x = x + self._attention(block.attn, block.norm1(x), cos, sin, segments)
            x = x + block.mlp(block.norm2(x))
        return self.merger(x)[geometry.inverse_index]

    @staticmethod
    def _attention(attn: Any, x: Tensor, cos: Tensor, sin: Tensor, segments: list[Tensor]) -> Tensor:
        """Attention of x [N, hidden] within each row of each index tensor [m, L] in `segments`."""
        q, k, v = attn.qkv(x).view(x.size(0), 3, attn.num_heads, -1).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
        if len(segments) == 1:  # one length: windows lie one after the other
            m, length = segments[0].shape
            q, k, v = (t.view(m, length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, scale=attn.scaling).transpose(1, 2).flatten(0, 1)
        else:
            out = torch.empty_like(q)
            for index in segments:
                part_q, part_k, part_v = (t[index].transpose(1, 2) for t in (q, k, v))
                part = F.scaled_dot_product_attention(part_q, part_k, part_v, scale=attn.scaling)
                out = out.index_copy(0, index.flatten(), part.transpose(1, 2).flatten(0, 1))
        return attn.proj(out.flatten(1))


class _Geometry:
    """Index tensors of one list of images: where each patch goes and which patches attend to each other."""

    def __init__(self, window_index: Tensor, position_ids: Tensor, windows: list[Tensor], full: list[Tensor]) -> None:
        self.window_index, self.position_ids, self.windows, self.full = window_index, position_ids, windows, full
        self.inverse_index = torch.argsort(window_index)

    def to(self, device: torch.device) -> _Geometry:
        if self.window_index.device == device:
            return self
        windows, full = ([t.to(device) for t in segments] for segments in (self.windows, self.full))
        return _Geometry(self.window_index.to(device), self.position_ids.to(device), windows, full)


@functools.lru_cache(maxsize=64)
def _geometry(grids: tuple[tuple[int, ...], ...], merge: int, window_size: int, patch_size: int) -> _Geometry:
    grid_thw = torch.tensor(grids)
    window_index, cu_windows = get_vision_window_index(grid_thw, merge, window_size, patch_size)
    positions = get_vision_position_ids(grid_thw, merge).view(-1, merge * merge, 2)[window_index].flatten(0, 1)
    # one attention segment for each frame of each image
    frames = torch.repeat_interleave(grid_thw[:, 1] * grid_thw[:, 2], grid_thw[:, 0])
    return _Geometry(window_index, positions, _equal_segments(cu_windows.diff()), _equal_segments(frames))


def _equal_segments(lengths: Tensor) -> list[Tensor]:
    """Segments one after the other, grouped by length: a list of index tensors [number, length]."""
    starts = lengths.cumsum(0) - lengths
    return [starts[lengths == n][:, None] + torch.arange(n) for n in lengths.unique().tolist()]


_QKV = ("self_attn.q_proj.{}", "self_attn.k_proj.{}", "self_attn.v_proj.{}")
LAYER_RULES: dict[str, tuple[tuple[str, ...], Split]] = {
    "input_layernorm.weight": (("input_layernorm.weight",), "replicated"),
    "self_attention.linear_qkv.layer_norm_weight": (("input_layernorm.weight",), "replicated"),
    "self_attention.linear_qkv.weight": (tuple(n.format("weight") for n in _QKV), "qkv"),
    "self_attention.linear_qkv.bias": (tuple(n.format("bias") for n in _QKV), "qkv"),
    "self_attention.linear_proj.weight": (("self_attn.o_proj.weight",), "columns"),
    "pre_mlp_layernorm.weight": (("post_attention_layernorm.weight",), "replicated"),
    "mlp.linear_fc1.layer_norm_weight": (("post_attention_layernorm.weight",), "replicated"),
    "mlp.linear_fc1.weight": (("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gated"),
    "mlp.linear_fc2.weight": (("mlp.down_proj.weight",), "columns"),
}


class Qwen2_5_VL(VisionLanguageModel):
    """One pipeline chunk of Qwen2.5-VL."""

    layer_rules = LAYER_RULES

    def build_tower(self, hf: Any) -> torch.nn.Module:
        """Hugging Face's tower with its own weights."""
        return VisionTower(hf.vision_config)


Model = Qwen2_5_VL
"""What `nemo_vopd.vlm` builds for this family."""
