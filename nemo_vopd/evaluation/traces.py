"""Responses token by token: what student and teacher gave each position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_vopd.batch import Rollout, collate
from nemo_vopd.config import DistillConfig
from nemo_vopd.data.processor import Processor
from nemo_vopd.distill.divergence import generalized_jsd
from nemo_vopd.mcore import cpu
from nemo_vopd.mcore.fp8 import token_multiple
from nemo_vopd.mcore.schedule import teacher_pass
from nemo_vopd.mcore.stage import Stage

NUM_TOP = 5


@dataclass
class PolicyTrace:
    """One policy over the T tokens of a response."""

    log_probs: list[float]
    """[T] log p of the sampled tokens in nats."""
    top: list[list[tuple[str, float]]]
    """[T] the most probable tokens and their probabilities."""


def trace(
    rollouts: list[Rollout],
    student: Stage,
    teacher: Stage,
    processor: Processor,
    distill: DistillConfig,
    groups: ProcessGroupCollection,
) -> list[tuple[list[str], PolicyTrace, PolicyTrace, list[float]]]:
    """(tokens, student, teacher, divergence [T]) of each rollout; one pipeline stage only."""
    results = []
    for rollout in rollouts:
        policies, logits = [], []
        for model, view in ((student, rollout.sample.student), (teacher, rollout.sample.teacher)):
            batch = collate([rollout], [view], processor.pad_token_id, token_multiple(model.config)).to(cpu.device())
            (hidden,) = teacher_pass(model, [batch], groups)
            logits.append(_gather((hidden @ model.output_weight().t()).float(), groups)[:, : model.vocab_size])
            policies.append(_policy(logits[-1], rollout.token_ids, processor))
        divergence = generalized_jsd(*logits, alpha=distill.alpha, top_k=distill.top_k, add_tail=distill.add_tail)
        tokens = [processor.tokenizer.decode([token]) for token in rollout.token_ids.tolist()]
        results.append((tokens, *policies, divergence.tolist()))
    return results


@torch.no_grad()
def _gather(logits: Tensor, groups: ProcessGroupCollection) -> Tensor:
    shards = [torch.empty_like(logits) for _ in range(groups.tp.size())]
    dist.all_gather(shards, logits.detach(), group=groups.tp)
    return torch.cat(shards, dim=-1)


def _policy(logits: Tensor, tokens: Tensor, processor: Processor) -> PolicyTrace:
    log_probs = torch.log_softmax(logits, dim=-1)
    sampled = log_probs.gather(-1, tokens.to(logits.device)[:, None]).squeeze(-1).tolist()
    values, indices = log_probs.exp().topk(NUM_TOP, dim=-1)
    top = [
        [(processor.tokenizer.decode([i]), p) for i, p in zip(row_ids, row_values, strict=True)]
        for row_ids, row_values in zip(indices.tolist(), values.tolist(), strict=True)
    ]
    return PolicyTrace(sampled, top)
