"""Names of tensors in Hugging Face files, and the matrices that Megatron fuses from them.

Names are canonical here: `visual.*`, `embed_tokens.*`, `layers.N.*`, `norm.*`, `lm_head.*`. The prefixes `model.`,
`model.language_model.` and `model.visual.` of older and newer files are taken off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_vopd.config import FreezeConfig
from nemo_vopd.mcore.stage import Split


def is_frozen(name: str, options: FreezeConfig) -> bool:
    """Whether `options` keep the tensor `name` (canonical) as it is."""
    if not name.startswith("visual."):
        return options.language
    return options.projector if "merger" in name else options.vision


def canonical(name: str) -> str:
    """The name of a tensor without the prefixes that differ between files of one architecture."""
    for prefix, replacement in (("model.language_model.", ""), ("model.visual.", "visual."), ("model.", "")):
        if name.startswith(prefix):
            return replacement + name[len(prefix) :]
    return name


def interleave(q: Tensor, k: Tensor, v: Tensor, num_groups: int) -> Tensor:
    """Megatron's linear_qkv: for each query group its queries, then its key, then its value."""
    parts = [x.view(num_groups, -1, *x.shape[1:]) for x in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def deinterleave(qkv: Tensor, num_groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of `interleave`; `head_dim` is the width of a key or value head."""
    grouped = qkv.view(num_groups, -1, *qkv.shape[1:])
    q, k, v = grouped.split([grouped.size(1) - 2 * head_dim, head_dim, head_dim], dim=1)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def split_fused(matrix: Tensor, split: Split, num_groups: int, place: int, num_rows: int) -> Tensor:
    """Number `place` of the tensors that one whole matrix is made of; `num_rows` is the size of that tensor."""
    if split == "gated":
        return matrix.chunk(2)[place]
    if split == "qkv":
        head_dim = (num_rows if place else (matrix.size(0) - num_rows) // 2) // num_groups
        return deinterleave(matrix, num_groups, head_dim)[place]
    return matrix
