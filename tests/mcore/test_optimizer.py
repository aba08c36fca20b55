"""The learning rate as a function of the step, and which parameters weight decay applies to."""

import math

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from nemo_vopd.config import OptimizerConfig
from nemo_vopd.mcore.optimizer import Optimizer, learning_rate, wrap_ddp
from nemo_vopd.vlm.build import build_vlm
from tests.helpers import tiny_config


def test_warm_up_then_constant():
    options = OptimizerConfig(lr=2.0, warmup_steps=4)
    assert [learning_rate(k, options, 10) for k in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert learning_rate(0, OptimizerConfig(lr=2.0, warmup_steps=0), 10) == 2.0


def test_cosine_falls_from_lr_after_the_warm_up_to_min_lr():
    options = OptimizerConfig(lr=2.0, min_lr=0.5, warmup_steps=4, schedule="cosine")
    rates = [learning_rate(k, options, 24) for k in range(25)]
    assert rates[3] == rates[4] == 2.0
    assert rates[14] == pytest.approx(1.25) and rates[24] == pytest.approx(0.5)
    assert rates[9] == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(99, options, 24) == pytest.approx(0.5), "never rises again"


def test_weight_decay_takes_its_share_of_vectors_too(assets, tmp_path, groups):
    """Also once Megatron's scheduler, which multiplies it by what its parameter groups say, has been asked."""
    student = build_vlm(tiny_config(assets, tmp_path), groups)
    lr, decay = 2**-3, 2**-2
    options = OptimizerConfig(lr=lr, weight_decay=decay)
    optimizer = Optimizer(wrap_ddp(student.chunks, groups), options, groups, bf16=False)
    constant = {"lr_decay_steps": 1, "lr_decay_style": "constant", "wd_incr_steps": 0, "wd_incr_style": "constant"}
    OptimizerParamScheduler(optimizer.megatron, lr, lr, lr, 0, start_wd=decay, end_wd=decay, **constant).step(1)
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    assert {parameter.dim() for parameter in before.values()} >= {1, 2}
    optimizer.zero_grad()
    assert optimizer.step(lr) == (True, 0.0)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - lr * decay), rtol=0, atol=0, msg=name)
