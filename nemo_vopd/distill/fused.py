"""The divergence from hidden states: vocabulary-parallel, in chunks of tokens, gradients included.

Equal to `divergence.generalized_jsd` of the two heads' logits, but no [T, V] tensor outlives a chunk, in forward or
backward: each chunk's logits are projected, turned into the gradient in place, multiplied back and freed.

With s = log_softmax(z) and the support I, D depends on z through s_I = z_I - logsumexp(z) only. Hence
dD/dz = scatter(g, I) - sum(g) * softmax(z), where g = dD/ds_I is a [chunk, K] tensor that autograd gives.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_vopd.distill.divergence import close_support, jsd_of_log_probs, top_k_support
from nemo_vopd.distill.importance import importance_weights
from nemo_vopd.distill.products import add_product_, product

_CPU_CHUNK_BYTES = 160 * 2**20
"""Float32 logits of one chunk on a CPU."""
_GPU_CHUNK_TOKENS = 1024
"""Most tokens of a chunk on a GPU. The gradient of the head is read and written once for each: 8 bytes a weight, in the
time of which a Hopper GPU computes the products of some 700 tokens. With fewer it would wait for memory."""


def default_chunk_tokens(rows_of_head: int, device: str) -> int:
    """Rows whose logits exist at one time on a "cpu" or "cuda" device that holds `rows_of_head` rows of the head.

    Two float32 tensors of this size exist at one time, more without a top-k.
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


