"""A real vLLM server as the rollout engine: what it samples, what it says of it, and whose weights it has."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import httpx2
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from nemo_vopd.batch import Sample, View
from nemo_vopd.config import ParallelConfig, PixelConfig
from nemo_vopd.data.encoder import iterate_samples
from nemo_vopd.data.processor import Processor
from nemo_vopd.errors import EngineLost, OptionError, RunError
from nemo_vopd.mcore import parallel
from nemo_vopd.rollout.vllm.engine import VLLMEngine
from nemo_vopd.rollout.vllm.weight_sync import FolderSync
from nemo_vopd.vlm.build import build_vlm
from nemo_vopd.vlm.weights.export import save_hf
from tests.distributed import run_distributed
from tests.reference import response_logits
from tests.vllm.conftest import params_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]
TOLERANCE = 1e-3
BLOCK = 128
"""Tokens; only whole blocks of a prompt are kept for the next one that begins alike."""


def load_samples(config, count: int = 4) -> list[Sample]:
    """Prompts of different length: small and large images, and one that fills a block of vLLM's prefix cache."""
    processor = Processor.from_pretrained(config.model.hf_path)
    samples = list(iterate_samples(config.data.path, config.data, "crop", processor, count))
    for sample in samples[1::2]:
        sample.student = sample.teacher
    samples[0].student = make_view(processor, config.data.full, (90, 60), "what digit is it ? " * 30)
    assert samples[0].student.num_tokens > BLOCK
    return samples


