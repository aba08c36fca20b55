"""Real vLLM servers on a tiny model, each started once for all tests that need it."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from nemo_vopd.rollout.engine import SamplingParams
from nemo_vopd.rollout.vllm.engine import server_arguments
from nemo_vopd.rollout.vllm.server import Server, start_server
from nemo_vopd.tools.prepare.tiny_model import write_tiny_model
from tests.helpers import tiny_config

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("NEMO_VOPD_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
SIZES = {"hidden_size": 128, "vision_hidden_size": 128}
"""vLLM's attention wants heads of 32 or more."""
ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
SMALL = ["--enforce-eager", "--max-num-seqs", "32"]


def params_of(processor, **changes) -> SamplingParams:
    """Sampling as a run of the tiny model has it."""
    special = {"end_token_ids": tuple(processor.end_token_ids), "forbidden_token_ids": processor.forbidden_token_ids}
    options = {"n": 3, "temperature": 1.0, "max_response_length": 8, "seed": 5, **special, **changes}
    return SamplingParams(**{**options, "forbidden_token_ids": tuple(options["forbidden_token_ids"])})


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter of vLLM's environment."""
    if not PYTHON.is_file():
        pytest.skip(f"no vLLM environment: {PYTHON} is missing (make vllm-env, or set NEMO_VOPD_VLLM_PYTHON)")
    return PYTHON


@pytest.fixture(scope="session")
def config(assets, tmp_path_factory):
    """`--config-name tiny` on a model that vLLM can run."""
    folder = tmp_path_factory.mktemp("vllm")
    write_tiny_model(folder / "wide", seed=7, **SIZES)
    return tiny_config(assets, folder / "run", f"model.hf_path={folder / 'wide'}")


@pytest.fixture(scope="session", autouse=True)
def no_key_of_the_user():
    """Servers without a key are asked without one."""
    os.environ.pop("VLLM_API_KEY", None)


@pytest.fixture(scope="session")
def servers(vllm_python, config):
    """Two servers that start at the same time: for temperature 1 and for others."""
    folder = Path(config.exp_manager["exp_dir"])

    def start(temperature: float) -> Server:
        pixels = (config.data.full.min_pixels, config.data.full.max_pixels)
        params = SamplingParams(temperature=temperature)
        arguments = server_arguments(params, dtype="float32", max_length=256, pixels=pixels) + SMALL
        log = folder / f"vllm-{temperature}.log"
        return start_server(vllm_python, config.model.hf_path, arguments, log, start_seconds=240, environment=ON_CPU)

    with ThreadPoolExecutor(2) as pool:
        starting: list[Future] = [pool.submit(start, temperature) for temperature in (1.0, 0.8)]
    started = [future.result() for future in starting if future.exception() is None]
    yield [future.result() for future in starting] if len(started) == 2 else None
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def server(servers) -> Server:
    """Whose log-probs are those of temperature 1."""
    return servers[0]
