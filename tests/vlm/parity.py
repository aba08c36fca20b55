"""One forward and backward pass of a random model, through transformers and through ours, for any family."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from transformers import AutoModelForImageTextToText

from nemo_vopd.batch import Packing
from nemo_vopd.config import ParallelConfig
from nemo_vopd.mcore import parallel
from nemo_vopd.vlm.build import _FAMILIES
from nemo_vopd.vlm.weights import export
from nemo_vopd.vlm.weights.export import iterate_hf, save_hf
from nemo_vopd.vlm.weights.names import canonical
from nemo_vopd.vlm.weights.reading import load_hf, open_weights
from tests.distributed import run_distributed

IMAGE = 120
VISION_IDS = {"image_token_id": IMAGE, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}


def inputs(config):
    """Two sequences of different length (right padded), three images of different size, one at the split of tp2."""
    generator = torch.Generator().manual_seed(0)
    grid_thw = torch.tensor([[1, 10, 8], [1, 2, 4], [1, 4, 6]])
    patch = 3 * 2 * config.vision_config.patch_size**2
    pixel_values = torch.randn(80 + 8 + 24, patch, generator=generator)
    token_ids = torch.randint(0, 100, (2, 32), generator=generator)
    token_ids[0, 2:22], token_ids[0, 24:26], token_ids[1, 3:9] = IMAGE, IMAGE, IMAGE
    mask = torch.ones_like(token_ids)
    mask[1, 25:] = 0
    weights = torch.randn(2, 32, 128, generator=generator) * mask[..., None]
    return token_ids, mask, grid_thw, pixel_values, weights


def reference(folder: Path, config):
    """Save a random model and return its position ids, logits and gradients by canonical name."""
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    token_ids, mask, grid_thw, pixel_values, weights = inputs(config)
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
    return positions, output.logits.detach(), gradients


def ours(folder: Path, config, positions, tensor: int = 1, sequence: bool = False):
    """Logits [2, 32, 128] and gradients by canonical name of the model in `folder` under tensor parallelism."""
    layout = ParallelConfig(tensor=tensor, sequence=sequence)
    groups = parallel.initialize(layout, seed=1)
    model = build(config, groups, layout)
    load_hf(model, open_weights(folder, config), groups)
    token_ids, mask, grid_thw, pixel_values, weights = inputs(config)
    valid = mask.bool()  # ours are packed, with a sequence of padding to divide them under sequence parallelism
    packing = Packing.of([*mask.sum(dim=1).tolist(), 1])
    padded = [F.pad(x, (0, 1)) for x in (token_ids[valid], positions[:, valid])]
    hidden = model(*padded, packing, pixel_values, grid_thw)
    if sequence:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    packed = copy_to_tensor_model_parallel_region(hidden) @ model.output_weight().t()
    packed = gather_from_tensor_model_parallel_region(packed)[:-1, 0]
    logits = packed.new_zeros(weights.shape).masked_scatter(valid[..., None], packed)
    (logits * weights).sum().backward()
    for name, parameter in model.named_parameters():
        # finalize_model_grads does this in training: sequence parallelism splits the rows that a norm sees, tensor
        # parallelism the heads that the norms of queries and keys see
        split_rows = sequence and getattr(parameter, "sequence_parallel", False)
        if split_rows or "q_layernorm" in name or "k_layernorm" in name:
            torch.distributed.all_reduce(parameter.grad, group=groups.tp)
    named = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return logits.detach(), dict(iterate_hf(model, groups, named))


def build(config, groups, layout: ParallelConfig | None = None, dtype=torch.float32):
    """The model of `config` in one pipeline stage, its weights not filled in."""
    family = _FAMILIES[config.model_type]
    return family.Model(config, family.transformer_config(config, layout or ParallelConfig(), dtype), groups)


def check(config, expected, result) -> None:
    """Compare (logits, gradients) by the largest logit and by the norm of each gradient, and print the errors."""
    (expected_logits, expected_gradients), (logits, gradients) = expected, result
    valid = inputs(config)[1].bool()
    error = (logits - expected_logits)[valid].abs().max() / expected_logits[valid].abs().max()
    assert set(gradients) == set(expected_gradients)
    errors = {
        name: ((gradient - expected_gradients[name]).norm() / expected_gradients[name].norm().clamp_min(1e-9)).item()
        for name, gradient in gradients.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    print(f"logits {error:.1e}, gradients {errors[worst]:.1e} ({worst})")
    assert error < 1e-4
    assert errors[worst] < 1e-4, f"{worst}: {errors[worst]}"


def check_export(config, folder: Path, groups) -> None:
    """What is written after loading a random model is what was loaded, as transformers reads both."""
    reference(folder / "source", config)
    model = build(config, groups)
    load_hf(model, open_weights(folder / "source", config), groups)
    with mock.patch.object(export, "_FILE_BYTES", 2**18):
        save_hf(model, groups, folder / "source", folder / "export")
    assert len(list((folder / "export").glob("*.safetensors"))) > 2
    original, exported = (
        AutoModelForImageTextToText.from_pretrained(folder / name).state_dict() for name in ("source", "export")
    )
    assert original.keys() == exported.keys()
    assert all(torch.equal(original[name], exported[name]) for name in original)


def check_tensor_parallel(configs: list, tmp_path: Path) -> None:
    """Compare all `configs` on two ranks, without and with sequence parallelism."""
    references, jobs = [], []
    for number, config in enumerate(configs):
        folder = tmp_path / str(number)
        positions, *expected = reference(folder, config)
        for sequence in (False, True):
            references.append((config, expected))
            jobs.append((folder, config, positions, 2, sequence))
    for results in run_distributed(_run, 2, jobs):
        for (config, expected), result in zip(references, results, strict=True):
            check(config, expected, result)


def _run(jobs: list):
    results = []
    for job in jobs:
        results.append(ours(*job))
        parallel.forget_layout()
    return results
