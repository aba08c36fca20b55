"""The fused loss against the clear one: values, gradients, statistics (one process; layouts in test_fused_parallel)."""

import itertools

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_vopd.distill.divergence import generalized_jsd
from nemo_vopd.distill.fused import LossOptions, Policy, Sampled, fused_linear_jsd
from nemo_vopd.distill.importance import importance_weights
from nemo_vopd.distill.vocabulary import Vocabulary

OPTIONS = [
    {"alpha": alpha, "top_k": top_k, "add_tail": add_tail}
    for alpha, (top_k, add_tail) in itertools.product(
        [0.0, 0.5, 0.7, 1.0], [(None, True), (10, True), (10, False), (50, True), (1, True)]
    )
]


def problem(dtype, num_tokens=13, hidden=16, vocabulary=50, seed=0):
    torch.manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
    student, weight = make(num_tokens, hidden).requires_grad_(), (make(vocabulary, hidden) / 2).requires_grad_()
    tokens = torch.randint(0, vocabulary, (num_tokens,))
    token_weights = torch.rand(num_tokens, dtype=dtype)
    token_weights[::4] = 0
    rollout = -torch.rand(num_tokens, dtype=dtype) * 5
    return student, weight, make(num_tokens, hidden), make(vocabulary, hidden) / 2, token_weights, tokens, rollout


def run(student, weight, teacher, teacher_weight, token_weights, **options):
    """The loss, its options and its other arguments all by name."""
    others = {k: options.pop(k) for k in ("sampled", "vocabulary", "weight_grad_into") if k in options}
    policies = Policy(student, weight), Policy(teacher, teacher_weight)
    return fused_linear_jsd(*policies, token_weights, LossOptions(**options), **others)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk_tokens", [5, 100])
