"""A complete Hugging Face Qwen3-VL directory with random weights: the tiny model's tokenizer, another network."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.vlm.parity import VISION_IDS


def make_config(
    heads=4,
    kv_heads=2,
    head_dim=24,
    sections=(6, 3, 3),
    tie=False,
    layers=2,
    deepstack=(0, 2),
    rope_theta=5e6,
    ids=None,
):
    """A network of two or more layers; heads are wider than the hidden size divided by their number."""
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": 128,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta, "mrope_section": list(sections)},
        "tie_word_embeddings": tie,
    }
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": list(deepstack),
        "out_hidden_size": 64,
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie, **(ids or VISION_IDS))


def write_tiny_qwen3_vl(output: Path, tiny_model: Path, **options) -> Path:
    """Write the directory `output` with the network of `make_config(**options)`; tokenizer as in `tiny_model`."""
    special = AutoConfig.from_pretrained(tiny_model)
    ids = {name: getattr(special, name) for name in VISION_IDS}
    shutil.copytree(tiny_model, output, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(7)
    model = Qwen3VLForConditionalGeneration(make_config(**options, ids=ids))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    generation = (output / "generation_config.json").read_text()
    model.save_pretrained(output)
    (output / "generation_config.json").write_text(generation)
    Qwen2VLImageProcessorPil(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(output)
    return output
