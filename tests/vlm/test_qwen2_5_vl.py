"""Qwen2.5-VL on Megatron against transformers: logits and all gradients, tensor-parallel 1 and 2."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from nemo_vopd.config import ParallelConfig
from nemo_vopd.errors import OptionError
from nemo_vopd.mcore import parallel
from nemo_vopd.vlm.hf_weights import canonical, iterate_hf, load_hf, save_hf
from nemo_vopd.vlm.qwen2_5_vl import Qwen2_5_VL, transformer_config
from tests.distributed import run_distributed

CASES = {
    "untied, 4 heads on 2 groups": {},
    "tied": {"tie": True},
    "every head its own group": {"kv_heads": 4},
    "8 heads on 2 groups": {"heads": 8, "kv_heads": 2, "mrope_section": [1, 1, 2]},
    "window blocks only but one": {"depth": 3, "fullatt": [2], "window": 56},
    "full blocks only": {"depth": 2, "fullatt": [0, 1]},
    "windows of other sizes": {"depth": 2, "fullatt": [1], "window": 84},
}
IMAGE = 120


def make_config(heads=4, kv_heads=2, tie=False, depth=2, fullatt=(1,), window=56, mrope_section=(2, 3, 3)):
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 128,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(mrope_section)},
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
    ids = {"image_token_id": IMAGE, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie, **ids)


def inputs():
    """Two sequences of different length (right padded) with images of different size."""
    generator = torch.Generator().manual_seed(0)
    grid_thw = torch.tensor([[1, 10, 8], [1, 4, 6]])
    pixel_values = torch.randn(80 + 24, 3 * 2 * 14 * 14, generator=generator)
    token_ids = torch.randint(0, 100, (2, 32), generator=generator)
    token_ids[0, 2:22], token_ids[1, 3:9] = IMAGE, IMAGE
    mask = torch.ones_like(token_ids)
    mask[1, 25:] = 0
    weights = torch.randn(2, 32, 128, generator=generator) * mask[..., None]
    return token_ids, mask, grid_thw, pixel_values, weights


def reference(folder: Path, options: dict):
    """Save a random model and return its logits, position ids and gradients."""
    torch.manual_seed(1)
    config = make_config(**options)
    model = Qwen2_5_VLForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    token_ids, mask, grid_thw, pixel_values, weights = inputs()
    is_image = (token_ids == IMAGE).int()
    positions, _ = model.model.get_rope_index(token_ids, is_image, image_grid_thw=grid_thw, attention_mask=mask)
    output = model(
        input_ids=token_ids,
        attention_mask=mask,
        position_ids=positions,
        pixel_values=pixel_values,
        image_grid_thw=grid_thw,
    )
    (output.logits * weights).sum().backward()
    gradients = {canonical(name): parameter.grad for name, parameter in model.named_parameters()}
    return config, positions, output.logits.detach(), gradients


def ours(folder: Path, config, positions, tensor: int, sequence: bool = False):
    """Logits [2, 32, 128] and gradients by canonical name under tensor parallelism."""
    layout = ParallelConfig(tensor=tensor, sequence=sequence)
    groups = parallel.initialize(layout, seed=1)
    model = Qwen2_5_VL(config, transformer_config(config, layout, torch.float32), groups)
    load_hf(model, model.weight_rule, folder, groups)
    token_ids, _, grid_thw, pixel_values, weights = inputs()
    hidden = model(token_ids, positions, pixel_values, grid_thw)
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
    )

    if sequence:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    logits = copy_to_tensor_model_parallel_region(hidden) @ model.output_weight().t()
    logits = gather_from_tensor_model_parallel_region(logits).transpose(0, 1)
    (logits * weights).sum().backward()
    if sequence:  # finalize_model_grads does this in training
        for parameter in model.parameters():
            if getattr(parameter, "sequence_parallel", False):
                torch.distributed.all_reduce(parameter.grad, group=groups.tp)
    named = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return logits.detach(), dict(iterate_hf(model, model.weight_rule, groups, named))


def check(expected_logits, expected_gradients, logits, gradients):
    _, mask, *_ = inputs()
    valid = mask.bool()
    scale = expected_logits[valid].abs().max()
    assert (logits - expected_logits)[valid].abs().max() / scale < 1e-4
    assert set(gradients) == set(expected_gradients)
    for name, gradient in gradients.items():
        error = (gradient - expected_gradients[name]).norm() / expected_gradients[name].norm().clamp_min(1e-9)
        assert error < 1e-4, f"{name}: {error}"


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name, tmp_path, groups):
    config, positions, logits, gradients = reference(tmp_path, CASES[name])
    check(logits, gradients, *ours(tmp_path, config, positions, tensor=1))


def _tensor_parallel_cases(folders_and_cases):
    results = []
    for folder, config, positions, sequence in folders_and_cases:
        results.append(ours(folder, config, positions, 2, sequence))
        parallel.forget_layout()
    return results


def test_equals_transformers_with_tensor_parallelism(tmp_path):
    references, jobs = [], []
    for number, options in enumerate(CASES.values()):
        folder = tmp_path / str(number)
        config, positions, logits, gradients = reference(folder, options)
        for sequence in (False, True):
            references.append((logits, gradients))
            jobs.append((folder, config, positions, sequence))
    for rank_results in run_distributed(_tensor_parallel_cases, 2, jobs):
        for expected, result in zip(references, rank_results, strict=True):
            check(*expected, *result)


def test_export_is_what_was_imported(tmp_path, groups):
    config, *_ = reference(tmp_path / "source", {})
    model = Qwen2_5_VL(config, transformer_config(config, ParallelConfig(), torch.float32), groups)
    load_hf(model, model.weight_rule, tmp_path / "source", groups)
    save_hf(model, model.weight_rule, groups, tmp_path / "source", tmp_path / "export")
    original = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "source").state_dict()
    exported = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "export").state_dict()
    assert original.keys() == exported.keys()
    assert all(torch.equal(original[name], exported[name]) for name in original)


def test_layouts_that_do_not_divide_are_refused():
    config = make_config()
    with pytest.raises(OptionError, match="parallel.tensor=3: must divide the 4 attention heads; use 1 or 2"):
        transformer_config(config, ParallelConfig(tensor=3), torch.float32)


def test_a_missing_tensor_is_named(tmp_path, groups):
    from safetensors.torch import load_file, save_file

    config, *_ = reference(tmp_path, {})
    tensors = load_file(tmp_path / "model.safetensors")
    key = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    del tensors[key]
    save_file(tensors, tmp_path / "model.safetensors")
    model = Qwen2_5_VL(config, transformer_config(config, ParallelConfig(), torch.float32), groups)
    with pytest.raises(OptionError, match="has no tensor layers.1.mlp.up_proj.weight"):
        load_hf(model, model.weight_rule, tmp_path, groups)
