"""Reductions over a vocabulary that tensor-parallel ranks share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_vopd.distill.divergence import top_k_support


class Vocabulary:
    """A vocabulary whose rows of the head are split among the ranks of a tensor-parallel group."""

    def __init__(self, group: dist.ProcessGroup | None, size: int) -> None:
        """`size` is the real number of tokens: the last ranks may hold rows beyond it, which take no part.

        Without a `group` this process holds all rows.
        """
        self.group = group if group is not None and group.size() > 1 else None
        self.rank = self.group.rank() if self.group is not None else 0
        self.size = size

    def hide_padding_(self, logits: Tensor) -> Tensor:
        """Give the columns of [c, V / tp] that stand for no token probability 0, in place."""
        num_real = max(0, self.size - self.rank * logits.size(-1))
        if num_real < logits.size(-1):
            logits[:, num_real:] = -1e30  # not -inf: 0 * -inf would not be 0
        return logits

    def sum(self, x: Tensor) -> Tensor:
        """`x` summed over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def top_k(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Values and global indices [c, k] of the largest logits, from each rank's own largest."""
        width = logits.size(-1)
        values, indices = top_k_support(logits, min(k, width))
        if self.group is None:
            return values, indices
        # within a rank by index, so that equal values keep the order of the whole vocabulary
        indices, by_index = indices.sort(dim=-1)
        values, indices = values.gather(-1, by_index), indices + self.rank * width
        all_values = [torch.empty_like(values) for _ in range(self.group.size())]
        all_indices = [torch.empty_like(indices) for _ in range(self.group.size())]
        dist.all_gather(all_values, values, group=self.group)
        dist.all_gather(all_indices, indices, group=self.group)
        best, place = torch.cat(all_values, dim=-1).sort(dim=-1, descending=True, stable=True)
        return best[:, :k], torch.cat(all_indices, dim=-1).gather(-1, place[:, :k])

    def local(self, indices: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Global indices to (indices into this rank's shard, whether they lie in it)."""
        local = indices - self.rank * width
        mine = (local >= 0) & (local < width)
        return local.clamp(0, width - 1), mine

    def gather(self, logits: Tensor, indices: Tensor) -> Tensor:
        """Logits [c, k] at global `indices`, wherever they live."""
        if self.group is None:
            return logits.gather(-1, indices)
        local, mine = self.local(indices, logits.size(-1))
        return self.sum(logits.gather(-1, local).masked_fill(~mine, 0.0))

    def scatter_add_(self, target: Tensor, indices: Tensor, values: Tensor) -> None:
        """Add values [c, k] at global `indices` to the shard `target` [c, V / tp], in place."""
        local, mine = self.local(indices, target.size(-1))
        target.scatter_add_(-1, local, values.masked_fill(~mine, 0.0))
