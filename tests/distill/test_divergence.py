"""The clear loss against float64 results of the authors' implementation, and against its own properties."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_vopd.distill.divergence import generalized_jsd
from nemo_vopd.distill.importance import importance_weights

CASES = np.load(Path(__file__).parent / "divergence_cases.npz")
NAMES = sorted({key.split("/")[0] for key in CASES.files})


@pytest.mark.parametrize("name", NAMES)
def test_published_cases(name):
    case = {key.split("/")[1]: CASES[key] for key in CASES.files if key.startswith(name + "/")}
    student = torch.tensor(case["student_logits"], requires_grad=True)
    teacher = torch.tensor(case["teacher_logits"], requires_grad=True)
    top_k, max_weight = int(case["top_k"]) or None, float(case["max_weight"]) or None
    divergence = generalized_jsd(
        student, teacher, alpha=float(case["alpha"]), top_k=top_k, add_tail=bool(case["add_tail"])
    )
    tokens = torch.tensor(case["tokens"])
    log_probs = torch.log_softmax(student, -1).gather(-1, tokens[:, None]).squeeze(-1)
    weights = importance_weights(log_probs, torch.tensor(case["behaviour_log_probs"]), max_weight=max_weight)
    mask = torch.tensor(case["mask"]).double()
    per_token = divergence * weights
    loss = (per_token * mask).sum() / mask.sum()
    loss.backward()
    np.testing.assert_allclose(per_token.detach(), case["per_token"], atol=1e-9, rtol=1e-9)
    np.testing.assert_allclose(loss.item(), case["mean_loss"], atol=1e-9, rtol=1e-9)
    np.testing.assert_allclose(student.grad, case["grad_student_logits"], atol=1e-9, rtol=1e-9)
    assert teacher.grad is None


def test_reference_file_holds_cases():
    assert len(NAMES) >= 5


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("top_k,add_tail", [(None, True), (7, True), (7, False), (40, True)])
def test_zero_for_equal_and_bounded(alpha, top_k, add_tail):
    torch.manual_seed(0)
    logits, other = torch.randn(2, 9, 40, dtype=torch.float64) * 3
    options = {"alpha": alpha, "top_k": top_k, "add_tail": add_tail}
    assert generalized_jsd(logits, logits, **options).abs().max() < 1e-12
    value = generalized_jsd(logits, other, **options)
    assert value.dtype == torch.float64 and (value > 0).all()
    if alpha == 0.5:
        assert (value <= math.log(2)).all()


def test_gradient_matches_finite_differences():
    torch.manual_seed(1)
    student = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 12, dtype=torch.float64)
    torch.autograd.gradcheck(lambda z: generalized_jsd(z, teacher, alpha=0.5, top_k=5, add_tail=True), student)


def test_extreme_logits_stay_finite():
    student = torch.tensor([[200.0, 0.0, -200.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-200.0, 0.0, 200.0, 0.0]])
    for top_k in (None, 2):
        for alpha in (0.0, 0.5, 1.0):
            value = generalized_jsd(student, teacher, alpha=alpha, top_k=top_k, add_tail=True)
            value.sum().backward()
            assert value.isfinite().all() and student.grad.isfinite().all()


def test_refusals():
    logits = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="top_k=5"):
        generalized_jsd(logits, logits, alpha=0.5, top_k=5, add_tail=True)
    with pytest.raises(ValueError, match="alpha=2"):
        generalized_jsd(logits, logits, alpha=2, top_k=2, add_tail=True)


def test_importance_weights_truncate():
    log_probs = torch.tensor([0.0, -1.0, -50.0], requires_grad=True)
    rollout = torch.tensor([-3.0, -1.0, 0.0])
    weights = importance_weights(log_probs, rollout, max_weight=2.0)
    assert weights.tolist() == pytest.approx([2.0, 1.0, math.exp(-20)]) and not weights.requires_grad
    assert importance_weights(log_probs, rollout, max_weight=None).tolist() == [1, 1, 1]


def test_classes_that_neither_side_can_draw_add_nothing():
    logits = torch.tensor([[0.3, -1.0, 0.5, float("-inf")]], dtype=torch.float64)
    other = torch.tensor([[-0.2, 1.0, 0.1, float("-inf")]], dtype=torch.float64)
    for alpha in (0.0, 0.5, 1.0):
        options = {"alpha": alpha, "top_k": None, "add_tail": True}
        value = generalized_jsd(logits, other, **options)
        torch.testing.assert_close(value, generalized_jsd(logits[:, :3], other[:, :3], **options))
