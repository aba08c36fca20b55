"""The language models that the families share: RMSNorm, rotary positions in three sections, gated feed-forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_vopd.config import ParallelConfig
from nemo_vopd.mcore.stage import Split
from nemo_vopd.vlm.layout import ModelShape, megatron_layout

_QKV = ("self_attn.q_proj.{}", "self_attn.k_proj.{}", "self_attn.v_proj.{}")
LAYER_RULES: dict[str, tuple[tuple[str, ...], Split]] = {
    "input_layernorm.weight": (("input_layernorm.weight",), "replicated"),
    "self_attention.linear_qkv.layer_norm_weight": (("input_layernorm.weight",), "replicated"),
    "self_attention.linear_qkv.weight": (tuple(n.format("weight") for n in _QKV), "qkv"),
    "self_attention.linear_qkv.bias": (tuple(n.format("bias") for n in _QKV), "qkv"),
    "self_attention.q_layernorm.weight": (("self_attn.q_norm.weight",), "replicated"),
    "self_attention.k_layernorm.weight": (("self_attn.k_norm.weight",), "replicated"),
    "self_attention.linear_proj.weight": (("self_attn.o_proj.weight",), "columns"),
    "pre_mlp_layernorm.weight": (("post_attention_layernorm.weight",), "replicated"),
    "mlp.linear_fc1.layer_norm_weight": (("post_attention_layernorm.weight",), "replicated"),
    "mlp.linear_fc1.weight": (("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gated"),
    "mlp.linear_fc2.weight": (("mlp.down_proj.weight",), "columns"),
}
"""Parameter of a Megatron layer -> Hugging Face names below `layers.N.` and how they are split.

Both specs are here: norms are modules in local layers and parts of the next projection in Transformer Engine's.
"""


def language_shape(text: Any, *, vision_parameters: int, num_first_layers: int = 1) -> ModelShape:
    """What a layout has to divide, for the Hugging Face configuration `text` of a language model."""
    hidden = text.hidden_size
    attention = 2 * hidden * head_dim(text) * (text.num_attention_heads + text.num_key_value_heads)
    return ModelShape(
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        ffn_hidden_size=text.intermediate_size,
        vocab_size=text.vocab_size,
        layer_parameters=attention + 3 * hidden * text.intermediate_size,
        vision_parameters=vision_parameters,
        head_parameters=text.vocab_size * hidden,
        num_first_layers=num_first_layers,
    )


def head_dim(text: Any) -> int:
    """Width of one attention head; some configurations name it."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def language_config(hf: Any, parallel: ParallelConfig, dtype: torch.dtype, **family: Any) -> TransformerConfig:
    """Megatron's configuration of the language model of `hf`; `family` adds what its kind of attention needs."""
    text: Any = hf.text_config
    layers = parallel.pipeline_layout
    return TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=head_dim(text),
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=True,  # the backward pass needs gate and up only, not what was made of them
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
        **family,
    )
