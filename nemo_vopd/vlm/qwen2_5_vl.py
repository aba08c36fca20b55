"""Qwen2.5-VL: the Hugging Face vision tower and a Megatron-Core language model, built from the model's config.json."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    apply_rotary_pos_emb_vision,
)
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from nemo_vopd.config import ParallelConfig
from nemo_vopd.vlm.language import language_config, language_shape
from nemo_vopd.vlm.layout import ModelShape, check_layout
from nemo_vopd.vlm.vision_language import VisionLanguageModel


def model_shape(hf: Qwen2_5_VLConfig) -> ModelShape:
    """What a layout has to divide, with parameter counts from the configuration."""
    vision: Any = hf.vision_config
    tower_layer = vision.hidden_size * (4 * vision.hidden_size + 3 * vision.intermediate_size)
    return language_shape(hf.text_config, vision_parameters=vision.depth * tower_layer)


def transformer_config(
    hf: Qwen2_5_VLConfig, parallel: ParallelConfig, dtype: torch.dtype, **options: Any
) -> TransformerConfig:
    """Megatron's configuration of the language model, with further `options` of it.

    Raises OptionError when the layout cannot divide it.
    """
    check_layout(model_shape(hf), parallel)
    return language_config(hf, parallel, dtype, add_qkv_bias=True, **options)


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
            if block.gradient_checkpointing and self.training:  # trainer.recompute_vision
                x = checkpoint(self._block, block, x, cos, sin, segments, use_reentrant=False)
            else:
                x = self._block(block, x, cos, sin, segments)
        return self.merger(x)[geometry.inverse_index]

    def _block(self, block: Any, x: Tensor, cos: Tensor, sin: Tensor, segments: list[Tensor]) -> Tensor:
        x = x + self._attention(block.attn, block.norm1(x), cos, sin, segments)
        return x + block.mlp(block.norm2(x))

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


class Qwen2_5_VL(VisionLanguageModel):
    """One pipeline chunk of Qwen2.5-VL."""

    def build_tower(self, hf: Any) -> torch.nn.Module:
        """Hugging Face's tower with its own weights."""
        return VisionTower(hf.vision_config)


Model = Qwen2_5_VL
"""What `nemo_vopd.vlm` builds for this family."""
