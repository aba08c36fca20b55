"""Responses token by token: the probabilities that student and teacher gave each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_vopd.batch import MicroBatch, Rollout, View, blank_rollout, collate
from nemo_vopd.config import DistillConfig
from nemo_vopd.data.processor import Processor
from nemo_vopd.distill.divergence import generalized_jsd
from nemo_vopd.distill.products import product
from nemo_vopd.mcore import cpu, parallel
from nemo_vopd.mcore.fp8 import token_multiple
from nemo_vopd.mcore.pipeline_passes import teacher_pass
from nemo_vopd.mcore.stage import Stage

NUM_TOP = 5
MAX_TOKENS = 256
"""A page shows no longer response well."""
_CHUNK = 32
"""Tokens whose logits exist at one time on a rank: 20 MB in float32 for a vocabulary of 150,000."""


@dataclass
class PolicyTrace:
    """One policy over the T tokens of a response."""

    log_probs: list[float]
    """[T] log p of the sampled tokens in nats."""
    top: list[list[tuple[str, float]]]
    """[T] the most probable tokens and their probabilities."""


@dataclass
class ResponseTrace:
    """One response of T tokens and what both policies gave each of them."""

    tokens: list[str]
    student: PolicyTrace
    teacher: PolicyTrace
    divergence: list[float]
    """[T] generalised Jensen-Shannon divergence in nats."""


@torch.no_grad()
def trace(
    rollouts: list[Rollout],
    student: Stage,
    teacher: Stage,
    processor: Processor,
    distill: DistillConfig,
    temperature: float,
    groups: ProcessGroupCollection,
) -> list[ResponseTrace]:
    """The trace of each rollout, on every rank of the model-parallel group; all of them take part.

    Responses are cut to MAX_TOKENS. Both policies are those at the sampling `temperature`, as in the loss.
    """
    cut = [Rollout(r.sample, r.token_ids[:MAX_TOKENS], r.log_probs[:MAX_TOKENS], r.index) for r in rollouts]
    hidden = []
    for model, views in ((student, [r.sample.student for r in cut]), (teacher, [r.sample.teacher for r in cut])):
        hidden.append(teacher_pass(model, _batches(cut, views, model, processor, groups), groups))
    result: list = [None]
    if parallel.is_last_stage(groups):
        heads = student.output_weight(), teacher.output_weight()
        options = {"alpha": distill.alpha, "top_k": distill.top_k, "add_tail": distill.add_tail}
        result[0] = []
        for rollout, *rows in zip(cut, *hidden, strict=False):  # the schedule's padding comes last
            policies, divergence = (PolicyTrace([], []), PolicyTrace([], [])), []
            for start in range(0, len(rollout.token_ids), _CHUNK):
                piece = slice(start, start + _CHUNK)
                logits = [
                    _logits(of_policy[piece], head, groups)[:, : student.vocab_size] / temperature
                    for of_policy, head in zip(rows, heads, strict=True)
                ]
                for policy, numbers in zip(policies, logits, strict=True):
                    _extend(policy, numbers, rollout.token_ids[piece], processor)
                divergence += generalized_jsd(*logits, **options).tolist()
            words = [processor.tokenizer.decode([token]) for token in rollout.token_ids.tolist()]
            result[0].append(ResponseTrace(words, *policies, divergence))
    if groups.pp.size() > 1:
        dist.broadcast_object_list(result, src=dist.get_process_group_ranks(groups.pp)[-1], group=groups.pp)
    return result[0]


def _batches(
    rollouts: list[Rollout], views: list[View], model: Stage, processor: Processor, groups: ProcessGroupCollection
) -> list[MicroBatch]:
    """A microbatch for each rollout; the interleaved schedule takes whole rounds of the pipeline."""
    pad, multiple = processor.pad_token_id, token_multiple(model.config)
    batches = [collate([r], [view], pad, multiple) for r, view in zip(rollouts, views, strict=True)]
    if len(model.chunks) > 1:
        blank = blank_rollout(pad)
        rest = -len(batches) % groups.pp.size()
        batches += [collate([blank], [blank.sample.student], pad, multiple) for _ in range(rest)]
    return [batch.to(cpu.device()) for batch in batches]


def _logits(hidden: Tensor, head: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """[T, V] of hidden states [T, H], from the part of the head that each tensor-parallel rank holds."""
    shard = product(hidden, head.t(), torch.float32)
    shards = [torch.empty_like(shard) for _ in range(groups.tp.size())]
    dist.all_gather(shards, shard, group=groups.tp)
    return torch.cat(shards, dim=-1)


def _extend(policy: PolicyTrace, logits: Tensor, tokens: Tensor, processor: Processor) -> None:
    """Append what `logits` [T, V] give the sampled `tokens` [T], and the most probable ones."""
    log_probs = torch.log_softmax(logits, dim=-1)
    policy.log_probs += log_probs.gather(-1, tokens.to(logits.device)[:, None]).squeeze(-1).tolist()
    values, indices = log_probs.topk(NUM_TOP, dim=-1)
    policy.top += [
        [(processor.tokenizer.decode([i]), p) for i, p in zip(row_ids, row_values, strict=True)]
        for row_ids, row_values in zip(indices.tolist(), values.exp().tolist(), strict=True)
    ]
