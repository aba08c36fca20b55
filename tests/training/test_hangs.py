"""What stops without an error ends the run within parallel.timeout_minutes, with stacks, and the run resumes."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path

import psutil
import pytest

from tests.distributed import HANG, run_distributed, start_distributed
from tests.helpers import read_lines
from tests.training.test_faults import configure, run

LIMIT = 6.0
"""Seconds that a run may show no sign of life."""
GRACE = 90.0
"""Seconds more that a busy machine may need."""


def logged(config, log):
    """Train with the output in files, and leave on an error as recipes do."""
    rank = int(os.environ["RANK"])
    handle = os.open(f"{log}-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    try:
        return run(config)
    except Exception:
        traceback.print_exc()
        os._exit(1)


def begin(assets, folder: Path, world_size: int, *overrides: str):
    options = [f"parallel.timeout_minutes={LIMIT / 60}", "trainer.max_steps=100000", *overrides]
    return start_distributed(logged, world_size, configure(assets, folder / "run", *options), folder / "log")


def wait_for_steps(folder: Path, num: int, ranks) -> None:
    deadline, metrics = time.monotonic() + HANG, folder / "run" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < num:
        assert all(rank.is_alive() for rank in ranks) and time.monotonic() < deadline, (folder / "log-0").read_text()
        time.sleep(0.02)


def ended(ranks, within: float) -> None:
    end = time.monotonic() + within
    for rank in ranks:
        rank.join(max(0.1, end - time.monotonic()))
        assert rank.exitcode not in (None, 0), rank.exitcode


def stop_rank(ranks, folder):
    os.kill(ranks[1].pid, signal.SIGSTOP)


def stop_loader(ranks, folder):
    worker = max(psutil.Process(ranks[0].pid).children(), key=lambda child: child.create_time())
    worker.suspend()


def stall_writing(ranks, folder):
    """Nobody ever reads from a pipe."""
    os.mkfifo(folder / "run" / "metrics.pipe")
    os.replace(folder / "run" / "metrics.pipe", folder / "run" / "status.json.partial")


@pytest.mark.parametrize(
    "world_size,hang,overrides,words",
    [
        (2, stop_rank, [], r"Timed out waiting|Timeout|timed out"),
        (1, stop_loader, ["data.num_workers=1"], r"gave no batch within 6 seconds|Timeout \(0:00:06"),
        (1, stall_writing, [], r"Timeout \(0:00:06"),
    ],
    ids=["a stopped rank", "a stopped loader process", "a file system that does not answer"],
)
def test_a_hang_ends_the_run_within_its_limit(world_size, hang, overrides, words, assets, tmp_path):
    ranks = begin(assets, tmp_path, world_size, *overrides)
    try:
        wait_for_steps(tmp_path, 2, ranks)
        hang(ranks, tmp_path)
        start = time.monotonic()
        ended(ranks[:1], LIMIT + GRACE)
        assert time.monotonic() - start > LIMIT / 2, "it was not waited for"
    finally:
        for rank in ranks:
            rank.kill()
            rank.join(HANG)
    log = (tmp_path / "log-0").read_text()
    # the stack says where: in a step, or in what came after it
    assert re.search(words, log) and re.search(r"training_step|on_train_batch_end|peek", log), log[-3000:]
    (tmp_path / "run" / "status.json.partial").unlink(missing_ok=True)
    (status,) = read_lines(tmp_path / "run" / "status.json")
    again = configure(assets, tmp_path / "run", f"trainer.max_steps={status['step'] + 3}", *overrides)
    assert run_distributed(run, world_size, again) == [status["step"] + 3] * world_size


def test_slow_is_not_hung(assets, tmp_path):
    """Saves and measurements that take long in all, but show that they go on."""
    options = ["evaluation.every_n_steps=1", "evaluation.num_samples=200", f"evaluation.path={assets}/tiny-digits"]
    limit = f"parallel.timeout_minutes={LIMIT / 60}"
    config = configure(assets, tmp_path, *options, limit, "trainer.max_steps=2", "rollout.n=8")
    assert run_distributed(slowed, 1, config) == [2]


def slowed(config):
    from nemo_vopd.rollout.native import engine
    from nemo_vopd.tools.during_training import GapDuringTraining
    from nemo_vopd.training.run import train

    advance = engine.DecodingBatch.take

    def slow_take(batch):
        time.sleep(0.3)
        return advance(batch)

    engine.DecodingBatch.take = slow_take
    start = time.monotonic()
    model = train(config, evaluation=GapDuringTraining(config))
    assert time.monotonic() - start > 1.5 * LIMIT
    return model.global_step
