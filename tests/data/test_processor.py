import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, Qwen2_5_VLForConditionalGeneration

from nemo_vopd.config import PixelConfig
from nemo_vopd.data.processor import Processor
from nemo_vopd.errors import OptionError
from nemo_vopd.images import UnusableSample
from nemo_vopd.tools.prepare.tiny_model import write_tiny_model


def image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def hf_model(tiny_model):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_model)


def test_prompt_reads_as_the_template(processor):
    view = processor.view([image(112, 112)], "what digit is red?", [PixelConfig(3136, 12544)])
    tokens = processor.tokenizer.convert_ids_to_tokens(view.token_ids.tolist())
    assert tokens == (
        ["<|im_start|>", "user", "<|vision_start|>"]
        + ["<|image_pad|>"] * 16
        + ["<|vision_end|>", "what", "digit", "is", "red", "?", "<|im_end|>", "<|im_start|>", "assistant"]
    )
    assert view.token_ids.dtype == view.position_ids.dtype == view.grid_thw.dtype == torch.int64
    assert view.pixel_values.dtype == torch.float32 and view.pixel_values.shape == (64, 3 * 2 * 14 * 14)
    assert view.grid_thw.tolist() == [[1, 8, 8]] and view.num_tokens == len(tokens)


@pytest.mark.parametrize("sizes", [[(112, 112)], [(60, 200)], [(500, 90), (42, 42)], [(56, 84), (300, 300), (30, 31)]])
def test_positions_equal_transformers(processor, hf_model, sizes):
    view = processor.view(
        [image(*size) for size in sizes], "what digit is red?", [PixelConfig(3136, 40000)] * len(sizes)
    )
    is_image = (view.token_ids == processor.image_token_id).int()
    expected, delta = hf_model.model.get_rope_index(view.token_ids[None], is_image[None], image_grid_thw=view.grid_thw)
    assert torch.equal(view.position_ids, expected[:, 0])
    # the first response token stands at max + 1, which is what transformers' generate uses too
    assert view.position_ids.max() + 1 == view.num_tokens + delta


@pytest.mark.parametrize("size", [(112, 112), (42, 42), (333, 57), (20, 20), (1200, 900)])
def test_pixels_equal_the_public_image_processor(tiny_model, processor, size):
    public = AutoImageProcessor.from_pretrained(tiny_model, backend="pil")
    output = public(images=[image(*size)], size={"shortest_edge": 3136, "longest_edge": 200704}, return_tensors="pt")
    values, grid = processor.patches(image(*size), PixelConfig(3136, 200704))
    assert torch.equal(values, output["pixel_values"]) and torch.equal(grid, output["image_grid_thw"])
    assert 3136 <= values.shape[0] * 196 <= 200704
    # with the limits of its own file it is what transformers shows unless told
    unless_told = public(images=[image(*size)], return_tensors="pt")["pixel_values"]
    assert torch.equal(processor.patches(image(*size), processor.pixel_limits)[0], unless_told)


def test_prompt_runs_through_the_hugging_face_model(processor, hf_model):
    view = processor.view([image(112, 112), image(42, 42)], "what digit is red?", [PixelConfig(3136, 12544)] * 2)
    logits = hf_model(
        input_ids=view.token_ids[None],
        pixel_values=view.pixel_values,
        image_grid_thw=view.grid_thw,
        position_ids=view.position_ids[:, None],
        mm_token_type_ids=(view.token_ids == processor.image_token_id).int()[None],
    ).logits
    assert logits.shape == (1, view.num_tokens, processor.vocab_size) and logits.isfinite().all()


