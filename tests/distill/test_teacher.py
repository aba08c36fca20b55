"""The EMA teacher against its closed form: every parameter, float32, also for a bf16 model and sharded optimizer."""

from __future__ import annotations

import pytest
import torch

from nemo_vopd.config import TeacherConfig
from nemo_vopd.distill.teacher import Teacher
from nemo_vopd.mcore import parallel
from nemo_vopd.mcore.optimizer import Optimizer, wrap_ddp
from nemo_vopd.mcore.weights import ShardedWeights
from nemo_vopd.vlm import build_vlm
from tests.distributed import run_distributed
from tests.helpers import tiny_config

STEPS, RATE = 40, 0.05


def follow(config, kind: str):
    """Push random gradients through the optimizer; returns what the teacher and the closed form say, by name."""
    groups = parallel.initialize(config.parallel, seed=1)
    student = build_vlm(config, groups)
    bf16 = config.precision.dtype == "bf16"
    ddp = wrap_ddp(student.chunks, groups)
    optimizer = Optimizer(ddp, config.optimizer, groups, bf16=bf16)
    model = build_vlm(config, groups)
    weights = ShardedWeights(model, student, optimizer, groups)
    main = {name: shard for name, (shard, _) in weights.main.items()}
    start = {name: shard.clone() for name, shard in main.items()}
    published = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert all(torch.equal(published[n], p) for n, p in student.named_parameters()), "starts equal"

    teacher = Teacher(TeacherConfig(kind=kind, rate=RATE, every=7), main, weights.publish)
    # closed form: rate * sum_k (1 - rate)^(K - k) * student_k + (1 - rate)^K * student_0, in float64
    expected = {name: shard.double() * (1 - RATE) ** STEPS for name, shard in start.items()}
    generator = torch.Generator().manual_seed(4)  # the same gradients on every data-parallel rank
    for k in range(1, STEPS + 1):
        optimizer.zero_grad()
        for parameter in student.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        ddp[0].finish_grad_sync()
        assert optimizer.step(2e-6)[0]
        teacher.update(k - 1)
        for name, shard in main.items():
            expected[name] += RATE * (1 - RATE) ** (STEPS - k) * shard.double()
    moved = {name: (main[name] - start[name]).abs().max().item() for name in main}
    forward = {name: p.detach().clone() for name, p in model.named_parameters()}
    shards = {name: (shard.clone(), weights.main[name][1]) for name, shard in teacher.shards.items()}
    return shards, expected, moved, forward, start


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ema_equals_the_closed_form(dtype, assets, tmp_path):
    config = tiny_config(assets, tmp_path, f"precision={dtype}", "optimizer.weight_decay=0")
    results = run_distributed(follow, 2, config, "ema")
    names = set().union(*(shards for shards, *_ in results))
    assert names == set(results[0][3]), "a parameter is averaged on no rank"
    for shards, expected, moved, forward, start in results:
        for name, (shard, offset) in shards.items():
            assert shard.dtype == torch.float32 and moved[name] > 1e-5
            # well below the movement itself, which is what an average kept in bf16 would lose
            torch.testing.assert_close(shard.double(), expected[name], atol=2e-7, rtol=3e-7)
            assert (shard - start[name]).abs().max() > 0.3 * moved[name]
            own = forward[name].view(-1)[offset : offset + shard.numel()]
            assert torch.equal(own, shard.to(own.dtype)), "the forward pass uses the cast average"
    first, second = results[0][3], results[1][3]
    assert all(torch.equal(first[name], second[name]) for name in first), "ranks gathered the same teacher"


def test_fixed_teacher_stays(assets, tmp_path):
    config = tiny_config(assets, tmp_path)
    for shards, _, moved, forward, start in run_distributed(follow, 1, config, "fixed"):
        assert all(torch.equal(shard, start[name]) and moved[name] > 0 for name, (shard, _) in shards.items())
        assert all(torch.equal(forward[name].view(-1), start[name].view(-1)) for name in forward)


def test_periodic_teacher_copies_at_every_third_step():
    student, published = {"w": torch.zeros(2)}, []
    teacher = Teacher(
        TeacherConfig(kind="periodic", every=3), student, lambda shards: published.append(shards["w"][0].item())
    )
    seen = []
    for step in range(8):
        student["w"] += 1
        teacher.update(step)
        seen.append(teacher.shards["w"][0].item())
    assert seen == [0, 0, 3, 3, 3, 6, 6, 6] and published == [3, 6]
