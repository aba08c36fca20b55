"""Resumed equals uninterrupted, in the same layout bit for bit, in another one to float32 round-off."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from nemo_vopd.tools.prepare.tiny_model import write_tiny_model
from nemo_vopd.vlm.weights.export import iterate_hf
from tests.distributed import run_distributed
from tests.helpers import read_lines, tiny_config

STEPS = 6
TENSOR, PIPELINE = ["parallel.tensor=2"], ["parallel.pipeline=2", "parallel.pipeline_layout=[1,2]"]


def train_until(config, stop_after: int | None):
    """Train; after `stop_after` steps one rank alone gets SIGUSR1. Returns shards and this stage's weights."""
    from nemo_vopd.model import VisionOPDModel
    from nemo_vopd.training.run import train

    original = VisionOPDModel.on_train_batch_end

    def hook(self, *args):
        if self.trainer.global_step == stop_after and self.groups.dp_cp.rank() == self.groups.dp_cp.size() - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        original(self, *args)

    VisionOPDModel.on_train_batch_end = hook  # in this process, which ends with the run
    model = train(config)
    shards = {kind: {n: flat.clone() for n, (flat, _) in s.items()} for kind, s in model.sharded_state().items()}
    weights = [
        {name: tensor.clone() for name, tensor in iterate_hf(module, model.groups)}
        for module in (model.student, model.teacher_model)
    ]
    return shards, weights


def configure(assets, folder: Path, *overrides: str):
    options = [
        f"trainer.max_steps={STEPS}",
        "data.num_workers=2",
        "optimizer.lr=1e-3",
        "optimizer.schedule=cosine",
        f"rollout.dump_path={folder}/rollouts.jsonl",
    ]
    return tiny_config(assets, folder, *options, *overrides)


def numbers(folder: Path) -> list[dict]:
    """metrics.jsonl without clocks."""
    lines = read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if "seconds" not in k and k != "tokens_per_second"} for line in lines]


def tokens(folder: Path) -> dict:
    """Sampled tokens by step, sample and number of the response; data-parallel ranks write them in another order."""
    lines = read_lines(folder / "rollouts.jsonl")
    return {(line["step"], line["sample_id"], line["index"]): line["token_ids"] for line in lines}


def same(a, b) -> bool:
    """Nested dicts and lists of tensors, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    pairs = [(a[k], b[k]) for k in a] if isinstance(a, dict) else zip(a, b, strict=True)
    return len(a) == len(b) and all(same(x, y) for x, y in pairs)


@pytest.mark.parametrize(
    "world_size,overrides",
    [
        (1, ["precision=bf16"]),
        (2, ["checkpoint.every_n_steps=1", "checkpoint.asynchronous=true"]),
        (4, ["parallel.tensor=2", "parallel.sequence=true", *PIPELINE, "distill.teacher.kind=periodic"]),
    ],
    ids=["111 bf16", "112 asynchronous", "221 periodic"],
)
def test_resumed_equals_uninterrupted_bit_for_bit(world_size, overrides, assets, tmp_path):
    """6 steps = 3 steps, SIGUSR1, 3 steps: sampling on, loader shuffled in two workers."""
    overrides = [*overrides, "distill.teacher.every=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    uninterrupted = run_distributed(train_until, world_size, configure(assets, one, *overrides), None)
    run_distributed(train_until, world_size, configure(assets, two, *overrides), 3)
    (status,) = read_lines(two / "status.json")
    assert status["reason"] == "SIGUSR1" and status["step"] == 3 and status["finished"] is False
    assert Path(status["checkpoint"]).name == "step-00000003" and len(numbers(two)) == 3
    resumed = run_distributed(train_until, world_size, configure(assets, two, *overrides), None)
    (status,) = read_lines(two / "status.json")
    assert status["reason"] == "max_steps" and status["finished"] is True
    assert numbers(one) == numbers(two) and len(numbers(one)) == STEPS
    assert (one / "rollouts.jsonl").read_bytes() == (two / "rollouts.jsonl").read_bytes()
    assert same(uninterrupted, resumed)
    ids = [line["sample_id"] for line in read_lines(two / "rollouts.jsonl") if line["index"] == 0]
    assert len(ids) == len(set(ids)) == STEPS * 8, "a sample was repeated or skipped"


def test_a_run_goes_on_in_other_layouts(assets, tmp_path):
    """Two steps each: tensor 2, pipeline 2, three stages of two chunks, data 2; against six and more in one process."""
    write_tiny_model(tmp_path / "six", seed=4, num_hidden_layers=6)
    model = f"model.hf_path={tmp_path}/six"
    chunks = ["parallel.pipeline=3", "parallel.virtual_pipeline=2"]
    layouts = [(2, TENSOR), (2, ["parallel.pipeline=2"]), (3, chunks), (2, [])]
    one, many = tmp_path / "one", tmp_path / "many"
    steps = f"trainer.max_steps={2 * len(layouts)}"
    ((_, expected),) = run_distributed(train_until, 1, configure(assets, one, model, steps), None)
    results = []
    for number, (world_size, overrides) in enumerate(layouts, 1):
        config = configure(assets, many, model, steps, *overrides)
        results = run_distributed(train_until, world_size, config, 2 * number if number < len(layouts) else None)
    for single, line in zip(numbers(one), numbers(many), strict=True):
        assert line.pop("dropped_by_reason") == single.pop("dropped_by_reason")
        assert line == pytest.approx(single, rel=1e-4, abs=1e-5)  # mismatch is rounding alone
    for _, weights in results:
        for ours, theirs in zip(weights, expected, strict=True):
            assert set(ours) == set(theirs)
            for name, tensor in ours.items():
                torch.testing.assert_close(tensor, theirs[name], atol=2e-5, rtol=1e-4)
    assert tokens(one) == tokens(many)


def test_max_time_ends_the_run_in_order(assets, tmp_path):
    config = configure(assets, tmp_path, "trainer.max_steps=10000", "trainer.max_time=00:00:00:02")
    run_distributed(train_until, 2, config, None)
    (status,) = read_lines(tmp_path / "status.json")
    assert status["reason"] == "max_time" and not status["finished"] and 0 < status["step"] < 10000
    assert Path(status["checkpoint"]).name == f"step-{status['step']:08d}"


def test_early_stop_ends_a_run_that_leaves_its_range(assets, tmp_path):
    rule = ["distill.early_stop.metric=entropy", "distill.early_stop.max=0.1", "distill.early_stop.patience=2"]
    run_distributed(train_until, 1, configure(assets, tmp_path, *rule), None)
    (status,) = read_lines(tmp_path / "status.json")
    assert status["reason"] == "early_stop" and status["finished"] and status["step"] == 2
