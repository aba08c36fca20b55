"""The real sharded model of every pipeline stage, on the meta device, in a simulated world of GPUs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig

from nemo_vopd.config import Config
from nemo_vopd.errors import OptionError
from nemo_vopd.mcore import cpu, parallel
from nemo_vopd.mcore.stage import Stage
from nemo_vopd.vlm.build import build_stage, freeze, hf_config


@dataclass(frozen=True)
class StageCount:
    """What one rank of a pipeline stage holds; its buffers are those of Megatron's DDP and distributed optimizer."""

    num_parameters: int
    """Elements on this rank; the tower and the norms are copies on every tensor-parallel rank."""
    num_frozen: int
    num_padded: int
    """Elements of the weight buffer, and of the gradient buffer, of the trainable parameters."""
    num_owned: int
    """Parameter elements the fullest data-parallel rank owns: main weights, both moments, the teacher's average."""
    chunk_layers: tuple[int, ...]
    """Language layers of each chunk, in order of depth."""
    num_layer_weights: int
    """Elements of one language layer's matrices on this rank (0 without a layer)."""
    num_vision_blocks: int
    """Elements of the tower's matrices that every patch passes (0 after the first stage)."""
    num_merger: int
    """Elements of the projector's matrices: one product for each image token."""
    num_head: int
    """Elements of the head's rows on this rank (0 before the last stage)."""

    @property
    def num_layers(self) -> int:
        """Number of language layers."""
        return sum(self.chunk_layers)


@dataclass(frozen=True)
class ModelCount:
    """The whole model: totals without copies, and every stage."""

    num_text: int
    num_vision: int
    stages: list[StageCount]
    megatron: TransformerConfig
    data_parallel: int


def architecture(config: Config) -> Any:
    """The Hugging Face configuration: of `model.hf_path` where it exists, else `model.architecture`."""
    if (Path(config.model.hf_path) / "config.json").is_file() or config.model.architecture is None:
        return hf_config(config)
    contents = dict(config.model.architecture)
    kind = contents.pop("model_type", None)
    if kind is None:
        raise OptionError("model.architecture", "?", "has no model_type", "give the contents of a config.json")
    return AutoConfig.for_model(kind, **contents)


def count_model(config: Config, hf: Any, world_size: int) -> ModelCount:
    """Build every stage and count. Raises OptionError when the sizes do not divide."""
    cpu.activate()
    parallel.check_world(config.parallel, world_size)
    # Transformer Engine fuses norms into linear layers under other names: the same parameters, and it needs a GPU
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, layer_spec="local"))
    num_stages, tensor = config.parallel.pipeline, config.parallel.tensor
    data_parallel = world_size // (tensor * num_stages)
    stages, totals, megatron = [], [0, 0], None
    assert not dist.is_initialized(), "a plan is made in a process of its own"
    for number in range(num_stages):
        rank = number * (world_size // num_stages)  # Megatron numbers tensor, then data, then pipeline ranks
        # a world that does not exist: its collectives return at once
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            groups = parallel.initialize(config.parallel, seed=0)
            with torch.device("meta"):
                stage = build_stage(hf, config, groups)
            freeze(stage, config.model.freeze)
            for name, parameter in stage.named_parameters():
                # neither replicas nor a tied embedding's second appearance count
                rule = stage.weight_rule(name)
                copies = 1 if rule.split == "replicated" else tensor
                totals[".vision." in name] += parameter.numel() * copies * rule.export
            stages.append(count_stage(stage, data_parallel))
            megatron = stage.config
        finally:
            parallel.destroy()
    assert megatron is not None
    return ModelCount(totals[False], totals[True], stages, megatron, data_parallel)


def count_stage(stage: Stage, data_parallel: int) -> StageCount:
    """Count one rank's `stage`, on any device; frozen parameters are those without gradient."""
    named = dict(stage.named_parameters())
    matrices = {name: p.numel() for name, p in named.items() if p.dim() > 1}
    vision = {name: num for name, num in matrices.items() if ".vision." in name}
    merger = sum(num for name, num in vision.items() if "merger" in name)
    chunk_layers = tuple(len(chunk.language.decoder.layers) for chunk in stage.chunks)
    layers = sum(num for name, num in matrices.items() if ".decoder.layers." in name)
    padded, owned = zip(*(_buffers(list(chunk.parameters()), data_parallel) for chunk in stage.chunks), strict=True)
    last = stage.chunks[-1]
    return StageCount(
        num_parameters=sum(p.numel() for p in named.values()),
        num_frozen=sum(p.numel() for p in named.values() if not p.requires_grad),
        num_padded=sum(padded),
        num_owned=sum(owned),
        chunk_layers=chunk_layers,
        num_layer_weights=layers // max(1, sum(chunk_layers)),
        num_vision_blocks=sum(vision.values()) - merger,
        num_merger=merger,
        num_head=last.output_weight().numel() if last.post_process else 0,
    )


def _buffers(parameters: list[torch.nn.Parameter], data_parallel: int) -> tuple[int, int]:
    """(elements, those of the fullest rank) of a chunk's buffer.

    As Megatron's `_ParamAndGradBuffer` without overlap: one bucket, and one for each tied embedding.
    """
    ranges: list[tuple[int, int]] = []
    bounds, end, divisor = [0], 0, math.lcm(data_parallel, 128)
    for parameter in reversed([p for p in parameters if p.requires_grad]):
        start, alone = _up(end, 64), getattr(parameter, "shared_embedding", False)
        if alone and start > bounds[-1]:
            start = _up(end, divisor)
            bounds.append(start)
        end = start + parameter.numel()
        ranges.append((start, end))
        if alone:
            end = _up(end, divisor)
            bounds.append(end)
    if end > bounds[-1]:
        bounds.append(_up(end, divisor))
    owned = [0] * data_parallel
    for low, high in zip(bounds[:-1], bounds[1:], strict=True):
        width = (high - low) // data_parallel
        for rank in range(data_parallel):
            left = low + rank * width
            owned[rank] += sum(max(0, min(left + width, b) - max(left, a)) for a, b in ranges)
    return bounds[-1], max(owned, default=0)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