def test_equals_the_clear_loss(options, dtype, tolerance, chunk_tokens):
    student, weight, teacher, teacher_weight, token_weights, tokens, rollout = problem(dtype)
    temperature = 1.3
    loss, stats = fused_linear_jsd(
        Policy(student, weight),
        Policy(teacher, teacher_weight),
        token_weights,
        LossOptions(**options, temperature=temperature, chunk_tokens=chunk_tokens, max_importance_weight=2.0),
        sampled=Sampled(tokens, rollout),
    )
    (loss * 3).backward()
    gradients = student.grad.clone(), weight.grad.clone()
    student.grad = weight.grad = None

    logits = student @ weight.t() / temperature
    log_probs = torch.log_softmax(logits, -1)
    sampled = log_probs.gather(-1, tokens[:, None]).squeeze(-1)
    per_token = generalized_jsd(logits, teacher @ teacher_weight.t() / temperature, **options)
    importance = importance_weights(sampled, rollout, max_weight=2.0)
    expected = (per_token * importance * token_weights).sum()
    (expected * 3).backward()

    scale = max(1.0, expected.abs().item())
    assert abs(loss.item() - expected.item()) < tolerance * scale
    for ours, dense in zip(gradients, (student.grad, weight.grad), strict=True):
        torch.testing.assert_close(ours, dense, atol=tolerance * max(1.0, dense.abs().max().item()), rtol=0)
    torch.testing.assert_close(stats.log_probs, sampled.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.divergence, per_token.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(stats.importance, importance, atol=1e-5, rtol=1e-5)
    entropy = -(log_probs.exp() * log_probs).sum(-1).detach()
    torch.testing.assert_close(stats.entropy, entropy, atol=1e-5, rtol=1e-4)


def test_no_tokens_and_masked_tokens():
    student, weight, teacher, teacher_weight, token_weights, *_ = problem(torch.float32)
    options = {"alpha": 0.5, "top_k": 10, "add_tail": True}
    loss, stats = run(student[:0], weight, teacher[:0], teacher_weight, token_weights[:0], **options)
    loss.backward()
    assert loss == 0 and stats.divergence.numel() == 0 and not weight.grad.any()
    bad = teacher.clone()
    bad[0] = float("nan")
    weights = torch.ones_like(token_weights)
    weights[0] = 0
    loss, _ = run(student, weight, bad, teacher_weight, weights, **options)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and not student.grad[0].any()


def test_refuses_a_support_larger_than_the_vocabulary():
    student, weight, teacher, teacher_weight, token_weights, *_ = problem(torch.float32)
    with pytest.raises(ValueError, match="top_k=51"):
        run(student, weight, teacher, teacher_weight, token_weights, alpha=0.5, top_k=51, add_tail=True)


def test_gradient_of_the_head_goes_into_a_given_buffer():
    student, weight, teacher, teacher_weight, token_weights, *_ = problem(torch.float64)
    options = {"alpha": 0.5, "top_k": 10, "add_tail": True, "chunk_tokens": 4}
    run(student, weight, teacher, teacher_weight, token_weights, **options)[0].backward()
    expected, expected_hidden = weight.grad.clone(), student.grad.clone()
    weight.grad = student.grad = None
    buffer = torch.ones_like(weight)
    loss, _ = run(student, weight, teacher, teacher_weight, token_weights, **options, weight_grad_into=buffer)
    loss.backward()
    assert weight.grad is None
    torch.testing.assert_close(buffer - 1, expected, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(student.grad, expected_hidden)
    loss, _ = run(student, weight, teacher, teacher_weight, token_weights, **options, weight_grad_into=buffer)
    with pytest.raises(RuntimeError):
        (2 * loss).backward()


class Alive(TorchDispatchMode):
    """The most tensors of `num_bytes` that were alive at one time, of those that operations made."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self.num_bytes, self.most, self.storages = num_bytes, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = (
            {s._cdata: s for s in (x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor))}
            for tree in ((args, kwargs), result)
        )
        for key in made.keys() - given.keys():
            if made[key].nbytes() == self.num_bytes:
                self.storages[key] = StorageWeakRef(made[key])
        del given, made
        self.storages = {key: ref for key, ref in self.storages.items() if not ref.expired()}
        self.most = max(self.most, len(self.storages))
        return result


def test_one_gradient_of_the_head_exists_at_one_time():
    """And it is given away: a second backward pass is refused."""
    student, weight, teacher, teacher_weight, token_weights, *_ = problem(torch.float64, hidden=32, vocabulary=80)
    options = {"alpha": 0.5, "top_k": 10, "add_tail": True, "chunk_tokens": 4}
    with Alive(weight.numel() * weight.element_size()) as alive:
        loss, _ = run(student, weight, teacher, teacher_weight, token_weights, **options)
        (3 * loss).backward(retain_graph=True)
    assert alive.most == 1
    before = weight.grad.clone()
    with pytest.raises(RuntimeError, match="given away by the first backward pass"):
        loss.backward()
    assert torch.equal(weight.grad, before)


def test_trust_region_teacher_is_a_mixture_of_logits():
    student, weight, teacher, teacher_weight, token_weights, *_ = problem(torch.float64)
    options = {"alpha": 0.5, "top_k": 10, "add_tail": True}
    loss, _ = run(student, weight, teacher, teacher_weight, token_weights, **options, temperature=1.3, teacher_mix=0.25)
    logits, teacher_logits = student @ weight.t() / 1.3, teacher @ teacher_weight.t() / 1.3
    mixed = 0.75 * teacher_logits + 0.25 * logits.detach()
    expected = (generalized_jsd(logits, mixed, **options) * token_weights).sum()
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-9)
    (ours,) = torch.autograd.grad(loss, student)
    (dense,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(ours, dense, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("num_padding", [3, 60])
def test_rows_of_no_token_take_no_part(options, num_padding):
    """Heads with more rows than the vocabulary, as shards that must be equal have; their content is arbitrary."""
    student, weight, teacher, teacher_weight, token_weights, tokens, rollout = problem(torch.float64)
    arguments = {**options, "sampled": Sampled(tokens, rollout), "max_importance_weight": 2.0, "teacher_mix": 0.2}
    loss, stats = run(student, weight, teacher, teacher_weight, token_weights, **arguments)
    expected = [loss.detach(), *torch.autograd.grad(loss, (student, weight))]
    padding = torch.full((num_padding, weight.size(1)), 9.0, dtype=weight.dtype)
    padded, padded_teacher = (
        torch.cat([weight.detach(), padding]).requires_grad_(),
        torch.cat([teacher_weight, padding]),
    )
    loss, padded_stats = run(
        student, padded, teacher, padded_teacher, token_weights, **arguments, vocabulary=Vocabulary(None, len(weight))
    )
    hidden_grad, weight_grad = torch.autograd.grad(loss, (student, padded))
    assert not weight_grad[len(weight) :].any()
    for value, reference in zip([loss.detach(), hidden_grad, weight_grad[: len(weight)]], expected, strict=True):
        torch.testing.assert_close(value, reference, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(padded_stats.sums(), stats.sums(), atol=1e-9, rtol=1e-6)
