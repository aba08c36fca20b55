"""Models with random weights that part=gpu times, built by what builds a training run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from omegaconf import OmegaConf
from transformers import AutoConfig

from nemo_vopd.batch import View
from nemo_vopd.cli import CONF
from nemo_vopd.config import Config, PrecisionConfig
from nemo_vopd.mcore import cpu, fp8
from nemo_vopd.mcore.stage import Stage
from nemo_vopd.tools.planning.compute import forward_cost
from nemo_vopd.tools.planning.count import count_stage
from nemo_vopd.tools.planning.workload import Packed, patch_width
from nemo_vopd.vlm.build import build_stage

Architecture = dict[str, Any]
"""Contents of a config.json."""

MERGED = 4
"""Patches of an image token."""


def architecture(name: str) -> Architecture:
    """The published architecture in conf/model/`name`.yaml."""
    return OmegaConf.to_container(OmegaConf.load(Path(CONF) / "model" / f"{name}.yaml").architecture)  # type: ignore[return-value]


def hf_config(sizes: Architecture) -> Any:
    """The Hugging Face configuration of `sizes`."""
    contents = dict(sizes)
    return AutoConfig.for_model(contents.pop("model_type"), **contents)


def with_precision(config: Config, name: str) -> Config:
    """`config` with the precision of conf/precision/`name`.yaml."""
    file = OmegaConf.load(Path(CONF) / "precision" / f"{name}.yaml")
    precision: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PrecisionConfig), file))
    return dataclasses.replace(config, precision=precision)


def build(sizes: Architecture, config: Config, groups: ProcessGroupCollection) -> Stage:
    """The model of `sizes` with random weights, made on the device: on a CPU billions of them take a while."""
    fp8.check_machine(config)
    with torch.device(cpu.device()):
        stage = build_stage(hf_config(sizes), config, groups, initialize=True)
    return stage.to(cpu.device())


def layer_products(sizes: Architecture, num_tokens: int) -> list[tuple[int, int, int]]:
    """(m, n, k) of the matrix products [m, k] x [k, n] of a language layer's forward pass on `num_tokens` tokens."""
    hidden, ffn, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]
    width = hidden // heads
    qkv = (heads + 2 * sizes["num_key_value_heads"]) * width
    shapes = [(qkv, hidden), (hidden, heads * width), (2 * ffn, hidden), (hidden, ffn)]
    return [(num_tokens, n, k) for n, k in shapes]


def num_parameters(sizes: Architecture) -> int:
    """Parameters of the layers, the embedding, the head and the tower's blocks, rounded down: norms are left out."""
    vision = sizes["vision_config"]
    width, ffn = vision["hidden_size"], vision["intermediate_size"]
    layers = sizes["num_hidden_layers"] * sum(n * k for _, n, k in layer_products(sizes, 1))
    embeddings = (1 if sizes.get("tie_word_embeddings") else 2) * sizes["vocab_size"] * sizes["hidden_size"]
    return layers + embeddings + vision["depth"] * width * (4 * width + 3 * ffn)


def operations(stage: Stage, packed: Packed) -> float:
    """Of a forward pass, without the head: 2 for each weight and token, attention's and the vision tower's added."""
    return forward_cost(stage.chunks[0].hf, stage.config, count_stage(stage, data_parallel=1), packed).total


def text(num_sequences: int, num_tokens: int) -> Packed:
    """Sizes of a microbatch of `num_sequences` texts, `num_tokens` in all."""
    none = {"num_image_tokens": 0, "num_patches": 0, "num_response_rows": 0}
    return Packed(num_sequences=num_sequences, num_tokens=num_tokens, num_prompts=num_sequences, **none)


def view(sizes: Architecture, num_tokens: int, grid: int, random: torch.Generator) -> View:
    """A prompt of `num_tokens` random tokens, the first of them an image of `grid` x `grid` tokens (0: none)."""
    side, width = grid * math.isqrt(MERGED), patch_width(hf_config(sizes).vision_config) if grid else 1
    # the first half of the vocabulary: special tokens, which would stand for images, are in the other
    token_ids = torch.randint(0, sizes["vocab_size"] // 2, (num_tokens,), generator=random)
    token_ids[: grid * grid] = sizes["image_token_id"]
    return View(
        token_ids=token_ids,
        position_ids=torch.arange(num_tokens).expand(3, -1),
        pixel_values=torch.randn(side * side, width, generator=random),
        grid_thw=torch.tensor([[1, side, side]] if grid else [], dtype=torch.int64).view(-1, 3),
    )
