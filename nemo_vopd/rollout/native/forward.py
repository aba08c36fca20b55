"""Forward passes without gradient over the weights of a Megatron chunk: packed tokens, residuals folded in.

Megatron's own layers rotate all angles anew in every layer, pad prompts to one length and spend more time in Python
than a token of a small batch takes to compute. The weights are read where training keeps them, under the names that
local layers and Transformer Engine's have for them; `tests/rollout` compares with Hugging Face's models.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_vopd.rollout.native.cache import KVCache


class Tokens(NamedTuple):
    """What one pass is fed: T tokens, packed."""

    token_ids: Tensor
    """[T] int64."""
    angles: tuple[Tensor, Tensor]
    """Cosines and sines [T, 1, 1, d] of `Rotary`."""
    pixel_values: Tensor | None = None
    """[N, D] patches of all images among these tokens."""
    grid_thw: Tensor | None = None
    """[num_images, 3] int64, in host memory."""


class Rotary:
    """Rotary angles of a chunk's family, computed once for all layers; those of text come from a table."""

    def __init__(self, chunk: Any) -> None:
        """`chunk` is a `VisionLanguageModel`."""
        self.module, self.section = chunk.language.rotary_pos_emb, chunk.language.mrope_section
        self.dtype = chunk.config.params_dtype
        self._table: tuple[Tensor, Tensor] | None = None

    def __call__(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, 1, 1, d] of M-RoPE positions [3, T], the sines with the sign of `rotate`."""
        angles = self.module(position_ids[:, None], self.section)  # [T, 1, 1, d]
        cos, sin = angles.cos(), angles.sin()
        low, high = sin.chunk(2, dim=-1)
        return cos.to(self.dtype), torch.cat([-low, high], dim=-1).to(self.dtype)

    def extend(self, num_positions: int) -> None:
        """Make the table of text as long as `num_positions`."""
        if self._table is None or len(self._table[0]) < num_positions:
            device = self.module.inv_freq.device
            self._table = self(torch.arange(num_positions, device=device).expand(3, -1))

    def text(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, 1, 1, d] of text at `positions` [T]."""
        assert self._table is not None
        return self._table[0][positions], self._table[1][positions]


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """x [T, g, n, d] turned by `angles`."""
    cos, sin = angles
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


class ChunkPass:
    """One chunk of a pipeline stage, fed with packed tokens and a `KVCache`."""

    def __init__(self, chunk: Any, groups: ProcessGroupCollection, *, ends_model: bool) -> None:
        """`chunk` is a `VisionLanguageModel`; `ends_model`: it holds the model's last layer."""
        self.chunk, self.tp, self.ends_model = chunk, groups.tp, ends_model
        config = chunk.config
        self.eps, self.head_width = config.layernorm_epsilon, config.kv_channels
        self.num_groups = config.num_query_groups // config.tensor_model_parallel_size
        self.scale = config.softmax_scale or config.kv_channels**-0.5
        self.layers = [_Layer.of(layer) for layer in chunk.language.decoder.layers]

    def __call__(self, tokens: Tokens, hidden: Tensor | None, cache: KVCache, *, prompts: bool) -> Tensor:
        """Hidden states [T, H] of the T tokens; of prompts, after the model's last layer, the last of each: [b, H].

        `hidden` [T, H] comes from the chunk before, None for the first. `cache` has been told what is fed.
        """
        x, added = hidden, None
        if x is None:
            embedded, added = self.chunk.embed(tokens.token_ids, tokens.pixel_values, tokens.grid_thw)
            x, added = embedded[:, 0], added[:, 0] if added is not None else None
        for layer in self.layers:
            last_only = prompts and self.ends_model and layer is self.layers[-1]
            x = self._layer(layer, x, tokens.angles, cache, last_only)
            if added is not None and layer.number <= added.size(1):
                x = x + (added[cache.last] if last_only else added)[:, layer.number - 1]
        return self._norm(x, self.chunk.language.decoder.final_layernorm.weight) if self.ends_model else x

    def _layer(self, w: _Layer, x: Tensor, angles: tuple[Tensor, Tensor], cache: KVCache, last_only: bool) -> Tensor:
        qkv = F.linear(self._norm(x, w.attention_norm), w.qkv, w.qkv_bias)
        qkv = qkv.view(x.size(0), self.num_groups, -1, self.head_width)  # of each group its queries, key and value
        rotated = qkv[:, :, :-1]
        if w.q_norm is not None and w.k_norm is not None:
            query, key = self._norm(rotated[:, :, :-1], w.q_norm), self._norm(rotated[:, :, -1:], w.k_norm)
            rotated = torch.cat([query, key], dim=2)
        rotated = rotate(rotated, angles)
        query, key, value = rotated[:, :, :-1], rotated[:, :, -1], qkv[:, :, -1]
        attended = cache.attend(w.number, query, key, value, self.scale, last_only)
        x = self._add(x[cache.last] if last_only else x, attended, w.proj)
        gate, up = F.linear(self._norm(x, w.mlp_norm), w.fc1).chunk(2, dim=-1)
        return self._add(x, F.silu(gate).mul_(up), w.fc2)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), weight, self.eps)

    def _add(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """x + y @ weight.T, `weight` split by columns over tensor-parallel ranks."""
        if self.tp.size() == 1:
            return torch.addmm(x, y, weight.t())
        y = F.linear(y, weight)
        dist.all_reduce(y, group=self.tp)
        return x + y


class _Layer(NamedTuple):
    """The weights of one Megatron layer."""

    number: int
    """1 for the first of the model."""
    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    proj: Tensor
    mlp_norm: Tensor
    fc1: Tensor
    fc2: Tensor

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        attention, mlp = layer.self_attention, layer.mlp
        return cls(
            number=layer.layer_number,
            attention_norm=_norm_before(attention.linear_qkv, layer.input_layernorm),
            qkv=attention.linear_qkv.weight,
            qkv_bias=attention.linear_qkv.bias if layer.config.add_qkv_bias else None,
            q_norm=getattr(attention.q_layernorm, "weight", None),
            k_norm=getattr(attention.k_layernorm, "weight", None),
            proj=attention.linear_proj.weight,
            mlp_norm=_norm_before(mlp.linear_fc1, layer.pre_mlp_layernorm),
            fc1=mlp.linear_fc1.weight,
            fc2=mlp.linear_fc2.weight,
        )


def _norm_before(linear: Any, norm: Any) -> Tensor:
    """The norm's weight: in its own module, or in Transformer Engine's fused projection."""
    fused = getattr(linear, "layer_norm_weight", None)
    return norm.weight if fused is None else fused
