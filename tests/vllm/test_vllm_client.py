"""What needs no vLLM: images out of patches, faults of a server, starting and ending one, weights of all stages."""

from __future__ import annotations

import http.server
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from nemo_vopd.batch import View
from nemo_vopd.config import ParallelConfig, PixelConfig
from nemo_vopd.data.processor import Processor
from nemo_vopd.errors import EngineLost, OptionError, RunError
from nemo_vopd.mcore import parallel
from nemo_vopd.rollout.engine import SamplingParams
from nemo_vopd.rollout.vllm.engine import PatchImages, log_probs_mode, one_token_for_each_image, sampling_params
from nemo_vopd.rollout.vllm.server import Client, start_server
from nemo_vopd.rollout.vllm.weight_sync import NCCLSync, to_first_rank, together
from nemo_vopd.vlm.build import build_vlm
from nemo_vopd.vlm.weights.export import iterate_hf
from nemo_vopd.vlm.weights.reading import HFReader
from tests.distributed import run_distributed, start_distributed
from tests.helpers import tiny_config

SETTINGS = {
    "qwen2.5": {},
    "qwen3": {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "from 0 to 1": {"do_normalize": False},
    "from 0 to 255": {"do_normalize": False, "do_rescale": False},
    "normalised from 0 to 255": {"do_rescale": False, "image_mean": [128.0] * 3, "image_std": [64.0] * 3},
    "another scale, one number": {"rescale_factor": 1 / 128, "image_mean": 1.0, "image_std": 0.5},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_images_come_back_from_their_patches_without_loss(assets, settings):
    processor = Processor.from_pretrained(assets / "tiny-vlm")
    image_processor = processor.image_processor
    for name, value in settings.items():
        setattr(image_processor, name, value)
    patch_size = image_processor.patch_size
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((70, 100), (300, 65))]
    limits = [PixelConfig(), PixelConfig(max_pixels=8000)]
    view = processor.view(images, "what digit is it ?", limits)
    restored = PatchImages(image_processor)(view)
    assert all(image.shape[0] % (2 * patch_size) == 0 for image in restored)
    # as vLLM's processor, with its own limits, gets them: nothing is resized, every patch is the same
    again = processor.view([Image.fromarray(x.numpy()) for x in restored], "what digit is it ?", [PixelConfig()] * 2)
    assert torch.equal(again.grid_thw, view.grid_thw)
    assert torch.equal(again.pixel_values, view.pixel_values)
    short = one_token_for_each_image(view, processor.image_token_id, image_processor.merge_size)
    assert short == processor._template("what digit is it ?", 2)


def test_images_that_touch_keep_a_token_each():
    view = View(
        torch.tensor([1, 6, 6, 6, 6, 6, 2]), torch.zeros(3, 7), torch.zeros(20, 6), torch.tensor([[1, 2, 2], [1, 4, 4]])
    )
    assert one_token_for_each_image(view, 6, 2) == [1, 6, 6, 2]


def test_each_prompt_has_its_own_seed():
    params = SamplingParams(n=4, seed=3, forbidden_token_ids=(6, 7))
    seeds = {sampling_params(params, f"0/{record}/{epoch}")["seed"] for record in range(3) for epoch in range(2)}
    assert len(seeds) == 6 and all(0 <= seed < 2**56 for seed in seeds)
    assert sampling_params(params, "0/1/0") == sampling_params(params, "0/1/0")


def test_log_probs_that_vllm_cannot_give_are_refused():
    modes = [log_probs_mode(SamplingParams(temperature=t, top_p=p)) for t, p in ((1.0, 0.9), (0.0, 1.0), (0.7, 1.0))]
    assert modes == ["raw_logprobs", "raw_logprobs", "processed_logprobs"]
    with pytest.raises(OptionError, match=r"rollout.top_p=0.9: at rollout.temperature=0.7 .*set rollout.top_p=1"):
        log_probs_mode(SamplingParams(temperature=0.7, top_p=0.9))


@pytest.fixture
def faulty():
    """A server that answers with the status codes of a list, one after the other, and the paths it was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            server.asked.append(self.path)
            code = server.codes.pop(0)
            content = json.dumps({"n": 1} if code == 200 else {"error": {"message": f"no\n{code}"}}).encode()
            if isinstance(code, bytes):
                code, content = 200, code
            if code == 0:  # too late
                time.sleep(2)
            self.send_response(code or 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.codes = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def client_of(server, retries=3, timeout=20.0) -> Client:
    url = f"http://127.0.0.1:{server.server_address[1]}"
    return Client(url, timeout_seconds=timeout, retries=retries, pause_seconds=0.02)


def test_passing_faults_are_tried_again_and_refusals_are_not(faulty):
    faulty.codes = [500, 503, 429, 200, 400]
    assert client_of(faulty).post("/x") == {"n": 1}
    assert len(faulty.asked) == 4
    with pytest.raises(RunError, match=r"refuses /x \(HTTP 400, no 400\); change its arguments") as error:
        client_of(faulty).post("/x")
    assert not isinstance(error.value, EngineLost) and len(faulty.asked) == 5
    faulty.codes = [b'{"n": ', 200, b"<html>"]
    assert client_of(faulty).post("/x") == {"n": 1}
    with pytest.raises(RunError, match=r"refuses /x \(no JSON: .*\); it is no server of vLLM"):
        client_of(faulty).post("/x")
    assert len(faulty.asked) == 8


def test_a_lost_server_is_named_with_what_failed_and_how_often(faulty):
    faulty.codes = [500] * 3
    with pytest.raises(EngineLost, match=r"is lost: /x failed 3 times \(HTTP 500, no 500\); look into"):
        client_of(faulty, retries=2).post("/x")
    faulty.codes = [0, 0]
    with pytest.raises(EngineLost, match=r"/x failed 2 times \(timed out\)"):
        client_of(faulty, retries=1, timeout=0.3).post("/x")
    faulty.shutdown()
    faulty.server_close()
    with pytest.raises(EngineLost, match=r"/health failed 2 times \(Connection refused\)"):
        client_of(faulty, retries=1).check()


FAKE = """
import __main__, argparse, http.server, json, os, time

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path, _, challenge = self.path.partition("?")
        self.send_response(200)
        self.end_headers()
        if path == "/prove_key":
            self.wfile.write(json.dumps(__main__.prove_key(os.environ["VLLM_API_KEY"], challenge.encode())).encode())

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--note")
    parser.add_argument("--loading", type=float, default=0)
    options, _ = parser.parse_known_args()
    if os.fork() == 0:
        time.sleep(100)
    with open(options.note, "a") as file:
        file.write(f"{os.getpid()} {'RANK' in os.environ} {os.environ['VLLM_SERVER_DEV_MODE']}")
    time.sleep(options.loading)
    http.server.HTTPServer(("127.0.0.1", options.port), Health).serve_forever()
"""


def fake_server(folder: Path, *more: str, port: int = 0):
    """Start what stands for vLLM: a process that answers, and one of its own."""
    package = folder / "vllm/entrypoints/launchers/api_server"
    package.mkdir(parents=True, exist_ok=True)
    (package / "entry.py").write_text(FAKE)
    environment = {"PYTHONPATH": str(folder)}
    arguments = ["--note", str(folder / "note"), *more]
    options = {"port": port, "start_seconds": 60, "environment": environment}
    return start_server(sys.executable, folder, arguments, folder / "log", **options)


def start_and_wait(folder: Path) -> None:
    parallel.initialize(ParallelConfig(), seed=1)
    server = together(lambda: fake_server(folder) if dist.get_rank() == 0 else None)
    if server is not None:
        os.kill(server.process.pid, signal.SIGUSR1)  # as Slurm does
        time.sleep(1)
        assert server.process.poll() is None
    (folder / f"rank{dist.get_rank()}").touch()
    time.sleep(100)


def processes(folder: Path) -> list[psutil.Process]:
    number = int((folder / "note").read_text().split()[0])
    process = psutil.Process(number)
    return [process, *process.children()]


def test_a_server_ends_with_all_its_processes_when_the_run_wants(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    server = fake_server(tmp_path)
    assert (tmp_path / "note").read_text().split()[1:] == ["False", "1"]  # it is no rank of the run
    both = processes(tmp_path)
    assert len(both) == 2
    server.stop()
    assert not psutil.wait_procs(both, timeout=5)[1]


def test_a_server_ends_when_the_run_is_killed(tmp_path):
    ranks = start_distributed(start_and_wait, 2, tmp_path)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("rank*"))) < 2:
        assert time.monotonic() < deadline and all(rank.is_alive() for rank in ranks)
        time.sleep(0.1)
    both = processes(tmp_path)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
        rank.join(5)
    assert not psutil.wait_procs(both, timeout=10)[1]


def test_a_server_that_cannot_start_says_why(tmp_path, faulty):
    with pytest.raises(OptionError, match=r"rollout.vllm.python=/no/python: is not a file"):
        start_server("/no/python", tmp_path, [], tmp_path / "log")
    with pytest.raises(OptionError, match=r"rollout.vllm.port=\d+: cannot be used"):
        start_server(sys.executable, tmp_path, [], tmp_path / "log", port=faulty.server_address[1])
    with pytest.raises(RunError, match=r"vLLM ended with code 1 while it started: .*No module named 'vllm"):
        start_server(sys.executable, tmp_path, [], tmp_path / "log")


def test_nccl_is_refused_without_a_gpu(groups):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(OptionError, match="rollout.vllm.sync=nccl: needs NVIDIA GPUs on both sides; set rollout"):
        NCCLSync(["http://localhost:1"], lambda: iter(()), groups, 1.0)


def gathered(config):
    """What the first rank of the run gets, and what is in the files."""
    groups = parallel.initialize(config.parallel, seed=1)
    stage = build_vlm(config, groups)
    tensors = list(to_first_rank(lambda: iterate_hf(stage, groups), groups))
    reader = HFReader(config.model.hf_path)
    assert all(torch.equal(tensor, reader.read(name)) for name, tensor in tensors)
    return sorted(name for name, _ in tensors), sorted(reader.original_name)


@pytest.mark.parametrize("layout", [{"tensor": 2, "pipeline": 2}, {"pipeline": 2}], ids=["tp2pp2", "pp2dp2"])
def test_the_first_rank_gets_whole_tensors_of_all_stages(assets, tmp_path, layout):
    overrides = [f"parallel.{name}={size}" for name, size in layout.items()] + ["parallel.pipeline_layout=[1,2]"]
    ranks = run_distributed(gathered, 4, tiny_config(assets, tmp_path, *overrides), timeout=120)
    assert ranks[0][0] == ranks[0][1]
    assert not any(names for names, _ in ranks[1:])
