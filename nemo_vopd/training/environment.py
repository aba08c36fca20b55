"""What serves this run: printed once at the start, so that a log tells what was really used."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path

import torch
import yaml
from megatron.core import optimizer as megatron_optimizer

from nemo_vopd.config import Config
from nemo_vopd.mcore.layers import has_fused_attention, uses_transformer_engine
from nemo_vopd.vlm.build import weights_dtype

PACKAGES = ("torch", "megatron-core", "nemo-toolkit", "transformer-engine", "apex", "megatron-energon", "transformers")


def versions() -> dict[str, str]:
    """Installed version of every package the run may use, `absent` where there is none."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def implementations(config: Config) -> dict[str, str]:
    """Which implementation serves attention, norm, matrix products and the optimizer."""
    choice, dtype, recipe = config.model.layer_spec, weights_dtype(config), config.precision.fp8.recipe
    engine, fused = uses_transformer_engine(choice, dtype), has_fused_attention(choice, dtype)
    adam = "torch AdamW"
    if not megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        adam = megatron_optimizer.Adam.__module__.split(".")[0] + " FusedAdam"
    layers = "Transformer Engine" if engine else "Megatron-Core local"
    return {
        "attention": "Transformer Engine" if fused else "torch scaled_dot_product_attention",
        "norm": "Transformer Engine" if engine else "nemo_vopd RMSNorm",
        "matrix products": f"{layers}, {config.precision.dtype}{f' and FP8 ({recipe})' if recipe else ''}",
        "optimizer": f"{adam} on float32 shards",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def write_facts(config: Config, world_size: int) -> None:
    """config.yaml and environment.json in the run's folder: what was asked for, and what served it."""
    parallel, folder = config.parallel, Path(config.exp_manager["exp_dir"])
    layout = {
        "processes": world_size,
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "data": world_size // (parallel.tensor * parallel.pipeline),
        "sequence_parallel": parallel.sequence,
    }
    facts = {"layout": layout, "implementations": implementations(config), "versions": versions()}
    options = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    for name, text in (("config.yaml", options), ("environment.json", json.dumps(facts, indent=1) + "\n")):
        partial = folder / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)


def describe(config: Config, world_size: int) -> str:
    """Two lines: implementations and layout, then versions."""
    parallel = config.parallel
    data = world_size // (parallel.tensor * parallel.pipeline)
    layout = f"tensor {parallel.tensor}, pipeline {parallel.pipeline}, data {data}"
    layout += ", sequence parallel" if parallel.sequence else ""
    served = "; ".join(f"{what}: {how}" for what, how in implementations(config).items())
    return f"layout: {layout}; {served}\nversions: " + ", ".join(f"{k} {v}" for k, v in versions().items())
