"""Engine against trainer."""

import math

import torch

from nemo_vopd.distill.importance import importance_weights, mismatch


def test_mismatch_of_known_log_probs():
    trainer, engine = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.05, -1.5, -3.0])
    torch.testing.assert_close(mismatch(trainer, engine), torch.tensor([0.55, 1.0, 0.5]))
    assert mismatch(torch.empty(0), torch.empty(0)).tolist() == [0, 0, 0]


def test_weights_are_truncated_ratios():
    trainer, engine = torch.tensor([-1.0, -2.0, -1.0]), torch.tensor([-1.0, -1.0, -9.0])
    found = importance_weights(trainer, engine, max_weight=2.0)
    torch.testing.assert_close(found, torch.tensor([1.0, math.exp(-1), 2.0]))
    assert importance_weights(trainer, engine, max_weight=None).tolist() == [1, 1, 1]
    assert not importance_weights(trainer.requires_grad_(), engine, max_weight=2.0).requires_grad
