"""Transformer Engine on a simulated GPU (`tests/simulated_te.py`): layouts, gradients, FP8, its state in checkpoints.

Skipped where Transformer Engine is not installed, as on CI. Bounds of FP8 as in tests/gpu.
"""

from __future__ import annotations

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE

from tests.distributed import run_distributed
from tests.gpu.test_gpu import BF16, FP8, RECIPES, check_scaling, hidden_states, scaling_after
from tests.helpers import read_lines, tiny_config
from tests.runtime.test_resume import configure, numbers, same, train_until
from tests.test_step import EPS, LAYOUTS, LR, STEPS, check, oracle, train_and_collect  # noqa: F401

pytestmark = [
    pytest.mark.skipif(not HAVE_TE, reason="Transformer Engine is not installed (NGC images have it)"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is better: pytest -m gpu tests/gpu"),
]


def on_te(function, *args):
    """`function(*args)` in a process with Transformer Engine on a simulated GPU."""
    from tests import simulated_te

    simulated_te.activate()
    return function(*args)


def run(assets, folder, rollouts, world_size, *overrides):
    options = [f"trainer.max_steps={STEPS}", f"optimizer.lr={LR}", f"optimizer.eps={EPS}"]
    config = tiny_config(assets, folder, "rollout=replay", f"rollout.path={rollouts}", *options, *overrides)
    per_rank = run_distributed(on_te, world_size, train_and_collect, config)
    return read_lines(folder / "metrics.jsonl"), per_rank


@pytest.mark.parametrize("name", ["111 small", "111 recompute", "221 sequence small", "122 small"])
def test_steps_equal_the_oracle(name, oracle, assets, tmp_path):  # noqa: F811
    """In float32: projections with their norms, gradients added to DDP's buffer, FusedAdam."""
    rollouts, expected = oracle
    world_size, overrides = LAYOUTS[name]
    metrics, per_rank = run(assets, tmp_path, rollouts, world_size, "model.layer_spec=transformer_engine", *overrides)
    check(metrics, per_rank, expected, loss=1e-5, grad_norm=1e-5, weights={"atol": 1e-6, "rtol": 1e-5})


@pytest.mark.parametrize(
    "precision,bounds,layout",
    [
        *[("bf16", BF16, layout) for layout in ("111 small", "221 sequence small")],
        *[(recipe, FP8, layout) for recipe in RECIPES[:2] for layout in ("111 small", "221 sequence small")],
        *[("fp8_blockwise", FP8, layout) for layout in ("111 small", "211 small")],  # 64 wide: no blocks to gather
    ],
)
def test_low_precision_stays_near_the_oracle(precision, bounds, layout, oracle, assets, tmp_path):  # noqa: F811
    rollouts, expected = oracle
    world_size, overrides = LAYOUTS[layout]
    metrics, _ = run(assets, tmp_path, rollouts, world_size, f"precision={precision}", *overrides)
    for k, line in enumerate(metrics):
        print(precision, k, line["loss"] / expected.losses[k], line["grad_norm"] / expected.grad_norms[k])
        assert line["loss"] == pytest.approx(expected.losses[k], rel=bounds["loss"])
        assert line["grad_norm"] == pytest.approx(expected.grad_norms[k], rel=bounds["grad_norm"])
        assert line["loss"] != pytest.approx(expected.losses[k], rel=1e-5)


def test_packed_sequences_equal_each_alone(assets, tmp_path):
    """Through Transformer Engine's attention of packed sequences."""
    ((packed, alone),) = run_distributed(on_te, 1, hidden_states, tiny_config(assets, tmp_path, "precision=bf16"))
    assert (packed - alone).norm() / alone.norm() < 2**-7


def scales_kept(config):
    """How many FP8 scales wait for a backward pass after a run."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    from nemo_vopd.runtime.training import train

    train(config)
    return sum(map(len, FP8GlobalStateManager.fp8_tensors_recompute_buffer))


@pytest.mark.parametrize("kind", ["ema", "current"])
def test_computing_again_changes_no_fp8_gradient(kind, assets, tmp_path):
    """With the live weights as the teacher its scales must not be taken for the student's, nor pile up."""
    options = ["precision=fp8_delayed", f"distill.teacher.kind={kind}", "trainer.max_tokens_per_microbatch=300"]
    for again in ("none", "mlp", "layers"):
        config = tiny_config(assets, tmp_path / again, "trainer.max_steps=3", f"trainer.recompute={again}", *options)
        assert run_distributed(on_te, 1, scales_kept, config) == [0]
    assert numbers(tmp_path / "none") == numbers(tmp_path / "mlp") == numbers(tmp_path / "layers")


@pytest.mark.parametrize("precision", RECIPES)
def test_resumed_equals_uninterrupted_bit_for_bit(precision, assets, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = [f"precision={precision}", "trainer.max_tokens_per_microbatch=300"]
    (expected,) = run_distributed(on_te, 1, train_until, configure(assets, one, *options), None)
    run_distributed(on_te, 1, train_until, configure(assets, two, *options), 3)
    (resumed,) = run_distributed(on_te, 1, train_until, configure(assets, two, *options), None)
    assert numbers(one) == numbers(two) and len(numbers(one)) == 6 and same(expected, resumed)


def test_scaling_state_survives_a_restart(assets, tmp_path):
    config = configure(assets, tmp_path, "precision=fp8_delayed")
    ((saved, _),) = run_distributed(on_te, 1, scaling_after, config, 3)
    ((_, (restored,)),) = run_distributed(on_te, 1, scaling_after, config, None)
    check_scaling(saved[-1], restored)
