"""Measure this machine: each part against a reference in the same run.

python recipes/benchmark.py loss output=loss.json
python recipes/benchmark.py rollout model.hf_path=DIR data.path=DATASET
python recipes/benchmark.py step model.hf_path=DIR data.path=DATASET
python recipes/benchmark.py data
python recipes/benchmark.py gpu output=gpu.json
"""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
from pathlib import Path

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from nemo_vopd.bounds import bounded
from nemo_vopd.cli import run_recipe
from nemo_vopd.command_line import Command
from nemo_vopd.config import Config
from nemo_vopd.errors import OptionError
from nemo_vopd.tools.prepare.tiny_model import ensure_tiny_assets
from nemo_vopd.validation import from_hydra

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is no part of the package

PARTS = ("loss", "rollout", "step", "data", "gpu")


@dataclasses.dataclass
class LossBenchmark:
    """Shapes of the fused loss."""

    num_tokens: list[int] = dataclasses.field(default_factory=lambda: [256, 512, 1024])
    vocab_size: int = 152064
    hidden_size: int = 2048


@dataclasses.dataclass
class SamplingBenchmark:
    """Shapes of sampling; each prompt has an image within data.full."""

    num_prompts: int = 32
    """Number of prompts decoded together; responses of unequal length answer three times as many."""
    prompt_tokens: int = 512
    """Length of a prompt, image included; prompts of unequal responses have half of it up to the whole."""
    response_tokens: int = 64
    """The longest response."""
    mean_response_tokens: int = 16
    """Approximate mean of unequal responses."""


class GpuPart(enum.Enum):
    """What is measured on a GPU, in the order of the default."""

    ceilings = "ceilings"
    layers = "layers"
    loss = "loss"
    decode = "decode"
    step = "step"


@dataclasses.dataclass
class GpuBenchmark:
    """Sizes of part=gpu: two layers of Qwen2.5-VL-72B's shape, sampling and a step of 3B's, random weights."""

    parts: list[GpuPart] = dataclasses.field(default_factory=lambda: list(GpuPart))
    budget_seconds: float = 420.0
    """Nothing is begun after so many seconds of measuring; imports come before."""
    resume: bool = False
    """Keep the parts that `output` holds already and that are not measured again."""
    layer_tokens: int = 8192
    """Number of tokens in the microbatch that the layers are given."""
    sequence_tokens: int = 1024
    """Number of tokens in each sequence of it."""
    loss_tokens: list[int] = dataclasses.field(default_factory=lambda: [1024, 2048, 4096, 8192])
    vocab_size: int = 152064
    """Size of the vocabulary in the loss."""
    hidden_size: int = 8192
    """Width of the hidden states in the loss."""
    decode_batches: list[int] = dataclasses.field(default_factory=lambda: [64, 256])
    """Responses decoded together."""
    prompt_tokens: int = 512
    """Number of prompt tokens in sampling and in the step, where three quarters of them are an image."""
    response_tokens: int = 128
    """Number of tokens in each sampled response."""
    step_sequences: int = 32
    step_response_tokens: int = 512
    step_microbatch_tokens: int = 4096


@dataclasses.dataclass
class DataBenchmark:
    """Sizes of part=data: recipes/prepare_data.py on synthetic JPEG files of about 1 MB."""

    num_images: int = bounded(300, at_least=1)
    larger: int = bounded(4, at_least=1)
    """Factor of the larger set of records, on which the memory is measured too."""
    workers: int = bounded(2, at_least=1)
    shard_size: int = bounded(50, at_least=1)


@dataclasses.dataclass
class BenchmarkConfig(Config):
    """A run's configuration and what to measure on it."""

    part: str = bounded("loss", one_of=PARTS)
    """loss | rollout | step | data | gpu"""
    repeats: int = bounded(3, at_least=1)
    """Number of measurements, whose median is reported."""
    output: str | None = None
    """JSON file for the results; part=gpu writes tables to FILE.md beside it."""
    loss: LossBenchmark = dataclasses.field(default_factory=LossBenchmark)
    data_files: DataBenchmark = dataclasses.field(default_factory=DataBenchmark)
    sampling: SamplingBenchmark = dataclasses.field(default_factory=SamplingBenchmark)
    gpu: GpuBenchmark = dataclasses.field(default_factory=GpuBenchmark)


ConfigStore.instance().store(name="nemo_vopd_benchmark", node=BenchmarkConfig)
COMMAND = Command(BenchmarkConfig, "benchmark", word="part")


def main(cfg: DictConfig) -> None:
    """Measure, print a table, write the JSON."""
    config = from_hydra(cfg, BenchmarkConfig)
    if config.part == "gpu":
        _gpu(config)
        return
    if config.part == "data":
        _data(config)
        return
    ensure_tiny_assets(Path(config.model.hf_path), Path(config.data.path))
    # Megatron takes seconds to import: mistakes are told first
    from benchmarks.measure import table

    if config.part == "loss":
        from benchmarks.loss import loss

        distill = config.distill
        rows = loss(**vars(config.loss), top_k=distill.top_k, alpha=distill.alpha, repeats=config.repeats)
    elif config.part == "rollout":
        from benchmarks.rollout import rollout

        rows = rollout(config, **vars(config.sampling), repeats=config.repeats)
    else:
        from benchmarks.step import step

        rows = step(config, config.repeats)
    print(table(rows))
    result = {"part": config.part, "threads": torch.get_num_threads(), "rows": rows}
    if config.output is not None:
        Path(config.output).write_text(json.dumps(result, indent=1) + "\n")


def _data(config: BenchmarkConfig) -> None:
    from benchmarks.data import data, table

    rows = data(**vars(config.data_files), repeats=config.repeats)
    print(table(rows))
    if config.output is not None:
        result = {"part": config.part, **vars(config.data_files), "rows": rows}
        Path(config.output).write_text(json.dumps(result, indent=1) + "\n")


def _gpu(config: BenchmarkConfig) -> None:
    """Tables and files appear as parts end."""
    if not torch.cuda.is_available():
        rule, remedy = "needs an NVIDIA GPU, and this machine has none", "say benchmark.py loss, rollout or step"
        raise OptionError("part", config.part, rule, remedy)
    from benchmarks import gpu

    options = {**dataclasses.asdict(config.gpu), "parts": [part.name for part in config.gpu.parts]}
    gpu.run(config, repeats=config.repeats, output=config.output, **options)


if __name__ == "__main__":
    run_recipe(main, COMMAND)
