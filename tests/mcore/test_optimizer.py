"""The learning rate as a function of the step."""

import math

import pytest

from nemo_vopd.config import OptimizerConfig
from nemo_vopd.mcore.optimizer import learning_rate


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
