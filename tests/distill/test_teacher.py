"""The EMA teacher against its closed form: every parameter, float32, also for a bf16 model and sharded optimizer."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from nemo_vopd.config import TeacherConfig
from nemo_vopd.distill.teacher import Teacher
from nemo_vopd.mcore import parallel
from nemo_vopd.mcore.optimizer import Optimizer, wrap_ddp
from nemo_vopd.mcore.teacher_weights import ShardedWeights
from nemo_vopd.tools.prepare.tiny_model import write_tiny_model
from nemo_vopd.vlm.build import build_twin, build_vlm
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
    model = build_twin(student, config, groups)
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


def start(config):
    """Student and teacher of a run whose model directory is gone once the student is built: what differs, by name."""
    from nemo_vopd import model

    groups = parallel.initialize(config.parallel, seed=1)
    directory = Path(config.model.hf_path)

    def build_once(*args):
        student = build_vlm(*args)
        dist.barrier()
        if dist.get_rank() == 0:
            directory.rename(directory.with_suffix(".gone"))
        dist.barrier()
        return student

    with mock.patch.object(model, "build_vlm", build_once):
        run = model.VisionOPDModel(config, groups)
    student, teacher = run.student, run.teacher_model
    different, shared = [], []
    for tensors in ("named_parameters", "named_buffers"):
        theirs = dict(getattr(student, tensors)())
        for name, tensor in getattr(teacher, tensors)():
            mine = theirs.pop(name)
            different += [name] if tensor.dtype != mine.dtype or not torch.equal(tensor, mine) else []
            shared += [name] if tensor.data_ptr() == mine.data_ptr() else []
        different += list(theirs)
    for one, other in zip(student.chunks, teacher.chunks, strict=True):
        angles = one.language.rotary_pos_emb.inv_freq, other.language.rotary_pos_emb.inv_freq
        different += [] if torch.equal(*angles) else ["language.rotary_pos_emb.inv_freq"]
    main = {name: shard for name, (shard, _) in run.sharded_state()["student"].items()}
    different += [name for name, shard in run.teacher.shards.items() if not torch.equal(shard, main[name])]
    frozen = [name for name, p in student.named_parameters() if not p.requires_grad]
    return different, shared, frozen, teacher is student


STARTS = {
    "one process, tied": (1, "ema", [], {"tie_word_embeddings": True}),
    "tensor 2, sequence, a vocabulary that does not divide": (
        2,
        "fixed",
        ["parallel.tensor=2", "parallel.sequence=true"],
        {"vocab_size": 131},
    ),
    "pipeline 2, tied": (
        2,
        "trust_region",
        ["parallel.pipeline=2"],
        {"tie_word_embeddings": True, "num_hidden_layers": 4},
    ),
    "interleaved": (3, "periodic", ["parallel.pipeline=3", "parallel.virtual_pipeline=2"], {"num_hidden_layers": 6}),
    "data 2, bf16, tower frozen": (2, "ema", ["precision=bf16", "model.freeze.vision=true"], {}),
    "the live weights": (1, "current", [], {}),
}


@pytest.mark.parametrize("name", STARTS)
def test_the_teacher_starts_as_the_student_without_reading_the_model_again(name, assets, tmp_path):
    world_size, kind, overrides, sizes = STARTS[name]
    write_tiny_model(tmp_path / "model", seed=4, **sizes)
    options = [f"model.hf_path={tmp_path / 'model'}", f"distill.teacher.kind={kind}", *overrides]
    for different, shared, frozen, same in run_distributed(start, world_size, tiny_config(assets, tmp_path, *options)):
        assert not different and same == (kind == "current")
        assert bool(frozen) == ("frozen" in name) and (same or shared == frozen)


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
