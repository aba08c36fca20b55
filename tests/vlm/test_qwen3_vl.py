"""Qwen3-VL on Megatron against transformers: logits, all gradients, decoding, whole training steps."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from nemo_vopd.config import ParallelConfig, PixelConfig
from nemo_vopd.data.processor import Processor
from nemo_vopd.errors import OptionError
from nemo_vopd.vlm.qwen3_vl import transformer_config
from nemo_vopd.vlm.weights.reading import load_hf, open_weights
from tests.data.test_processor import image
from tests.distributed import run_distributed
from tests.helpers import made_up_rollouts, tiny_config, write_rollouts
from tests.reference import ReferenceOptions, run_reference
from tests.rollout.native.test_engine import LENGTH, load_samples, sample_responses
from tests.test_step import EPS, LR, SMALL, run
from tests.test_step import check as check_steps
from tests.vlm.parity import build, check, check_export, check_tensor_parallel, inputs, ours, reference
from tests.vlm.tiny_qwen3_vl import make_config, write_tiny_qwen3_vl

CASES = {
    "untied, 4 heads on 2 groups": {},
    "tied, as many features as layers": {"tie": True, "deepstack": [0, 1, 2], "layers": 3},
    "every head its own group": {"kv_heads": 4, "head_dim": 16, "sections": [3, 3, 2]},
    "8 heads on 2 groups, one feature": {"heads": 8, "head_dim": 8, "sections": [2, 1, 1], "deepstack": [1]},
    "no features for the layers": {"deepstack": []},
    "a rotary base that is no integer": {"rope_theta": 10.9},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name, tmp_path, groups):
    config = make_config(**CASES[name])
    positions, *expected = reference(tmp_path, config)
    check(config, expected, ours(tmp_path, config, positions))


def test_equals_transformers_with_tensor_parallelism(tmp_path):
    check_tensor_parallel([make_config(**options) for options in CASES.values()], tmp_path)


def test_export_is_what_was_imported(tmp_path, groups):
    check_export(make_config(), tmp_path, groups)


def test_the_tower_in_bf16_is_the_hugging_face_one(tmp_path, groups):
    """Its rotary frequencies stay float32: rounded to 8 bits, positions of large images would drift."""
    config = make_config()
    reference(tmp_path, config)
    model = build(config, groups, dtype=torch.bfloat16)
    load_hf(model, open_weights(tmp_path, config), groups)
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).model.visual
    _, _, grid_thw, pixel_values, _ = inputs(config)
    expected = theirs(pixel_values.bfloat16(), grid_thw)
    features, added = model.image_features(pixel_values.bfloat16(), grid_thw)
    assert torch.equal(features, expected.pooler_output)
    assert all(torch.equal(a, b) for a, b in zip(added, expected.deepstack_features, strict=True))


@pytest.mark.parametrize(
    "parallel,message",
    [
        (
            ParallelConfig(pipeline=3),
            r"parallel.pipeline=3: gives the first chunk 2 of the 6 language layers, of which the first 3 stay "
            r"together; say how many each stage gets, parallel.pipeline_layout=\[3,2,1\]",
        ),
        (ParallelConfig(pipeline=2, pipeline_layout=[2, 4]), r"=\[2,4\]: must name .* stay together; use .*=\[3,3\]"),
        (ParallelConfig(pipeline=5), "exceeds the 6 language layers, of which the first 3 stay .* use 4 stages"),
        (ParallelConfig(pipeline=2, virtual_pipeline=3), "times parallel.virtual_pipeline=3 exceeds the 6 language"),
    ],
)
def test_layouts_that_part_the_first_layers_are_refused(parallel, message):
    with pytest.raises(OptionError, match=message):
        transformer_config(make_config(layers=6, deepstack=[0, 1, 2]), parallel, torch.float32)


@pytest.fixture(scope="module")
def tiny(assets, tmp_path_factory):
    """Four layers, features added after the first two."""
    return write_tiny_qwen3_vl(tmp_path_factory.mktemp("qwen3") / "tiny", assets / "tiny-vlm", layers=4)


@pytest.mark.parametrize("sizes", [[(128, 128)], [(60, 200)], [(64, 96), (300, 300), (30, 31)]])
def test_prompts_equal_transformers(sizes, tiny):
    processor, model = Processor.from_pretrained(tiny), Qwen3VLForConditionalGeneration.from_pretrained(tiny)
    view = processor.view(
        [image(*size) for size in sizes], "what digit is red?", [PixelConfig(4096, 40960)] * len(sizes)
    )
    is_image = (view.token_ids == processor.image_token_id).int()
    expected, delta = model.model.get_rope_index(view.token_ids[None], is_image[None], image_grid_thw=view.grid_thw)
    assert torch.equal(view.position_ids, expected[:, 0])
    assert view.position_ids.max() + 1 == view.num_tokens + delta
    assert view.pixel_values.shape == (int(view.grid_thw.prod(dim=1).sum()), 3 * 2 * 16 * 16)
    features = model.get_image_features(view.pixel_values, view.grid_thw).pooler_output
    assert sum(len(part) for part in features) == is_image.sum()


def test_greedy_equals_transformers_generate(tiny, assets, tmp_path):
    model = Qwen3VLForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32)
    layouts = [
        (1, []),
        (2, ["parallel.tensor=2"]),
        (2, ["parallel.tensor=2", "parallel.sequence=true"]),
        (2, ["parallel.pipeline=2"]),
    ]
    hf_path = f"model.hf_path={tiny}"
    config = tiny_config(assets, tmp_path, hf_path)
    expected = []
    for sample in load_samples(config):
        view = sample.student
        generated = model.generate(
            input_ids=view.token_ids[None],
            attention_mask=torch.ones_like(view.token_ids)[None],
            mm_token_type_ids=(view.token_ids == model.config.image_token_id).int()[None],
            pixel_values=view.pixel_values,
            image_grid_thw=view.grid_thw,
            do_sample=False,
            max_new_tokens=LENGTH,
            min_new_tokens=LENGTH,
            eos_token_id=None,
            suppress_tokens=Processor.from_pretrained(tiny).forbidden_token_ids,
        )
        expected.append(generated[0, view.num_tokens :].tolist())
    assert len({tuple(tokens) for tokens in expected}) > 1
    for world_size, overrides in layouts:
        config = tiny_config(assets, tmp_path, hf_path, *overrides)
        for answers in run_distributed(sample_responses, world_size, config, 100000, 0.0, 1, ()):
            assert [tokens.tolist() for ((tokens, _),) in answers] == expected, overrides


TENSOR = ["parallel.tensor=2"]
INTERLEAVED = ["parallel.pipeline=3", "parallel.virtual_pipeline=2", "parallel.pipeline_layout=[2,1,1,1,1,1]"]


@pytest.mark.parametrize(
    "layers,tie,layouts",
    [
        (4, False, [(2, TENSOR), (2, [*TENSOR, "parallel.sequence=true", SMALL])]),
        (4, True, [(2, ["parallel.pipeline=2", SMALL])]),
        (7, False, [(3, [*INTERLEAVED, SMALL])]),
    ],
    ids=["tp2", "pp2 tied", "pp3 interleaved"],
)
def test_steps_equal_the_oracle(layers, tie, layouts, assets, tmp_path):
    hf_path = write_tiny_qwen3_vl(tmp_path / "model", assets / "tiny-vlm", layers=layers, tie=tie)
    model = f"model.hf_path={hf_path}"
    steps = made_up_rollouts(tiny_config(assets, tmp_path, model), 2, seed=4)
    recorded = tmp_path / "rollouts.jsonl"
    write_rollouts(recorded, steps)
    expected = run_reference(hf_path, steps, ReferenceOptions(lr=LR, eps=EPS))
    for number, (world_size, overrides) in enumerate(layouts):
        overrides = [*overrides, model, "trainer.max_steps=2"]
        metrics, ranks = run(assets, tmp_path / str(number), recorded, world_size, overrides, num_steps=2)
        check_steps(metrics, ranks, expected, loss=1e-5, grad_norm=1e-5, weights={"atol": 1e-6, "rtol": 1e-5})
