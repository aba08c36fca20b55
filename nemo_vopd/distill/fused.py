"""The divergence from hidden states: vocabulary-parallel, in chunks of tokens, gradients included.

Equal to `divergence.generalized_jsd` of the two heads' logits, but no [T, V] tensor outlives a chunk, in forward or
backward: each chunk's logits are projected, turned into the gradient in place, multiplied back and freed.

With s = log_softmax(z) and the support I, D depends on z through s_I = z_I - logsumexp(z) only. Hence
dD/dz = scatter(g, I) - sum(g) * softmax(z), where g = dD/ds_I is a [chunk, K] tensor that autograd gives. Over the
full vocabulary g is written out (`logit_passes.divergence_sums`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_vopd.config import DistillConfig
from nemo_vopd.distill.divergence import close_support, jsd_of_log_probs
from nemo_vopd.distill.importance import importance_weights
from nemo_vopd.distill.logit_passes import divergence_gradient_, divergence_sums, normalise, softmax_times_
from nemo_vopd.distill.products import add_product_, product
from nemo_vopd.distill.vocabulary import Vocabulary

_CPU_CHUNK_BYTES = 160 * 2**20
"""Float32 logits of one chunk on a CPU."""
_GPU_CHUNK_TOKENS = 1024
"""Most tokens of a chunk on a GPU. The gradient of the head is read and written once for each: 8 bytes a weight, in the
time of which a Hopper GPU computes the products of some 700 tokens. With fewer it would wait for memory."""


def default_chunk_tokens(rows_of_head: int, device: str) -> int:
    """Rows whose logits exist at one time on a "cpu" or "cuda" device that holds `rows_of_head` rows of the head.

    Two float32 tensors of this size exist at one time.
    """
    return _GPU_CHUNK_TOKENS if device == "cuda" else max(1, _CPU_CHUNK_BYTES // (4 * rows_of_head))


@dataclass
class TokenStats:
    """What the loss saw at each response token, all [T] and detached."""

    divergence: Tensor
    """D of each token in nats, before any weight."""
    log_probs: Tensor
    """Student log p of the sampled token (zeros when no tokens were given)."""
    importance: Tensor
    """The truncated importance weight that multiplied the token."""
    entropy: Tensor
    """Entropy of the student's distribution in nats."""
    student_topk_mass: Tensor
    """Student probability of its own top-k support."""
    teacher_topk_mass: Tensor
    """Teacher probability of the student's top-k support."""

    def sums(self) -> Tensor:
        """[6] float32: the sum of each field over the tokens, in the order of the fields."""
        return torch.stack([getattr(self, field.name).float().sum() for field in fields(self)])


@dataclass(frozen=True)
class LossOptions:
    """What the loss computes, and in which pieces."""

    alpha: float
    """Weight of the teacher in the divergence, see `generalized_jsd`."""
    top_k: int | None
    """Size of the student's support; None means the full vocabulary."""
    add_tail: bool
    """Whether the mass outside the support is a class of its own."""
    temperature: float = 1.0
    """Temperature of the rollout, which divides the logits before anything else."""
    max_importance_weight: float | None = None
    """Upper bound of the importance weights; None turns them off."""
    teacher_mix: float = 0.0
    """Share of the student's logits, without gradient, in the teacher's (trust region, docs/algorithm.md section 6)."""
    chunk_tokens: int | None = None
    """Number of tokens whose logits exist at one time; None means `default_chunk_tokens`."""

    @classmethod
    def of(cls, distill: DistillConfig, temperature: float) -> LossOptions:
        """The loss of a run that samples at `temperature`."""
        mix = distill.teacher.mix if distill.teacher.kind == "trust_region" else 0.0
        limit, chunk = distill.importance.max_weight, distill.chunk_tokens
        return cls(distill.alpha, distill.top_k, distill.add_tail, temperature, limit, mix, chunk)


class Policy(NamedTuple):
    """The distribution over the next token at T positions, as what it is computed from."""

    hidden: Tensor
    """[T, H] final hidden states; row t predicts response token t."""
    weight: Tensor
    """[V / tp, H]: this rank's rows of the head."""