def make_view(processor: Processor, pixels: PixelConfig, size: tuple[int, int], question: str = "what is it ?") -> View:
    """A prompt about noise of width and height `size`."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return processor.view([Image.fromarray(noise)], question, [pixels])


def reference(folder: Path | str):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def scores(model, rollout, temperature: float = 1.0) -> torch.Tensor:
    """[R, V] log-probs of the full forward pass."""
    return torch.log_softmax(response_logits(model, rollout.sample.student, rollout.token_ids) / temperature, -1)


def largest_difference(model, rollouts) -> float:
    return max(
        float((scores(model, r).gather(-1, r.token_ids[:, None])[:, 0] - r.log_probs).abs().max()) for r in rollouts
    )


@pytest.fixture(scope="module")
def processor(config):
    return Processor.from_pretrained(config.model.hf_path)


@pytest.fixture
def engine_of(groups, processor, config, server):
    """Builds an engine on `server`, or on another."""

    def build(on=server, sync=None, **options) -> VLLMEngine:
        client = {name: options.pop(name) for name in ("retries", "timeout_seconds") if name in options}
        return VLLMEngine([on.url], params_of(processor, **options), groups, processor, sync, key=on.key, **client)

    return build


def test_nothing_but_its_health_is_open_without_the_key(server):
    """Every method of every path that vLLM says it has; its own check of the key leaves most of them open."""
    key = {"Authorization": f"Bearer {server.key}"}
    with httpx2.Client(base_url=server.url, timeout=20, trust_env=False) as client:
        paths = client.get("/openapi.json", headers=key).raise_for_status().json()["paths"]
        asked = {(method, path) for path, methods in paths.items() for method in methods}
        asked |= {
            ("get", path) for path in ("/docs", "/openapi.json", "/metrics", "/prove_key/", "//health", "/%68ealth/x")
        }
        dangerous = {"/collective_rpc", "/reset_prefix_cache", "/inference/v1/generate", "/v1/models", "/pause"}
        assert dangerous <= {path for _, path in asked}, paths.keys()
        for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"bearer {server.key}x"}):
            codes = {(method, path): client.request(method, path, headers=wrong).status_code for method, path in asked}
            codes |= {("options", path): client.options(path, headers=wrong).status_code for _, path in asked}
            assert {path for (_, path), code in codes.items() if code != 401} == {"/health"}
        assert client.post("/reset_mm_cache", headers=key).status_code == 200
    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    assert not any(server.key in argument for process in processes for argument in process.cmdline())
    assert server.key not in server.log_file.read_text()


def test_log_probs_are_those_of_the_training_model(engine_of, config, processor):
    samples = load_samples(config)
    rollouts = engine_of().generate(samples)
    assert [(r.sample.id, r.index) for r in rollouts] == [(s.id, k) for s in samples for k in range(3)]
    assert {s.student.num_tokens for s in samples} == {r.sample.student.num_tokens for r in rollouts}
    difference = largest_difference(reference(config.model.hf_path), rollouts)
    print(f"largest difference of log-probs: {difference:.2e}")
    assert difference < TOLERANCE
    for rollout in rollouts:
        assert rollout.token_ids.dtype == torch.int64 and rollout.log_probs.dtype == torch.float32
        ended = torch.isin(rollout.token_ids, torch.tensor(processor.end_token_ids))
        assert not ended[:-1].any() and (ended[-1] or len(rollout.token_ids) == 8)
    assert any(len(rollout.token_ids) < 8 for rollout in rollouts)


def test_responses_differ_and_come_again_for_the_same_seed_and_occurrence(engine_of, config):
    samples = load_samples(config)
    later = [dataclasses.replace(s, key=s.key._replace(occurrence=1)) for s in samples]
    tokens = [[r.token_ids.tolist() for r in engine_of().generate(asked)] for asked in (samples, samples, later)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert all(len({tuple(t) for t in tokens[0][i : i + 3]}) > 1 for i in range(0, 12, 3))


def test_greedy_is_transformers_generate_token_for_token(engine_of, config, processor):
    samples, model = load_samples(config), reference(config.model.hf_path)
    rollouts = engine_of(temperature=0.0, n=2).generate(samples)
    for sample, first, second in zip(samples, rollouts[::2], rollouts[1::2], strict=True):
        view = sample.student
        expected = model.generate(
            input_ids=view.token_ids[None],
            pixel_values=view.pixel_values,
            image_grid_thw=view.grid_thw,
            mm_token_type_ids=(view.token_ids == processor.image_token_id).int()[None],
            do_sample=False,
            max_new_tokens=8,
            suppress_tokens=processor.forbidden_token_ids,
        )[0, view.num_tokens :]
        assert first.token_ids.tolist() == second.token_ids.tolist() == expected.tolist()


def test_forbidden_tokens_are_never_sampled_though_the_model_prefers_them(engine_of, config, processor):
    samples, model = load_samples(config), reference(config.model.hf_path)
    liked = {int(t) for r in engine_of(temperature=0.0, n=1).generate(samples) for t in r.token_ids}
    forbidden = sorted((liked | set(processor.forbidden_token_ids)) - set(processor.end_token_ids))
    for temperature in (0.0, 1.0):
        rollouts = engine_of(temperature=temperature, forbidden_token_ids=forbidden).generate(samples)
        assert not {int(t) for r in rollouts for t in r.token_ids} & set(forbidden)
        assert largest_difference(model, rollouts) < TOLERANCE  # of the full vocabulary nevertheless


def test_at_other_temperatures_log_probs_miss_only_the_forbidden_tokens(servers, engine_of, config, processor):
    samples, model = load_samples(config, 2), reference(config.model.hf_path)
    with pytest.raises(OptionError, match="--logprobs-mode processed_logprobs"):
        engine_of(temperature=0.8)
    for rollout in engine_of(servers[1], temperature=0.8).generate(samples):
        expected = scores(model, rollout, 0.8)
        left = 1 - expected[:, processor.forbidden_token_ids].exp().sum(-1)
        expected = expected.gather(-1, rollout.token_ids[:, None])[:, 0] - left.log()
        torch.testing.assert_close(rollout.log_probs, expected, atol=TOLERANCE, rtol=0)


def test_images_that_the_server_would_resize_are_refused(engine_of, config, processor):
    (sample,) = load_samples(config, 1)
    sample.student = make_view(processor, PixelConfig(max_pixels=50_000), (200, 200))
    with pytest.raises(RunError, match=r"made \d+ tokens of the prompt of sample .* training has \d+; start it on"):
        engine_of().generate([sample])


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(engine_of, config, processor):
    samples = load_samples(config)
    free = engine_of().generate(samples)
    words = {processor.decode([t]) for r in free for t in r.token_ids[:-1].tolist()} - {""}
    stop = sorted(words)[:3]
    stopped = engine_of(stop=tuple(stop)).generate(samples)
    assert sum(len(r.token_ids) for r in stopped) < sum(len(r.token_ids) for r in free)
    for rollout, whole in zip(stopped, free, strict=True):
        length = len(rollout.token_ids)
        assert torch.equal(rollout.token_ids, whole.token_ids[:length])
        assert not any(word in processor.decode(rollout.token_ids[:-1]) for word in stop)
        if length < len(whole.token_ids):
            assert any(word in processor.decode(rollout.token_ids[-1:]) for word in stop)


def sync_into(config, groups, stage, server, folder: Path) -> FolderSync:
    write = functools.partial(save_hf, stage, groups, config.model.hf_path)
    return FolderSync([server.url], folder, write, timeout_seconds=60, key=server.key)


def test_servers_take_over_new_weights_and_forget_what_came_of_the_old(engine_of, config, groups, server, tmp_path):
    samples, old = load_samples(config), reference(config.model.hf_path)
    stage = build_vlm(config, groups)
    sync = sync_into(config, groups, stage, server, tmp_path / "shared")
    engine, stale = engine_of(sync=sync, temperature=0.0, n=1), engine_of(sync=None, temperature=0.0, n=1)
    engine.generate(samples)  # their images and prompts are in its caches now
    torch.manual_seed(0)
    for part in (".vision.", ".language."):  # the features of the images alone, then the language model
        with torch.no_grad():
            for name, parameter in stage.named_parameters():
                if part in name and parameter.ndim > 1:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        stale.sync_weights()  # none
        assert largest_difference(old, stale.generate(samples)) < TOLERANCE
        begin = time.monotonic()
        engine.sync_weights()
        seconds = time.monotonic() - begin
        assert not list((tmp_path / "shared").iterdir())  # nothing stays behind
        sync.write(tmp_path / f"weights{part}")
        new = reference(tmp_path / f"weights{part}")
        rollouts = engine.generate(samples)
        difference, far = largest_difference(new, rollouts), largest_difference(old, rollouts)
        print(f"{part}: {seconds:.2f} s, difference to new {difference:.2e}, to old {far:.2e}")
        assert difference < TOLERANCE and far > 0.05
        old = new
    original = Path(config.model.hf_path)
    engine.sync.write = functools.partial(shutil.copytree, original)
    engine.sync_weights()
    assert largest_difference(reference(original), engine.generate(samples)) < TOLERANCE


def rollouts_of_rank(config, urls, key, layout, retries=3):
    """What this rank gets, of the samples of its data-parallel group."""
    groups = parallel.initialize(ParallelConfig(**layout), seed=1)
    processor = Processor.from_pretrained(config.model.hf_path)
    dp = groups.dp_cp
    samples = load_samples(config)[dp.rank() :: dp.size()]
    try:
        engine = VLLMEngine(urls, params_of(processor), groups, processor, None, key=key, retries=retries)
        return [(r.sample.id, r.index, r.token_ids.tolist(), r.log_probs.tolist()) for r in engine.generate(samples)]
    except EngineLost as error:
        return str(error)


@pytest.mark.parametrize("layout", [{"tensor": 2}, {}], ids=["tensor", "data"])
def test_ranks_of_a_model_parallel_group_get_the_same_and_others_their_share(engine_of, config, server, layout):
    alone = {
        (r.sample.id, r.index): (r.token_ids.tolist(), r.log_probs.tolist())
        for r in engine_of().generate(load_samples(config))
    }
    ranks = run_distributed(rollouts_of_rank, 2, config, [server.url], server.key, layout, timeout=120)
    assert (ranks[0] == ranks[1]) == bool(layout)
    found = {(sample_id, index): (tokens, log_probs) for r in ranks for sample_id, index, tokens, log_probs in r}
    assert found.keys() == alone.keys()
    for key, (tokens, log_probs) in found.items():
        assert tokens == alone[key][0]
        torch.testing.assert_close(torch.tensor(log_probs), torch.tensor(alone[key][1]), atol=TOLERANCE, rtol=0)


def test_a_server_killed_in_between_ends_the_run_on_all_ranks(servers, server, engine_of, config):
    """The last test: it kills the second server."""
    lost = servers[1]
    engine = engine_of(lost, temperature=0.8, retries=2)
    slow = dataclasses.replace(engine.params, max_response_length=200, end_token_ids=(), n=8)
    engine.params, engine.client.pause_seconds = slow, 0.1
    its_own = psutil.Process(lost.process.pid).children(recursive=True)
    killer = threading.Timer(0.3, os.kill, (lost.process.pid, signal.SIGKILL))
    killer.start()
    begin = time.monotonic()
    with pytest.raises(EngineLost) as error:
        for _ in range(100):
            engine.generate(load_samples(config))
    print(f"after {time.monotonic() - begin:.1f} s: {error.value}")
    assert str(error.value).startswith(f"vLLM at {lost.url} is lost: /") and "failed 3 times" in str(error.value)
    assert time.monotonic() - begin < 30
    assert its_own and not psutil.wait_procs(its_own, timeout=25)[1]
    # of two data-parallel groups one has a server: both end, and name the one that is lost
    answers = run_distributed(rollouts_of_rank, 2, config, [server.url, lost.url], server.key, {}, 0, timeout=60)
    assert all(isinstance(answer, str) and lost.url in answer for answer in answers)
