"""The part of a model on one rank: the chunks of its pipeline stage behind one interface."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_vopd.batch import MicroBatch

Split = Literal["replicated", "rows", "columns", "gated", "qkv"]


@dataclass(frozen=True)
class WeightRule:
    """How one Megatron parameter is made of Hugging Face tensors under tensor parallelism."""

    names: tuple[str, ...]
    """Canonical Hugging Face names: one, or gate and up, or query, key and value."""
    split: Split
    """rows and columns divide dimension 0 and 1; gated stacks two row-split tensors; qkv interleaves by group."""
    num_rows: int | None = None
    """Rows of the whole tensor where the shards have more together (a vocabulary that does not divide)."""
    export: bool = True
    """False for a second copy of a tensor that another stage writes."""


class Stage(torch.nn.Module):
    """One chunk of layers, or several under virtual pipelining, in order of depth."""

    def __init__(self, chunks: list[Any]) -> None:
        """`chunks` are models of one family as its file builds them."""
        super().__init__()
        self.chunks: Any = torch.nn.ModuleList(chunks)

    @property
    def config(self) -> TransformerConfig:
        """Megatron's configuration, shared by all chunks."""
        return self.chunks[0].config

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary; the embedding and the head may have more rows, to divide by tensor parallelism."""
        return self.chunks[0].hf.text_config.vocab_size

    def output_weight(self) -> Tensor:
        """[V / tp, H]: this rank's rows of the head, on the last stage."""
        return self.chunks[-1].output_weight()

    def response_hidden(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        """[T, H]: the rows of `hidden`, the last stage's output, that predict the batch's response tokens."""
        return self.chunks[-1].response_hidden(hidden, batch)

    def weight_rule(self, name: str) -> WeightRule:
        """The Hugging Face tensors of parameter `name` of this module."""
        _, index, rest = name.split(".", 2)  # chunks.<index>.<rest>
        rule = self.chunks[int(index)].weight_rule(rest)
        if rule.names[0] in ("embed_tokens.weight", "lm_head.weight"):
            return dataclasses.replace(rule, num_rows=self.vocab_size)
        return rule
