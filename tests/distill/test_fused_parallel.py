"""The fused loss with the vocabulary split over 2 and 4 ranks equals the clear loss on the whole vocabulary."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from nemo_vopd.distill.divergence import generalized_jsd
from nemo_vopd.distill.fused import LossOptions, Policy, Sampled, fused_linear_jsd
from nemo_vopd.distill.importance import importance_weights
from nemo_vopd.distill.vocabulary import Vocabulary
from tests.distributed import run_distributed

H, V = 12, 64  # 16 rows on each of 4 ranks, so a support of 20 is larger than a shard
SUPPORTS = [(None, True), (5, True), (5, False), (20, True), (20, False), (64, True), (1, True)]
OPTIONS = [
    {"alpha": alpha, "top_k": top_k, "add_tail": add_tail}
    for alpha, (top_k, add_tail) in itertools.product([0.0, 0.5, 0.8, 1.0], SUPPORTS)
    # a full support has no tail to speak of: its clamp dominates and is tested in test_divergence
    if not (top_k == V and add_tail)
]
KINDS = {"plain": 11, "ties": 11, "zero weights": 7, "no tokens": 0}


def problem(kind: str, dtype: torch.dtype):
    num_tokens = KINDS[kind]
    generator = torch.Generator().manual_seed(num_tokens)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype) / 2  # noqa: E731
    student, weight, teacher, teacher_weight = make(num_tokens, H), make(V, H), make(num_tokens, H), make(V, H)
    if kind == "ties":
        # quarters and halves, exact in any order of summation: many equal logits across all shards
        student, weight = (student * 2).round() / 2, (weight * 2).round() / 4
        weight[V // 2 :] = weight[: V // 2]
        student[0] = 0
    token_weights = torch.rand(num_tokens, generator=generator, dtype=dtype)
    if kind == "zero weights":
        token_weights[::2] = 0
    tokens = torch.randint(0, V, (num_tokens,), generator=generator)
    rollout = -5 * torch.rand(num_tokens, generator=generator, dtype=dtype)
    return student, weight, teacher, teacher_weight, token_weights, tokens, rollout


def fused_on_shards(dtype: torch.dtype):
    """Results of this rank for every kind and option: loss, gradients, statistics."""
    rank, size = _join()
    rows = slice(rank * V // size, (rank + 1) * V // size)
    results = []
    for kind, options in itertools.product(KINDS, OPTIONS):
        student, weight, teacher, teacher_weight, token_weights, tokens, rollout = problem(kind, dtype)
        student.requires_grad_()
        shard = weight[rows].clone().requires_grad_()
        loss, stats = fused_linear_jsd(
            Policy(student, shard),
            Policy(teacher, teacher_weight[rows]),
            token_weights,
            LossOptions(**options, temperature=0.9, chunk_tokens=4, max_importance_weight=2.0),
            sampled=Sampled(tokens, rollout),
            vocabulary=Vocabulary(dist.group.WORLD, V),
        )
        loss.backward()
        results.append((loss.detach(), student.grad, shard.grad, vars(stats)))
    return results


def _join():
    import os

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=size)
    return rank, size


def clear_loss(kind, options, dtype):
    student, weight, teacher, teacher_weight, token_weights, tokens, rollout = problem(kind, dtype)
    student.requires_grad_()
    weight.requires_grad_()
    logits = student @ weight.t() / 0.9
    log_probs = torch.log_softmax(logits, -1).gather(-1, tokens[:, None]).squeeze(-1)
    importance = importance_weights(log_probs, rollout, max_weight=2.0)
    per_token = generalized_jsd(logits, teacher @ teacher_weight.t() / 0.9, **options)
    loss = (per_token * importance * token_weights).sum()
    loss.backward()
    return loss.detach(), student.grad, weight.grad, per_token.detach(), log_probs.detach()


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("size", [2, 4])
def test_split_vocabulary_equals_the_clear_loss(size, dtype, tolerance):
    per_rank = run_distributed(fused_on_shards, size, dtype)
    for case, (kind, options) in enumerate(itertools.product(KINDS, OPTIONS)):
        loss, hidden_grad, weight_grad, per_token, log_probs = clear_loss(kind, options, dtype)
        shards = torch.cat([results[case][2] for results in per_rank])
        message = f"{kind} {options}"
        assert abs(shards - weight_grad).max() <= tolerance * max(1, weight_grad.abs().max()), message
        for results in per_rank:
            ours, ours_hidden, _, stats = results[case]
            assert abs(ours - loss) <= tolerance * max(1.0, loss.item()), message
            if len(per_token):
                assert abs(ours_hidden - hidden_grad).max() <= tolerance * max(1, hidden_grad.abs().max()), message
                assert abs(stats["divergence"] - per_token).max() <= tolerance * max(1, per_token.max()), message
                assert abs(stats["log_probs"] - log_probs).max() <= tolerance * 10, message


def test_the_tied_problem_has_ties_at_the_edge_of_the_support():
    student, weight, *_ = problem("ties", torch.float64)
    logits = student @ weight.t()
    edge = logits.topk(5).values[:, -1:]
    assert ((logits >= edge).sum(-1) > 5).sum() >= 3
