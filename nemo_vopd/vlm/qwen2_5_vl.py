"""Qwen2.5-VL: the Hugging Face vision tower and a Megatron-Core language model, built from the model's config.json."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    apply_rotary_pos_emb_vision,
)
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from nemo_vopd.batch import MicroBatch
from nemo_vopd.config import ParallelConfig
from nemo_vopd.mcore.layers import KVCache, block_spec
from nemo_vopd.vlm.hf_weights import Split, WeightRule
from nemo_vopd.vlm.layout import ModelShape, check_layout, megatron_layout


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


class LanguageModel(GPTModel):
    """Megatron's GPT without the head: every stage returns hidden states [s, b, H].

    The loss applies the head to response rows only (docs/algorithm.md section 7).
    """

    def _postprocess(self, hidden_states: Tensor, **_: object) -> Tensor:  # type: ignore[override]
        return hidden_states


class Qwen2_5_VL(MegatronModule):
    """One pipeline chunk of Qwen2.5-VL; the first one holds the vision tower, replicated over tensor parallelism."""

    def __init__(
        self,
        hf: Qwen2_5_VLConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        layer_spec: str = "auto",
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        """Build from the Hugging Face config `hf` and Megatron's `config` (see `transformer_config`).

        `vp_stage` is the number of this chunk on its pipeline stage, None without virtual pipelining.
        """
        super().__init__(config=config)
        self.hf, self.groups = hf, groups
        self.pre_process, self.post_process = pre_process, post_process
        self.model_type = ModelType.encoder_or_decoder
        self.image_token_id = hf.image_token_id
        self.share_embeddings_and_output_weights = hf.tie_word_embeddings
        text: Any = hf.text_config
        tower: Any = VisionTower(hf.vision_config) if pre_process else None  # type: ignore[arg-type]
        self.vision = tower.to(config.params_dtype) if pre_process else None
        self.language = LanguageModel(
            config,
            block_spec(config, layer_spec, pp_rank=groups.pp.rank(), vp_stage=vp_stage),  # type: ignore[arg-type]
            vocab_size=text.vocab_size,
            max_sequence_length=text.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=hf.tie_word_embeddings,
            position_embedding_type="mrope",
            rotary_base=int(text.rope_parameters["rope_theta"]),
            scatter_embedding_sequence_parallel=False,  # image features are put in first
            pg_collection=groups,
            vp_stage=vp_stage,
        )

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Hidden states from the previous pipeline stage (called by Megatron's schedules)."""
        self.language.set_input_tensor(input_tensor)  # type: ignore[arg-type]

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The embedding's or head's weight that stages share when they are tied (called by Megatron)."""
        return self.language.shared_embedding_or_output_weight()

    def output_weight(self) -> Tensor:
        """[V / tp, H]: this rank's rows of the head, on the last stage."""
        if self.share_embeddings_and_output_weights:
            weight = self.language.shared_embedding_or_output_weight()
        else:
            weight = self.language.output_layer.weight
        assert weight is not None, "the head lives on the last pipeline stage"
        return weight

    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        pixel_values: Tensor | None = None,
        grid_thw: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states [s, b, H] of this stage ([s / tp, b, H] under sequence parallelism).

        Args:
            token_ids: [b, s].
            position_ids: [3, b, s] M-RoPE positions of these tokens.
            pixel_values: [N, D] patches of all images in the batch, or None while decoding.
            grid_thw: [num_images, 3] patch grids of these images.
            cache: keys and values of earlier tokens, while sampling.
        """
        embeddings = None
        if self.pre_process:
            embeddings = self._embed(token_ids, pixel_values, grid_thw)
        return self.language(
            input_ids=token_ids,
            position_ids=position_ids,
            attention_mask=cache,
            decoder_input=embeddings,
        )

    def _embed(self, token_ids: Tensor, pixel_values: Tensor | None, grid_thw: Tensor | None) -> Tensor:
        embeddings = self.language.embedding(input_ids=token_ids, position_ids=None)  # [s, b, H]
        if pixel_values is not None and pixel_values.size(0):
            assert self.vision is not None and grid_thw is not None
            features = self.vision(pixel_values.to(embeddings.dtype), grid_thw)
            by_sequence = embeddings.transpose(0, 1)  # images follow the order of sequences, so [b, s, H]
            is_image = (token_ids == self.image_token_id)[..., None]
            embeddings = by_sequence.masked_scatter(is_image, features.to(by_sequence.dtype)).transpose(0, 1)
            embeddings = embeddings.contiguous()
        if self.config.sequence_parallel:
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings, group=self.groups.tp)
        return embeddings

    def response_hidden(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        """[T, H]: the rows of `hidden` (this last stage's output) that predict the batch's response tokens."""
        if self.config.sequence_parallel:
            # every rank computes the same loss gradient, so the backward pass splits instead of summing
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.groups.tp
            )
        return hidden.flatten(0, 1)[batch.response_rows]

    def weight_rule(self, name: str) -> WeightRule:
        """The Hugging Face tensors of parameter `name` of this module (local and Transformer Engine names)."""
        if name.startswith("vision."):
            return WeightRule(("visual." + name.removeprefix("vision."),), "replicated")
        name = name.removeprefix("language.")
        if name == "output_layer.weight" and self.share_embeddings_and_output_weights:
            # the last stage's copy of the embedding: loaded like it, and exported by the first stage only
            return dataclasses.replace(_ROOT_RULES["embedding.word_embeddings.weight"], export=False)
        if name in _ROOT_RULES:
            return _ROOT_RULES[name]
        # decoder.layers.<local index>.<rest>
        _, _, index, rest = name.split(".", 3)
        number = self.language.decoder.layers[int(index)].layer_number - 1  # type: ignore[operator,index]
        hf_names, split = _LAYER_RULES[rest]
        return WeightRule(tuple(f"layers.{number}.{hf_name}" for hf_name in hf_names), split)


_ROOT_RULES = {
    "embedding.word_embeddings.weight": WeightRule(("embed_tokens.weight",), "rows"),
    "output_layer.weight": WeightRule(("lm_head.weight",), "rows"),
    "decoder.final_layernorm.weight": WeightRule(("norm.weight",), "replicated"),
}
_QKV = ("self_attn.q_proj.{}", "self_attn.k_proj.{}", "self_attn.v_proj.{}")
_LAYER_RULES: dict[str, tuple[tuple[str, ...], Split]] = {
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
