"""Qwen2.5-VL on Megatron against transformers: logits and all gradients, tensor-parallel 1 and 2."""

import pytest
import torch
from transformers import Qwen2_5_VLConfig

from nemo_vopd.config import ParallelConfig
from nemo_vopd.errors import OptionError
from nemo_vopd.vlm.qwen2_5_vl import transformer_config
from nemo_vopd.vlm.weights.reading import open_weights
from tests.vlm.parity import VISION_IDS, build, check, check_export, check_tensor_parallel, ours, reference

CASES = {
    "untied, 4 heads on 2 groups": {},
    "tied": {"tie": True},
    "every head its own group": {"kv_heads": 4},
    "8 heads on 2 groups": {"heads": 8, "kv_heads": 2, "mrope_section": [1, 1, 2]},
    "window blocks only but one": {"depth": 3, "fullatt": [2], "window": 56},
    "full blocks only": {"depth": 2, "fullatt": [0, 1]},
    "windows of other sizes": {"depth": 2, "fullatt": [1], "window": 84},
    "a rotary base that is no integer": {"rope_theta": 10.9},
}


def make_config(
    heads=4, kv_heads=2, tie=False, depth=2, fullatt=(1,), window=56, mrope_section=(2, 3, 3), rope_theta=1e6
):
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 128,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta, "mrope_section": list(mrope_section)},
        "tie_word_embeddings": tie,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {
        "depth": depth,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": window,
        "fullatt_block_indexes": list(fullatt),
        "out_hidden_size": 64,
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie, **VISION_IDS)


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name, tmp_path, groups):
    config = make_config(**CASES[name])
    positions, *expected = reference(tmp_path, config)
    check(config, expected, ours(tmp_path, config, positions))


def test_equals_transformers_with_tensor_parallelism(tmp_path):
    check_tensor_parallel([make_config(**options) for options in CASES.values()], tmp_path)


def test_export_is_what_was_imported(tmp_path, groups):
    check_export(make_config(), tmp_path, groups)


def test_rotary_frequencies_of_the_tower_stay_float32(groups):
    """As in transformers: rounded to bfloat16, positions in large images would drift."""
    tower = build(make_config(), groups, dtype=torch.bfloat16).vision
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in tower.buffers()} == {torch.float32}


def test_layouts_that_do_not_divide_are_refused():
    config = make_config()
    with pytest.raises(OptionError, match="parallel.tensor=3: must divide the 4 attention heads; use 1 or 2"):
        transformer_config(config, ParallelConfig(tensor=3), torch.float32)


def test_a_missing_tensor_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    config = make_config()
    reference(tmp_path, config)
    tensors = load_file(tmp_path / "model.safetensors")
    key = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    del tensors[key]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(OptionError, match="lacks layers.1.mlp.up_proj.weight"):
        open_weights(tmp_path, config)
