"""Qwen3-VL, dense: the Hugging Face vision tower, whose features enter the first language layers too (DeepStack)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from nemo_vopd.config import ParallelConfig
from nemo_vopd.vlm.language import language_config, language_shape
from nemo_vopd.vlm.layout import ModelShape, check_layout
from nemo_vopd.vlm.vision_language import LanguageModel, VisionLanguageModel


def model_shape(hf: Qwen3VLConfig) -> ModelShape:
    """What a layout has to divide, with parameter counts from the configuration."""
    text: Any = hf.text_config
    vision: Any = hf.vision_config
    tower_layer = vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
    # features are added after that many layers, which stay with the tower: stages send each other hidden states only
    deepstack = min(len(vision.deepstack_visual_indexes), text.num_hidden_layers)
    return language_shape(text, vision_parameters=vision.depth * tower_layer, num_first_layers=max(1, deepstack))


def transformer_config(
    hf: Qwen3VLConfig, parallel: ParallelConfig, dtype: torch.dtype, **options: Any
) -> TransformerConfig:
    """Megatron's configuration of the language model, with further `options` of it.

    Raises OptionError when the layout cannot divide it.
    """
    check_layout(model_shape(hf), parallel)
    return language_config(hf, parallel, dtype, qk_layernorm=True, **options)


class InterleavedRotaryEmbedding(MultimodalRotaryEmbedding):
    """Rotary angles whose frequencies take turns among time, height and width, so each axis gets slow and fast ones."""

    def forward(self, position_ids: Tensor, mrope_section: list[int], cp_group: Any = None) -> Tensor:
        """Angles [S, 1, 1, head_dim] of M-RoPE positions [3, 1, S]; `mrope_section` counts frequencies of each axis."""
        positions = position_ids.float()
        angles = positions[0, 0, :, None] * self.inv_freq  # [S, head_dim / 2]
        # height and width stop after their number of turns: what is left belongs to time
        for axis in (1, 2):
            turns = slice(axis, 3 * mrope_section[axis], 3)
            angles[:, turns] = positions[axis, 0, :, None] * self.inv_freq[turns]
        angles = angles[:, None]
        return torch.cat([angles, angles], dim=-1)[:, :, None]


class DeepStackLayer(TransformerLayer):
    """A layer that adds its image features, if there are any, to its output."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As Megatron's layer; `context` holds the features [S, 1, K, H] of layers 1 .. K, zero beside images."""
        output: Any = super().forward(*args, **kwargs)
        hidden, features = output
        if features is not None and self.layer_number <= features.size(2):
            hidden = hidden + features[:, :, self.layer_number - 1]
        return hidden, features


class Qwen3LanguageModel(LanguageModel):
    """Megatron's GPT with interleaved M-RoPE."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        """Arguments as Megatron's `GPTModel`."""
        super().__init__(config, *args, **kwargs)
        assert config.kv_channels is not None
        self.rotary_pos_emb = InterleavedRotaryEmbedding(
            config.kv_channels, rotary_percent=1.0, rotary_base=self.rotary_base, cp_group=self.pg_collection.cp
        )


class Qwen3VL(VisionLanguageModel):
    """One pipeline chunk of Qwen3-VL."""

    language_class = Qwen3LanguageModel
    layer_class = DeepStackLayer

    def build_tower(self, hf: Any) -> torch.nn.Module:
        """Hugging Face's tower with its own weights."""
        return Qwen3VLVisionModel(hf.vision_config)

    def image_features(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features [n, H] of the image tokens, and those [n, H] to add after layers 1, 2, ..."""
        assert self.vision is not None
        output = self.vision(pixel_values, grid_thw.to(pixel_values.device), return_dict=True)
        return output.pooler_output, output.deepstack_features


Model = Qwen3VL
"""What `nemo_vopd.vlm` builds for this family."""
