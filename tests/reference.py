"""The naive oracle of whole steps: one process, transformers' own model, plain torch, one sequence at a time.

No Megatron, no batching, no fused loss, no sharding. What training computes must equal this.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from nemo_vopd.batch import Rollout, View
from nemo_vopd.distill.divergence import generalized_jsd
from nemo_vopd.distill.importance import importance_weights
from nemo_vopd.vlm.weights.names import canonical


@dataclass
class ReferenceOptions:
    """The published loss and optimizer."""

    alpha: float = 0.5
    top_k: int | None = 100
    add_tail: bool = True
    temperature: float = 1.0
    max_weight: float | None = 2.0
    rate: float = 0.05
    lr: float = 2e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    warmup_steps: int = 10


@dataclass
class ReferenceResult:
    """What the steps left behind."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    student: dict[str, Tensor] = field(default_factory=dict)
    teacher: dict[str, Tensor] = field(default_factory=dict)
    smallest_gap: float = math.inf
    """Smallest distance between the last logit of a token's support and the first outside of it."""


def response_logits(model: torch.nn.Module, view: View, response: Tensor) -> Tensor:
    """[R, V] float32: logits that predict each token of `response` [R] after the prompt `view`."""
    steps = torch.arange(response.numel())
    positions = torch.cat([view.position_ids, (view.position_ids.max() + 1 + steps).expand(3, -1)], dim=1)
    logits = model(
        input_ids=torch.cat([view.token_ids, response])[None],
        position_ids=positions[:, None],
        pixel_values=view.pixel_values,
        image_grid_thw=view.grid_thw,
    ).logits[0]
    return logits[view.num_tokens - 1 : view.num_tokens - 1 + response.numel()].float()


def run_reference(hf_path: Path, steps: list[list[Rollout]], options: ReferenceOptions) -> ReferenceResult:
    """Take one optimizer step on each list of rollouts, starting from the directory `hf_path`, in float32."""
    student = AutoModelForImageTextToText.from_pretrained(hf_path, dtype=torch.float32)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=0.0, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
    )
    result = ReferenceResult()
    for step, rollouts in enumerate(steps):
        num_tokens = sum(rollout.token_ids.numel() for rollout in rollouts)
        optimizer.zero_grad()
        loss = torch.zeros(())
        for rollout in rollouts:
            tokens = rollout.token_ids
            student_logits = response_logits(student, rollout.sample.student, tokens) / options.temperature
            with torch.no_grad():
                teacher_logits = response_logits(teacher, rollout.sample.teacher, tokens) / options.temperature
            if options.top_k is not None:
                ordered = student_logits.detach().sort(dim=-1, descending=True).values
                gap = (ordered[:, options.top_k - 1] - ordered[:, options.top_k]).min().item()
                result.smallest_gap = min(result.smallest_gap, gap)
            divergence = generalized_jsd(
                student_logits,
                teacher_logits,
                alpha=options.alpha,
                top_k=options.top_k,
                add_tail=options.add_tail,
            )
            log_probs = torch.log_softmax(student_logits, -1).gather(-1, tokens[:, None]).squeeze(-1)
            weights = importance_weights(log_probs, rollout.log_probs, max_weight=options.max_weight)
            loss = loss + (divergence * weights).sum() / num_tokens
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), options.clip_grad)
        if math.isfinite(grad_norm):
            for group in optimizer.param_groups:
                group["lr"] = options.lr * min(1.0, (step + 1) / options.warmup_steps)
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                    slow += options.rate * (fast - slow)
        result.losses.append(loss.item())
        result.grad_norms.append(grad_norm.item())
    result.student = {canonical(name): p.detach() for name, p in student.named_parameters()}
    result.teacher = {canonical(name): p.detach() for name, p in teacher.named_parameters()}
    return result
