"""Layer specs: Transformer Engine on a GPU, Megatron's local layers with our norm and attention elsewhere.

Attention is ours in both: it hands over to Transformer Engine or PyTorch's scaled dot product. Float32 stays with
Megatron's local layers on a GPU too, unless Transformer Engine is asked for: it multiplies with 10 bits of mantissa
(TF32), while sampling and the loss do not, and has no fused attention for it.

Sampling reads the weights of these layers by itself (`rollout.native.forward`): Megatron's static cache stores keys
before the rotary embedding and rotates all of them again at every step, and cannot share a prompt among responses.
"""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE, TEDotProductAttention, TENorm
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from nemo_vopd.batch import Packing
from nemo_vopd.errors import OptionError


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, float32 inside; allows sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        """`hidden_size` weights of ones; extra arguments of Megatron's norm builders are ignored."""
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.eps = eps
        # tells finalize_model_grads to sum this gradient over the tensor-parallel group
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., hidden_size]; the dtype is kept."""
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def _causal_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float) -> Tensor:
    """Causal attention of query [S, 1, h, d] over key, value [S, 1, g, d] (grouped heads); returns [S, 1, h * d].

    Neighbours of one length are computed together.
    """
    outputs, start = [], 0
    for length, run in groupby(packing.lengths):
        num = len(list(run))
        q, k, v = (
            x[start : start + num * length, 0].view(num, length, *x.shape[2:]).transpose(1, 2)
            for x in (query, key, value)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1))
        outputs.append(out.transpose(1, 2).reshape(num * length, 1, -1))
        start += num * length
    return torch.cat(outputs)


class CoreAttention(MegatronModule):
    """Causal attention of packed tokens, each within its sequence."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        """Arguments as Megatron's `DotProductAttention`."""
        super().__init__(config=config)
        self.layer_number = layer_number
        self.scale = softmax_scale or config.kv_channels**-0.5  # type: ignore[operator]

    def forward(self, query, key, value, attention_mask, *, packed_seq_params: Packing, **_: object) -> Tensor:
        """Attend: query [S, 1, h, d], key and value [S, 1, g, d]; returns [S, 1, h * d]."""
        return _causal_attention(query, key, value, packed_seq_params, self.scale)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Attention has no state to save."""
        return {}


class FusedCoreAttention(CoreAttention):
    """The same by Transformer Engine's fused kernels, all sequences in one call."""

    def __init__(self, config: TransformerConfig, *args: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        """Arguments as `CoreAttention`."""
        super().__init__(config, *args, **kwargs)
        self.fused = TEDotProductAttention(config, *args, **kwargs)

    def forward(self, query, key, value, attention_mask, *, packed_seq_params: Packing, **_: object) -> Tensor:
        """As `CoreAttention.forward`."""
        packing, longest = packed_seq_params, max(packed_seq_params.lengths)
        params = PackedSeqParams("thd", packing.starts, packing.starts, max_seqlen_q=longest, max_seqlen_kv=longest)
        rows = (_own(x.squeeze(1)) for x in (query, key, value))
        out = self.fused(*rows, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=params)
        return out.view(query.size(0), 1, -1)


def _own(x: Tensor) -> Tensor:
    """A contiguous copy of `x`; a view that starts inside a larger tensor may count as contiguous and is copied too."""
    return x.clone() if x.storage_offset() and x.is_contiguous() else x.contiguous()


def uses_transformer_engine(choice: str, dtype: torch.dtype) -> bool:
    """Whether `model.layer_spec` = auto, local or transformer_engine means Transformer Engine on this machine.

    `dtype` is that of the weights; auto leaves float32 to PyTorch.
    """
    if choice == "transformer_engine" and not HAVE_TE:
        raise OptionError(
            "model.layer_spec",
            choice,
            "Transformer Engine is not installed here",
            "run in an NGC image, pip install nemo_vopd[gpu], or set model.layer_spec=local",
        )
    there = HAVE_TE and torch.cuda.is_available() and dtype != torch.float32
    return choice == "transformer_engine" or (choice == "auto" and there)


def has_fused_attention(choice: str, dtype: torch.dtype) -> bool:
    """Whether Transformer Engine serves attention, too: it has no fused kernel for float32, and none for a CPU."""
    return uses_transformer_engine(choice, dtype) and torch.cuda.is_available() and dtype != torch.float32


def recompute_options(choice: str) -> dict[str, Any]:
    """What Megatron's `TransformerConfig` is told for `trainer.recompute` = none, mlp or layers."""
    if choice == "mlp":
        return {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    if choice == "layers":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {}


def block_spec(
    config: TransformerConfig,
    choice: str,
    *,
    pp_rank: int,
    vp_stage: int | None = None,
    layer_class: type[TransformerLayer] = TransformerLayer,
) -> TransformerBlockSubmodules:
    """The language layers of chunk `vp_stage` of stage `pp_rank` and the final norm; `choice` is `model.layer_spec`."""
    layer = _layer_spec(choice, config.params_dtype, qk_layernorm=config.qk_layernorm)
    layer.module = layer_class
    norm = TENorm if uses_transformer_engine(choice, config.params_dtype) else RMSNorm
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)  # type: ignore[arg-type]


def add_to_main_grad(module: torch.nn.Module) -> None:
    """Let Transformer Engine's projections in `module` add the gradients of their weights to DDP's float32 buffer.

    Else each microbatch writes a bf16 gradient of every weight, rounded, which DDP then reads and adds. Megatron's
    option for it, `gradient_accumulation_fusion`, asks for apex because of the head, which our loss sees to.
    """
    for part in module.modules():
        if hasattr(part, "fuse_wgrad_accumulation"):
            part.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def _layer_spec(choice: str, dtype: torch.dtype, *, qk_layernorm: bool) -> ModuleSpec:
    if uses_transformer_engine(choice, dtype):
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
        attention: Any = spec.submodules.self_attention  # type: ignore[union-attr]
        fused = has_fused_attention(choice, dtype)
        attention.submodules.core_attention = FusedCoreAttention if fused else CoreAttention
        return spec
    qk_norm = RMSNorm if qk_layernorm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=CoreAttention,  # type: ignore[arg-type]
                    linear_proj=RowParallelLinear,  # type: ignore[arg-type]
                    q_layernorm=qk_norm,  # type: ignore[arg-type]
                    k_layernorm=qk_norm,  # type: ignore[arg-type]
                ),
            ),
            self_attn_bda=get_bias_dropout_add,  # type: ignore[arg-type]
            pre_mlp_layernorm=RMSNorm,
            mlp=partial(
                MLP.as_mlp_submodule,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,  # type: ignore[arg-type]
        ),
    )
