"""vLLM for a run: its server where none is given, and the way weights get there."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_vopd.config import DataConfig, RolloutConfig
from nemo_vopd.data.processor import Processor
from nemo_vopd.errors import OptionError
from nemo_vopd.mcore.stage import Stage
from nemo_vopd.rollout.engine import SamplingParams
from nemo_vopd.rollout.vllm.engine import VLLMEngine, server_arguments
from nemo_vopd.rollout.vllm.server import start_server
from nemo_vopd.rollout.vllm.weight_sync import FolderSync, NCCLSync, together
from nemo_vopd.vlm.weights.export import iterate_hf, save_hf
from nemo_vopd.vlm.weights.reading import HFReader


def build_vllm(
    student: Stage,
    groups: ProcessGroupCollection,
    processor: Processor,
    params: SamplingParams,
    options: RolloutConfig,
    data: DataConfig,
    *,
    model_dir: str,
    folder: Path,
    num_nodes: int,
) -> VLLMEngine:
    """The engine, connected to `options.vllm.urls` or to a server that rank 0 starts on `model_dir`; collective.

    `folder` is the run's. Raises OptionError, or RunError when the server does not start.
    """
    settings = options.vllm
    urls = settings.urls
    if not urls:
        if num_nodes > 1:
            rule = f"a server that the run starts is seen on its own node only, and num_nodes={num_nodes}"
            raise OptionError("rollout.vllm.urls", urls, rule, "start servers and give their urls (docs/rollouts.md)")
        pixels = (data.full.min_pixels, data.full.max_pixels)
        length = data.max_prompt_length + options.max_response_length
        dtype = str(student.config.params_dtype).removeprefix("torch.")
        arguments = server_arguments(params, dtype=dtype, max_length=length, pixels=pixels)
        if settings.sync == "nccl":
            arguments += ["--weight-transfer-config", '{"backend": "nccl"}']
        arguments += settings.arguments

        def start() -> str:
            return start_server(
                settings.python,
                model_dir,
                arguments,
                folder / "logs" / "vllm.log",
                port=settings.port,
                start_seconds=settings.start_seconds,
            ).url

        started = [together(lambda: start() if dist.get_rank() == 0 else None)]
        dist.broadcast_object_list(started, src=0)
        urls = [url for url in started if url is not None]
    sync = None
    if settings.sync == "folder":
        write = functools.partial(save_hf, student, groups, model_dir)
        shared = Path(settings.sync_folder or folder / "rollout_weights")
        sync = FolderSync(urls, shared, write, settings.timeout_seconds)
    elif settings.sync == "nccl":
        original = HFReader(model_dir).original_name

        def tensors() -> Iterator[tuple[str, Tensor]]:
            return ((original.get(n, n), t) for n, t in iterate_hf(student, groups))

        sync = NCCLSync(urls, tensors, groups, settings.timeout_seconds)
    return VLLMEngine(
        urls,
        params,
        groups,
        processor,
        sync,
        timeout_seconds=settings.timeout_seconds,
        retries=settings.retries,
        max_concurrent_requests=settings.max_concurrent_requests,
    )