def test_special_ids(processor):
    names = processor.tokenizer.convert_ids_to_tokens
    assert names(processor.end_token_ids) == ["<|im_end|>", "<|endoftext|>"]
    assert names(processor.forbidden_token_ids) == [
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    assert names(processor.pad_token_id) == "<|endoftext|>" and processor.vocab_size == 128


def test_answer_round_trip(processor):
    ids = processor.encode_answer("it is a red 7 .")
    assert len(ids) == 7 and ids[-1] == processor.end_token_ids[0]
    assert processor.decode(ids) == "it is a red 7 ." == processor.decode(torch.tensor(ids))
    assert isinstance(processor.decode([127, 100]), str)  # rows of the padded vocabulary have no text


def test_unusable_prompts(processor):
    pixels = [PixelConfig(3136, 12544)]
    cases = {
        "empty_question": (image(56, 56), "  \n"),
        "malformed_record": (image(56, 56), "what <|image_pad|> is this?"),
        "extreme_aspect": (image(1000, 4), "what digit is red?"),
    }
    for reason, (picture, question) in cases.items():
        with pytest.raises(UnusableSample) as caught:
            processor.view([picture], question, pixels)
        assert caught.value.reason == reason


def test_incomplete_directories_are_named(tmp_path, tiny_model):
    def message():
        with pytest.raises(OptionError) as caught:
            Processor.from_pretrained(tmp_path / "copy")
        assert caught.value.option == "model.hf_path" and "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in message()
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        shutil.copytree(tiny_model, tmp_path / "copy")
        (tmp_path / "copy" / name).unlink()
        assert f"has no {name}" in message()
        (tmp_path / "copy" / name).write_text("{broken")
        assert f"{name} cannot be read" in message()
        shutil.rmtree(tmp_path / "copy")
    shutil.copytree(tiny_model, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert "not a vision-language model" in message()


def test_a_template_that_fails_for_one_question_costs_that_question(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr("nemo_vopd.data.processor.PROBE_SECONDS", 1.0)
    shutil.copytree(tiny_model, tmp_path / "copy")
    question = "messages[0]['content'][1]['text']"
    never = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = f"""<|image_pad|>{{{{ {question} }}}}
        {{% if 'blue' in {question} %}}{{{{ raise_exception('no blue') }}}}{{% endif %}}
        {{% if 'green' in {question} %}}{never}{{% endif %}}"""
    (tmp_path / "copy" / "chat_template.jinja").write_text(template)
    other = Processor.from_pretrained(tmp_path / "copy")
    for word, reason in (("blue", "no blue"), ("green", "no end within 1 seconds")):
        with pytest.raises(UnusableSample, match=f"malformed_record: the chat template ends in an error .{reason}"):
            other.view([image(28, 28)], f"is it {word}?", [PixelConfig(784, 784)])
    assert "red" in other.decode(other.view([image(28, 28)], "is it red?", [PixelConfig(784, 784)]).token_ids)


def test_non_thinking_template_and_end_token_of_the_tokenizer(tmp_path, tiny_model):
    shutil.copytree(tiny_model, tmp_path / "copy")
    template = "{{ 'a' if enable_thinking is false else 'red' }}<|image_pad|>{{ messages[0]['content'][1]['text'] }}"
    (tmp_path / "copy" / "chat_template.jinja").write_text(template)
    (tmp_path / "copy" / "generation_config.json").unlink()
    other = Processor.from_pretrained(tmp_path / "copy")
    view = other.view([image(28, 28)], "digit", [PixelConfig(784, 784)])
    assert other.decode(view.token_ids) == "a digit"
    assert other.tokenizer.convert_ids_to_tokens(other.end_token_ids) == ["<|im_end|>"]


def test_tiny_model_is_deterministic_and_initialised(tmp_path, tiny_model):
    write_tiny_model(tmp_path / "same", seed=5)
    write_tiny_model(tmp_path / "other", seed=6, num_hidden_layers=1, vision_depth=1)
    for file in tiny_model.iterdir():
        assert file.read_bytes() == (tmp_path / "same" / file.name).read_bytes(), file.name
    weights = load_file(tiny_model / "model.safetensors")
    assert "lm_head.weight" in weights and any(name.startswith("visual.") for name in weights)
    assert 0.35e6 < sum(value.numel() for value in weights.values()) < 0.5e6
    for name, value in weights.items():
        if value.ndim == 1:
            assert torch.equal(value, torch.zeros_like(value) if name.endswith("bias") else torch.ones_like(value)), (
                name
            )
        else:
            assert abs(value.std() - 0.15) < 0.02 and abs(value.mean()) < 0.02, name
    other = load_file(tmp_path / "other" / "model.safetensors")
    assert not torch.equal(other["lm_head.weight"], weights["lm_head.weight"])
    assert not any("layers.1" in name or "blocks.1" in name for name in other)


def test_tiny_model_refuses_unknown_sizes(tmp_path):
    with pytest.raises(OptionError, match="num_layers"):
        write_tiny_model(tmp_path / "x", seed=1, num_layers=3)
    assert not list(tmp_path.iterdir())


def test_random_state_is_left_alone(tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    write_tiny_model(tmp_path / "m", seed=1, tie_word_embeddings=True)
    assert torch.equal(torch.rand(3), expected)
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")
