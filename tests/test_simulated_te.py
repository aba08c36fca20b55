"""Transformer Engine on a simulated GPU (`tests/simulated_te.py`): layouts, FP8, its state in checkpoints, measuring.

Bounds of FP8 as in tests/gpu.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import sys

import pytest
import torch

from tests.bare_te import StandIn, needs_te, run_on_te
from tests.distributed import run_distributed
from tests.gpu.test_gpu import BF16, FP8, RECIPES, check_near, check_scaling, hidden_states, scaling_after
from tests.helpers import read_lines, tiny_config
from tests.simulated_gpu import WrongDevice
from tests.test_gpu_benchmark import all_parts
from tests.test_step import EPS, LAYOUTS, LR, STEPS, check, oracle, train_and_collect  # noqa: F401
from tests.training.test_resume import configure, numbers, same, train_until

pytestmark = [
    needs_te,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is better: pytest -m gpu tests/gpu"),
]


def simulated(function, *args):
    """`function(*args)` in a process with Transformer Engine on a simulated GPU."""
    from tests import simulated_te

    simulated_te.activate()
    return function(*args)


def run(assets, folder, rollouts, world_size, *overrides):
    options = [f"trainer.max_steps={STEPS}", f"optimizer.lr={LR}", f"optimizer.eps={EPS}"]
    config = tiny_config(assets, folder, "rollout=replay", f"rollout.path={rollouts}", *options, *overrides)
    per_rank = run_on_te(simulated, world_size, train_and_collect, config)
    return read_lines(folder / "metrics.jsonl"), per_rank


def transformer_engine_here():
    """Whether Megatron sees it in this process, and whether its library is the stand-in."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE, isinstance(sys.modules.get("transformer_engine_torch"), StandIn)


def test_only_processes_that_ask_for_it_have_transformer_engine():
    really = importlib.util.find_spec("transformer_engine") is not None
    assert run_distributed(transformer_engine_here, 1) == [(really, False)]
    assert run_on_te(transformer_engine_here, 1) == [(True, True)]


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
    check_near(metrics, expected, **bounds)
    assert all(
        line["loss"] != pytest.approx(loss, rel=1e-5) for line, loss in zip(metrics, expected.losses, strict=True)
    )


def products_computed():
    """Layouts of a product and copies of its two factors with which it is computed, for two kinds of scaling."""
    from transformer_engine.pytorch import Float8BlockQuantizer, Float8CurrentScalingQuantizer
    from transformer_engine.pytorch.cpp_extensions import general_gemm
    from transformer_engine_torch import DType

    x = torch.ones(32, 32, dtype=torch.bfloat16, device="cuda")
    computed = {"tensorwise": set(), "blockwise": set()}
    for layout, *copies in itertools.product(("TN", "NN", "NT"), ("rows", "columns"), ("rows", "columns")):
        usages = [{"rowwise": copy == "rows", "columnwise": copy == "columns"} for copy in copies]
        for kind, factors in (
            ("tensorwise", [Float8CurrentScalingQuantizer(DType.kFloat8E4M3, x.device, **u)(x) for u in usages]),
            ("blockwise", [Float8BlockQuantizer(DType.kFloat8E4M3, block_scaling_dim=1, **u)(x) for u in usages]),
        ):
            with contextlib.suppress(AssertionError):
                product, *_ = general_gemm(*factors, torch.bfloat16, layout=layout)
                assert product.is_cuda and (product == 32).all()
                computed[kind].add((layout, *copies))
    with pytest.raises(WrongDevice):
        general_gemm(x, x.cpu())
    return computed


def test_a_product_reads_the_copies_that_hopper_reads():
    (computed,) = run_on_te(simulated, 1, products_computed)
    readable = {("TN", "rows", "rows"), ("NN", "columns", "rows"), ("NT", "columns", "columns")}
    assert computed == {"tensorwise": readable, "blockwise": readable}


def test_packed_sequences_equal_each_alone(assets, tmp_path):
    """Through Transformer Engine's attention of packed sequences."""
    ((packed, alone),) = run_on_te(simulated, 1, hidden_states, tiny_config(assets, tmp_path, "precision=bf16"))
    assert (packed - alone).norm() / alone.norm() < 2**-7


def scales_kept(config):
    """How many FP8 scales wait for a backward pass after a run."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    from nemo_vopd.training.run import train

    train(config)
    return sum(map(len, FP8GlobalStateManager.quantization_state.fp8_tensors_recompute_buffer))


@pytest.mark.parametrize("kind", ["ema", "current"])
def test_computing_again_changes_no_fp8_gradient(kind, assets, tmp_path):
    """With the live weights as the teacher its scales must not be taken for the student's, nor pile up."""
    options = ["precision=fp8_delayed", f"distill.teacher.kind={kind}", "trainer.max_tokens_per_microbatch=300"]
    for again in ("none", "mlp", "layers"):
        config = tiny_config(assets, tmp_path / again, "trainer.max_steps=3", f"trainer.recompute={again}", *options)
        assert run_on_te(simulated, 1, scales_kept, config) == [0]
    assert numbers(tmp_path / "none") == numbers(tmp_path / "mlp") == numbers(tmp_path / "layers")


@pytest.mark.parametrize("precision", RECIPES)
def test_resumed_equals_uninterrupted_bit_for_bit(precision, assets, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = [f"precision={precision}", "trainer.max_tokens_per_microbatch=300", "trainer.max_steps=4"]
    (expected,) = run_on_te(simulated, 1, train_until, configure(assets, one, *options), None)
    run_on_te(simulated, 1, train_until, configure(assets, two, *options), 2)
    (resumed,) = run_on_te(simulated, 1, train_until, configure(assets, two, *options), None)
    assert numbers(one) == numbers(two) and len(numbers(one)) == 4 and same(expected, resumed)


def test_scaling_state_survives_a_restart(assets, tmp_path):
    config = configure(assets, tmp_path, "precision=fp8_delayed", "trainer.max_steps=4")
    ((saved, _),) = run_on_te(simulated, 1, scaling_after, config, 3)
    ((_, (restored,)),) = run_on_te(simulated, 1, scaling_after, config, None)
    check_scaling(saved[-1], restored)


def test_the_gpu_benchmark_runs(tmp_path):
    """What is missing here, Liger, is the only error in it; times mean nothing."""
    ((parts, _),) = run_on_te(simulated, 1, all_parts, tmp_path)
    errors = [row["error"] for rows in parts.values() for row in rows if "error" in row]
    assert all(parts.values()) and all("liger-kernel is not installed" in error for error in errors)
    assert json.loads((tmp_path / "gpu.json").read_text())["gpu"] == "simulated"
