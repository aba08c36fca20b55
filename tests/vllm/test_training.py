"""Whole training runs with vLLM: weights that arrive, weights that do not, a server that dies and comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_vopd.rollout.engine import SamplingParams
from nemo_vopd.rollout.vllm.engine import server_arguments
from nemo_vopd.rollout.vllm.server import start_server
from tests.helpers import read_lines
from tests.vllm.conftest import ON_CPU, ROOT, SMALL

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
FAST = ("optimizer.lr=0.01", "optimizer.warmup_steps=0")
"""So large that weights of one step before are easily told apart."""


def start_training(config, folder: Path, *overrides: str, key: str | None = None) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", "recipes/train_vopd.py", "--config-name", "tiny", "rollout=vllm"]
    command += [f"model.hf_path={config.model.hf_path}", f"data.path={config.data.path}", *FAST]
    command += [f"exp_manager.exp_dir={folder}", "rollout.max_response_length=8", "rollout.vllm.retries=1", *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, **ON_CPU, **({"VLLM_API_KEY": key} if key else {})}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def train(config, folder: Path, *overrides: str, key: str | None = None) -> tuple[int, str]:
    process = start_training(config, folder, *overrides, key=key)
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, output


def serve(python: Path, config, log: Path, port: int = 0):
    pixels = (config.data.full.min_pixels, config.data.full.max_pixels)
    arguments = server_arguments(SamplingParams(), dtype="float32", max_length=256, pixels=pixels) + SMALL
    options = {"port": port, "start_seconds": 240, "environment": ON_CPU}
    return start_server(python, config.model.hf_path, arguments, log, **options)


def numbers(folder: Path) -> list[dict]:
    """What a step computed, without what a clock measured."""
    kept = ("step", "loss", "num_response_tokens", "entropy")
    return [{name: line[name] for name in kept} for line in read_lines(folder / "metrics.jsonl")]


def check_same(folder: Path, other: Path) -> None:
    """Two runs computed the same at every step."""
    for ours, theirs in zip(numbers(folder), numbers(other), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def wait_for_steps(process: subprocess.Popen, folder: Path, number: int) -> None:
    """Until the run has written `number` steps."""
    file = folder / "metrics.jsonl"
    while not file.exists() or len(file.read_text().splitlines()) < number:
        assert process.poll() is None
        time.sleep(0.02)


def test_a_run_starts_its_server_and_keeps_it_up_to_date(vllm_python, config, tmp_path):
    arguments = f"rollout.vllm.arguments={json.dumps(SMALL)}".replace(" ", "")
    own = (f"rollout.vllm.python={vllm_python}", arguments)
    code, output = train(config, tmp_path, "trainer.max_steps=4", *own)
    assert code == 0, output[-3000:]
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(line["mismatch_max"] < 1e-3 for line in lines)
    assert all(0 < line["seconds_sync"] < line["seconds_step"] for line in lines)
    assert not list((tmp_path / "rollout_weights").iterdir())


def test_stale_weights_and_a_lost_server(vllm_python, config, tmp_path):
    server = serve(vllm_python, config, tmp_path / "server.log")
    port = int(server.url.rpartition(":")[2])
    there = f"rollout.vllm.urls=[{server.url}]"
    try:
        stale = (there, "rollout.vllm.sync=none", "rollout.max_mismatch=0.01", "trainer.max_steps=6")
        code, output = train(config, tmp_path / "stale", *stale)
        assert code == 1 and f"error: vLLM at {server.url} refuses /server_info" in output, output[-2000:]
        assert "in the environment variable VLLM_API_KEY" in output
        code, output = train(config, tmp_path / "stale", *stale, key=server.key)
        assert code == 1 and "Traceback" not in output
        assert "error: the rollout engine's log-probs are" in output and "(rollout.max_mismatch=0.01)" in output
        assert 0 < len(numbers(tmp_path / "stale")) < 6  # the first step agreed: the server has the first weights

        six = (there, "trainer.max_steps=6", "checkpoint.every_n_steps=0")
        code, output = train(config, tmp_path / "whole", *six, key=server.key)
        assert code == 0, output[-3000:]

        process = start_training(config, tmp_path / "lost", *six, key=server.key)
        wait_for_steps(process, tmp_path / "lost", 2)
        os.killpg(server.process.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 1 and "Traceback" not in output
        assert f"error: vLLM at {server.url} is lost: " in output, output[-2000:]
        status = json.loads((tmp_path / "lost" / "status.json").read_text())
        done = len(numbers(tmp_path / "lost"))
        assert status["reason"] == "engine_lost" and not status["finished"] and status["step"] == done < 6
        assert status["checkpoint"].endswith(f"step-{done:08d}")
    finally:
        server.stop()
    again = serve(vllm_python, config, tmp_path / "again.log", port)
    try:
        code, output = train(config, tmp_path / "lost", *six, key=again.key)
        assert code == 0 and f"resuming after step {done}" in output, output[-3000:]
        check_same(tmp_path / "lost", tmp_path / "whole")

        ahead = (*six, "rollout.ahead=true")
        code, output = train(config, tmp_path / "ahead", *ahead, key=again.key)
        assert code == 0, output[-3000:]
        lines = read_lines(tmp_path / "ahead" / "metrics.jsonl")
        assert [line["mismatch_mean"] > 1e-3 for line in lines] == [False, True, True, True, True, True]
        process = start_training(config, tmp_path / "stopped", *ahead, key=again.key)
        wait_for_steps(process, tmp_path / "stopped", 2)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=60) == 0
        code, output = train(config, tmp_path / "stopped", *ahead, key=again.key)
        assert code == 0 and "resuming after step" in output, output[-3000:]
        check_same(tmp_path / "stopped", tmp_path / "ahead")
    finally:
        again.stop()
