"""The rollout engine that a run asks for: the training model itself, vLLM servers, or a file."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_vopd.batch import Sample
from nemo_vopd.config import DataConfig, RolloutConfig
from nemo_vopd.data.processor import Processor
from nemo_vopd.errors import OptionError
from nemo_vopd.mcore.stage import Stage
from nemo_vopd.rollout.ahead import AheadEngine
from nemo_vopd.rollout.engine import RolloutEngine, SamplingParams
from nemo_vopd.rollout.native.engine import MegatronEngine
from nemo_vopd.rollout.replay import ReplayEngine
from nemo_vopd.rollout.vllm.engine import VLLMEngine, server_arguments
from nemo_vopd.rollout.vllm.server import start_server
from nemo_vopd.rollout.vllm.weight_sync import FolderSync, NCCLSync, together
from nemo_vopd.vlm.weights.export import iterate_hf, save_hf
from nemo_vopd.vlm.weights.reading import HFReader


class EngineInputs(NamedTuple):
    """What every engine samples with."""

    student: Stage
    groups: ProcessGroupCollection
    processor: Processor
    params: SamplingParams


class ServerPlace(NamedTuple):
    """Where a vLLM server of a run starts, and from what."""

    model_dir: str
    """Model directory that the server loads; weights are sent in its format."""
    folder: Path
    """Folder of the run, for the log and for weights on their way."""
    num_nodes: int


def build_engine(
    inputs: EngineInputs,
    options: RolloutConfig,
    data: DataConfig,
    place: ServerPlace,
    upcoming: Callable[[], list[Sample]],
) -> RolloutEngine:
    """The engine that `options.engine` names; collective. `upcoming` gives the samples of the next step.

    Raises OptionError, or RunError when a server does not start.
    """
    if options.engine == "replay":
        assert options.path is not None  # validated
        return ReplayEngine(options.path, options.n, inputs.processor.vocab_size)
    if options.engine == "vllm":
        engine = build_vllm(inputs, options, data, place)
        return AheadEngine(engine, upcoming) if options.ahead else engine
    student, groups, processor, params = inputs
    return MegatronEngine(student, groups, params, options.max_batch_tokens, processor.decode)


def build_vllm(inputs: EngineInputs, options: RolloutConfig, data: DataConfig, place: ServerPlace) -> VLLMEngine:
    """vLLM on `options.vllm.urls`, whose key is in the environment, or on a server that rank 0 starts."""
    student, groups, processor, params = inputs
    settings = options.vllm
    if settings.urls:
        urls, key = settings.urls, os.environ.get("VLLM_API_KEY")
    else:
        urls, key = _start_server(inputs, options, data, place)
    sync = None
    if settings.sync == "folder":
        write = functools.partial(save_hf, student, groups, place.model_dir)
        shared = Path(settings.sync_folder or place.folder / "rollout_weights")
        sync = FolderSync(urls, shared, write, settings.timeout_seconds, key)
    elif settings.sync == "nccl":
        original = HFReader(place.model_dir).original_name

        def tensors() -> Iterator[tuple[str, Tensor]]:
            return ((original.get(n, n), t) for n, t in iterate_hf(student, groups))

        sync = NCCLSync(urls, tensors, groups, settings.timeout_seconds, key)
    return VLLMEngine(
        urls,
        params,
        groups,
        processor,
        sync,
        key=key,
        timeout_seconds=settings.timeout_seconds,
        retries=settings.retries,
        max_concurrent_requests=settings.max_concurrent_requests,
    )


def _start_server(
    inputs: EngineInputs, options: RolloutConfig, data: DataConfig, place: ServerPlace
) -> tuple[list[str], str]:
    """The address (a list of one) and the key, on every rank, of a server that rank 0 has started."""
    settings = options.vllm
    if place.num_nodes > 1:
        rule = f"a server that the run starts is seen on its own node only, and num_nodes={place.num_nodes}"
        remedy = "start servers and give their urls (docs/rollouts.md)"
        raise OptionError("rollout.vllm.urls", settings.urls, rule, remedy)
    pixels = (data.full.min_pixels, data.full.max_pixels)
    length = data.max_prompt_length + options.max_response_length
    dtype = str(inputs.student.config.params_dtype).removeprefix("torch.")
    arguments = server_arguments(inputs.params, dtype=dtype, max_length=length, pixels=pixels)
    if settings.sync == "nccl":
        arguments += ["--weight-transfer-config", '{"backend": "nccl"}']
    arguments += settings.arguments
    limits = {"port": settings.port, "start_seconds": settings.start_seconds}

    def start() -> tuple[list[str], str] | None:
        if dist.get_rank() > 0:
            return None
        log = place.folder / "logs" / "vllm.log"
        server = start_server(settings.python, place.model_dir, arguments, log, **limits)
        return [server.url], server.key

    started = [together(start)]
    dist.broadcast_object_list(started, src=0)
    assert started[0] is not None
    return started[0]