def fused_linear_jsd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weights: Tensor,
    *,
    alpha: float,
    top_k: int | None,
    add_tail: bool,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    tokens: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    max_importance_weight: float | None = None,
    teacher_mix: float = 0.0,
    weight_grad_into: Tensor | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, TokenStats]:
    """Sum over tokens of token_weights * importance * D(student, teacher).

    Args:
        student_hidden: [T, H]; row t predicts response token t. Gradient flows.
        student_weight: [V / tp, H], this rank's rows of the head. Gradient flows.
        teacher_hidden: [T, H], the same rows under the teacher; no gradient.
        teacher_weight: [V / tp, H]; no gradient.
        token_weights: [T], 0 leaves a token out of value and gradient.
        alpha: weight of the teacher, see `generalized_jsd`.
        top_k: size of the student's support, None for the full vocabulary.
        add_tail: append the remaining mass as one class.
        temperature: logits are divided by it before anything else (the rollout's temperature).
        chunk_tokens: rows whose logits exist at one time; None means `default_chunk_tokens`.
        tp_group: the group the vocabulary is split over; None means one process and the whole vocabulary.
        tokens: [T] int64, the sampled tokens, for log-probs and importance weights.
        rollout_log_probs: [T], the engine's log p of `tokens`.
        max_importance_weight: truncation of the importance weight; None turns it off.
        teacher_mix: the teacher's logits become (1 - teacher_mix) * teacher + teacher_mix * student, without
            gradient (the trust-region teacher, docs/algorithm.md section 6).
        weight_grad_into: [V / tp, H] buffer that the gradient of `student_weight` is added to, chunk by chunk
            (Megatron's `main_grad`); autograd then gets none, and no tensor of the size of the head is made. The
            result must be backpropagated with gradient 1, as Megatron's schedules do.
        vocab_size: real size of the vocabulary; rows of the heads beyond it, which fill the last ranks' shards up,
            take no part. None means that there are none.

    Returns:
        (loss_sum, stats): a scalar in float32 (float64 for float64 input), once differentiable, and `TokenStats`.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: must lie in [0, 1]")
    if vocab_size is None:
        vocab_size = student_weight.size(0) * (tp_group.size() if tp_group is not None else 1)
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k={top_k}: must lie between 1 and the vocabulary size, {vocab_size}")
    dtype = torch.promote_types(student_hidden.dtype, torch.float32)
    if chunk_tokens is None:
        most = default_chunk_tokens(student_weight.size(0), student_weight.device.type)
        num_chunks = max(1, -(-len(token_weights) // most))
        chunk_tokens = max(1, -(-len(token_weights) // num_chunks))  # even chunks: a short last one would be slow
    stats = TokenStats(*(token_weights.new_zeros(len(token_weights), dtype=dtype) for _ in fields(TokenStats)))
    loss_sum = _FusedLinearJSD.apply(
        student_hidden,
        student_weight,
        teacher_hidden.detach(),
        teacher_weight.detach(),
        token_weights,
        _Options(
            alpha,
            top_k,
            add_tail,
            temperature,
            chunk_tokens,
            max_importance_weight,
            teacher_mix,
            _Vocabulary(tp_group, vocab_size),
        ),
        tokens,
        rollout_log_probs,
        stats,
        weight_grad_into,
    )
    return loss_sum, stats  # type: ignore[return-value]


@dataclass(frozen=True)
class _Options:
    alpha: float
    top_k: int | None
    add_tail: bool
    temperature: float
    chunk_tokens: int
    max_importance_weight: float | None
    teacher_mix: float
    vocabulary: _Vocabulary


class _Vocabulary:
    """Reductions over a vocabulary split by rows among the ranks of a tensor-parallel group."""

    def __init__(self, group: dist.ProcessGroup | None, size: int) -> None:
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
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def subtract_max_(self, logits: Tensor) -> Tensor:
        """Take the largest logit of each row off [c, V / tp], in place.

        What follows is then as exact as log_softmax: a logsumexp of its own would round at the size of the logits.
        """
        maximum = logits.amax(dim=-1, keepdim=True)
        if self.group is not None:
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=self.group)
        return logits.sub_(maximum)

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


class _FusedLinearJSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, teacher_hidden, teacher_weight, token_weights, options, tokens, rollout, stats, grad_into
    ):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss_sum = torch.zeros((), dtype=dtype, device=hidden.device)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if want_hidden else None
        grad_weight = grad_into if want_weight else None
        if want_weight and grad_into is None:
            grad_weight = torch.zeros_like(weight, dtype=dtype)
        for start in range(0, hidden.size(0), options.chunk_tokens):
            rows = slice(start, start + options.chunk_tokens)
            chunk_stats = TokenStats(*(getattr(stats, field.name)[rows] for field in fields(stats)))
            loss, gradient = _chunk(
                (hidden[rows], weight),
                (teacher_hidden[rows], teacher_weight),
                token_weights[rows].to(dtype),
                options,
                tokens[rows] if tokens is not None else None,
                rollout[rows] if rollout is not None else None,
                chunk_stats,
                want_hidden or want_weight,
            )
            loss_sum += loss
            if gradient is None:
                continue
            if options.temperature != 1:
                gradient.div_(options.temperature)
            gradient = gradient.to(weight.dtype)
            if grad_hidden is not None:
                # each rank knows its rows of the head only: the gradient of the hidden state is a sum over ranks
                grad_hidden[rows] = options.vocabulary.sum(product(gradient, weight, dtype)).to(hidden.dtype)
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
            return (grad_hidden,) + (None,) * 9
        if grad_hidden is not None:
            grad_hidden = grad_hidden * scale.to(grad_hidden.dtype)
        # not a saved tensor, which autograd would hold on to and copy: the one there is becomes the gradient
        grad_weight, ctx.grad_weight = ctx.grad_weight, None
        if ctx.needs_input_grad[1]:
            if grad_weight is None:
                raise RuntimeError("the gradient of the head was given away by the first backward pass of this loss")
            grad_weight = grad_weight.mul_(scale).to(ctx.weight_dtype)
        return (grad_hidden, grad_weight) + (None,) * 8


def _logits(policy: tuple[Tensor, Tensor], options: _Options, dtype: torch.dtype) -> Tensor:
    """[c, V / tp] logits of (hidden [c, H], weight [V / tp, H]), the largest of each row taken off."""
    hidden, weight = policy
    logits = options.vocabulary.hide_padding_(product(hidden, weight.t(), dtype))
    if options.temperature != 1:
        logits.div_(options.temperature)
    return options.vocabulary.subtract_max_(logits)


def _chunk(
    student_policy: tuple[Tensor, Tensor],
    teacher_policy: tuple[Tensor, Tensor],
    token_weights: Tensor,
    options: _Options,
    tokens: Tensor | None,
    rollout_log_probs: Tensor | None,
    stats: TokenStats,
    want_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Loss sum of one chunk and its gradient with respect to the student's logits; fills `stats` in place.

    The policies are (hidden [c, H], weight [V / tp, H]). Two tensors of the size of the logits exist at one time.
    """
    vocabulary, dtype = options.vocabulary, token_weights.dtype
    logits = _logits(student_policy, options, dtype)
    softmax = logits.exp()
    total = vocabulary.sum(softmax.sum(-1, keepdim=True))
    log_z = total.log()
    softmax.div_(total)
    stats.entropy.copy_(log_z.squeeze(-1) - vocabulary.sum(torch.linalg.vecdot(softmax, logits)))
    if tokens is not None:
        log_probs = vocabulary.gather(logits, tokens[:, None]) - log_z
        stats.log_probs.copy_(log_probs.squeeze(-1))
    limit = options.max_importance_weight if rollout_log_probs is not None else None
    stats.importance.copy_(importance_weights(stats.log_probs, rollout_log_probs, max_weight=limit))  # type: ignore[arg-type]

    if options.top_k is None:
        support, student = None, logits - log_z
        stats.student_topk_mass.fill_(1.0)
    else:
        values, support = vocabulary.top_k(logits, options.top_k)
        student = values - log_z
        stats.student_topk_mass.copy_(student.exp().sum(-1))
    if not options.teacher_mix:
        del logits
    teacher_logits = _logits(teacher_policy, options, dtype)
    if options.teacher_mix:  # a constant taken off a row of either changes no probability
        teacher_logits = vocabulary.subtract_max_(teacher_logits.lerp_(logits, options.teacher_mix))
    teacher = teacher_logits.clone() if support is None else vocabulary.gather(teacher_logits, support)
    teacher -= vocabulary.sum(teacher_logits.exp_().sum(-1, keepdim=True)).log()
    del teacher_logits
    stats.teacher_topk_mass.copy_(vocabulary.sum(teacher.exp().sum(-1)) if support is None else teacher.exp().sum(-1))

    with torch.enable_grad():
        student.requires_grad_()
        if support is None:
            per_token = jsd_of_log_probs(student, teacher, options.alpha)
        else:
            closed = close_support(student, options.add_tail), close_support(teacher, options.add_tail)
            per_token = jsd_of_log_probs(*closed, options.alpha)
        weights = token_weights * stats.importance
        # where, not a product alone: a token that is masked out must not pass on a non-finite value
        weighted = torch.where(weights != 0, per_token * weights, torch.zeros_like(per_token))
        (slope,) = torch.autograd.grad(weighted.sum(), student) if want_gradient else (None,)
    divergence = per_token.detach()
    loss = weighted.detach().sum()
    if support is None:  # every rank holds the classes of its own rows
        divergence, loss = vocabulary.sum(divergence.clone()), vocabulary.sum(loss.clone())
    stats.divergence.copy_(divergence)

    if slope is None:
        return loss, None
    through_log_z = slope.sum(-1, keepdim=True)
    if support is None:
        gradient = slope.sub_(vocabulary.sum(through_log_z) * softmax)
    else:
        gradient = softmax.mul_(-through_log_z)
        vocabulary.scatter_add_(gradient, support, slope)
    gradient.masked_fill_((weights == 0)[:, None], 0.0)  # not a product: 0 times what is not finite is not 0
    return loss, gradient