class Sampled(NamedTuple):
    """The response tokens, as the rollout engine drew them."""

    tokens: Tensor
    """[T] int64."""
    log_probs: Tensor
    """[T] log p of `tokens` under the engine."""


def fused_linear_jsd(
    student: Policy,
    teacher: Policy,
    token_weights: Tensor,
    options: LossOptions,
    *,
    sampled: Sampled | None = None,
    vocabulary: Vocabulary | None = None,
    weight_grad_into: Tensor | None = None,
) -> tuple[Tensor, TokenStats]:
    """Sum over tokens of token_weights * importance * D(student, teacher).

    Args:
        student: gradients flow into both of its tensors.
        teacher: no gradient.
        token_weights: [T], 0 leaves a token out of value and gradient.
        options: divergence, support, temperature and chunks.
        sampled: the tokens to report log-probs and compute importance weights of.
        vocabulary: how the rows of the heads are split; the default is one process with all of them.
        weight_grad_into: [V / tp, H] buffer that the gradient of the student's head is added to, chunk by chunk
            (Megatron's `main_grad`); autograd then gets none, and no tensor of the size of the head is made. The
            result must be backpropagated with gradient 1, as Megatron's schedules do.

    Returns:
        (loss_sum, stats): a scalar in float32 (float64 for float64 input), once differentiable, and `TokenStats`.
    """
    if not 0 <= options.alpha <= 1:
        raise ValueError(f"alpha={options.alpha}: must lie in [0, 1]")
    vocabulary = vocabulary or Vocabulary(None, student.weight.size(0))
    if options.top_k is not None and not 1 <= options.top_k <= vocabulary.size:
        raise ValueError(f"top_k={options.top_k}: must lie between 1 and the vocabulary size, {vocabulary.size}")
    if options.chunk_tokens is None:
        num_tokens = len(token_weights)
        most = default_chunk_tokens(student.weight.size(0), student.weight.device.type)
        num_chunks = max(1, -(-num_tokens // most))  # even chunks: a short last one would be slow
        options = replace(options, chunk_tokens=max(1, -(-num_tokens // num_chunks)))
    dtype = torch.promote_types(student.hidden.dtype, torch.float32)
    stats = TokenStats(*(token_weights.new_zeros(len(token_weights), dtype=dtype) for _ in fields(TokenStats)))
    teacher = Policy(*(tensor.detach() for tensor in teacher))
    arguments = teacher, token_weights, options, sampled, vocabulary, stats, weight_grad_into
    return _FusedLinearJSD.apply(*student, *arguments), stats  # type: ignore[return-value]


class _FusedLinearJSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher, token_weights, options, sampled, vocabulary, stats, grad_into):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss_sum = torch.zeros((), dtype=dtype, device=hidden.device)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if want_hidden else None
        grad_weight = grad_into if want_weight else None
        if want_weight and grad_into is None:
            grad_weight = torch.zeros_like(weight, dtype=dtype)
        for start in range(0, hidden.size(0), options.chunk_tokens):
            rows = slice(start, start + options.chunk_tokens)
            loss, gradient = _chunk(
                Policy(hidden[rows], weight),
                Policy(teacher.hidden[rows], teacher.weight),
                token_weights[rows].to(dtype),
                options,
                None if sampled is None else Sampled(sampled.tokens[rows], sampled.log_probs[rows]),
                vocabulary,
                TokenStats(*(getattr(stats, field.name)[rows] for field in fields(stats))),
                want_gradient=want_hidden or want_weight,
            )
            loss_sum += loss
            if gradient is None:
                continue
            if options.temperature != 1:
                gradient.div_(options.temperature)
            gradient = gradient.to(weight.dtype)
            if grad_hidden is not None:
                # each rank knows its rows of the head only: the gradient of the hidden state is a sum over ranks
                grad_hidden[rows] = vocabulary.sum(product(gradient, weight, dtype)).to(hidden.dtype)
            if grad_weight is not None:
                add_product_(grad_weight, gradient.t(), hidden[rows])
            del gradient  # before the next chunk's logits are made
        ctx.save_for_backward(grad_hidden)
        ctx.grad_weight = None if grad_weight is grad_into else grad_weight
        ctx.weight_dtype, ctx.unit_gradient = weight.dtype, grad_into is not None
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        (grad_hidden,) = ctx.saved_tensors
        scale = grad_outputs[0]
        if ctx.unit_gradient:
            torch._assert_async(scale == 1)
            return (grad_hidden,) + (None,) * 8
        if grad_hidden is not None:
            grad_hidden = grad_hidden * scale.to(grad_hidden.dtype)
        # not a saved tensor, which autograd would hold on to and copy: the one there is becomes the gradient
        grad_weight, ctx.grad_weight = ctx.grad_weight, None
        if ctx.needs_input_grad[1]:
            if grad_weight is None:
                raise RuntimeError("the gradient of the head was given away by the first backward pass of this loss")
            grad_weight = grad_weight.mul_(scale).to(ctx.weight_dtype)
        return (grad_hidden, grad_weight) + (None,) * 7


def _logits(policy: Policy, temperature: float, vocabulary: Vocabulary, dtype: torch.dtype) -> Tensor:
    """[c, V / tp] logits of c tokens."""
    logits = vocabulary.hide_padding_(product(policy.hidden, policy.weight.t(), dtype))
    return logits.div_(temperature) if temperature != 1 else logits


def _chunk(
    student_policy: Policy,
    teacher_policy: Policy,
    token_weights: Tensor,
    options: LossOptions,
    sampled: Sampled | None,
    vocabulary: Vocabulary,
    stats: TokenStats,
    *,
    want_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Loss sum of c tokens and its gradient with respect to the student's logits [c, V / tp]; fills `stats` in place.

    Two tensors of the size of the logits exist at one time.
    """
    dtype = token_weights.dtype
    logits = _logits(student_policy, options.temperature, vocabulary, dtype)
    of_student, entropy = normalise(logits, vocabulary)
    stats.entropy.copy_(entropy)
    stats.importance.fill_(1.0)
    if sampled is not None:
        stats.log_probs.copy_(of_student.log_probs(vocabulary.gather(logits, sampled.tokens[:, None])).squeeze(-1))
        limit = options.max_importance_weight
        stats.importance.copy_(importance_weights(stats.log_probs, sampled.log_probs, max_weight=limit))
    weights = token_weights * stats.importance
    if options.top_k is not None:  # before the teacher's logits are there: torch.topk takes more memory than they
        values, support = vocabulary.top_k(logits, options.top_k)

    teacher_logits = _logits(teacher_policy, options.temperature, vocabulary, dtype)
    if options.teacher_mix:
        teacher_logits.lerp_(logits, options.teacher_mix)
    of_teacher, _ = normalise(teacher_logits, vocabulary)
    if options.top_k is None:
        both = logits, of_student, teacher_logits, of_teacher, options.alpha
        divergence, slope_sum = divergence_sums(*both)
        stats.divergence.copy_(vocabulary.sum(divergence))
        stats.student_topk_mass.fill_(1.0)
        stats.teacher_topk_mass.fill_(1.0)
        loss = torch.where(weights != 0, stats.divergence * weights, 0.0).sum()
        return loss, divergence_gradient_(*both, vocabulary.sum(slope_sum), weights) if want_gradient else None

    student, teacher = of_student.log_probs(values), of_teacher.log_probs(vocabulary.gather(teacher_logits, support))
    del teacher_logits
    stats.student_topk_mass.copy_(student.exp().sum(-1))
    stats.teacher_topk_mass.copy_(teacher.exp().sum(-1))
    with torch.enable_grad():
        student.requires_grad_()
        closed = close_support(student, options.add_tail), close_support(teacher, options.add_tail)
        per_token = jsd_of_log_probs(*closed, options.alpha)
        # where, not a product alone: a token that is masked out must not pass on a non-finite value
        weighted = torch.where(weights != 0, per_token * weights, 0.0)
        (slope,) = torch.autograd.grad(weighted.sum(), student) if want_gradient else (None,)
    stats.divergence.copy_(per_token.detach())
    loss = weighted.detach().sum()
    if slope is None:
        return loss, None
    slope.masked_fill_((weights == 0)[:, None], 0.0)  # not a product: 0 times what is not finite is not 0
    gradient = softmax_times_(logits, of_student, -slope.sum(-1))
    vocabulary.scatter_add_(gradient, support, slope)
    return loss, gradient
