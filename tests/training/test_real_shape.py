"""The shape of Qwen2.5-VL-3B, its vocabulary, few layers: import, export, generate, transformers; peak memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from nemo_vopd.config import PixelConfig
from nemo_vopd.data.processor import Processor
from nemo_vopd.tools.prepare.tiny_model import write_tiny_model
from tests.distributed import run_recipe
from tests.reference import response_logits

GIB = 2**30


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """0.4 billion bf16 parameters in three files; layers, tower layers and head have their real sizes."""
    folder = tmp_path_factory.mktemp("3b")
    write_tiny_model(
        folder / "float",
        seed=1,
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.02,
        vision_depth=1,
        vision_hidden_size=1280,
        vision_intermediate_size=3420,
        vision_num_heads=16,
        vision_window_size=112,
        vision_initializer_range=0.02,
    )
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "float", dtype=torch.bfloat16)
    model.save_pretrained(folder / "source", max_shard_size="400MB")
    (folder / "float" / "model.safetensors").unlink()
    for file in (folder / "float").iterdir():
        if not (folder / "source" / file.name).exists():
            file.rename(folder / "source" / file.name)
    return folder / "source"


def measure(*arguments: str) -> tuple[str, float]:
    """Standard output of a recipe and its peak resident memory in GiB."""
    done = run_recipe(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.peak_gib


def test_the_3b_shape_goes_through_import_export_and_generate(source, tmp_path):
    size = sum(file.stat().st_size for file in source.glob("*.safetensors")) / GIB
    checkpoint, exported = tmp_path / "checkpoint", tmp_path / "export"
    _, imported_gib = measure(
        "recipes/convert_checkpoint.py", "import", f"model.hf_path={source}", f"output={checkpoint}"
    )
    _, exported_gib = measure(
        "recipes/convert_checkpoint.py", "export", f"checkpoint={checkpoint}", f"output={exported}"
    )
    assert [(f.name, f.stat().st_size) for f in sorted(source.iterdir())] == [
        (f.name, f.stat().st_size) for f in sorted(exported.iterdir())
    ]
    Image.effect_noise((280, 196), 80).convert("RGB").save(tmp_path / "image.png")
    request = [f"image={tmp_path}/image.png", "prompt='what digit is it?'", "max_new_tokens=8", "precision.dtype=fp32"]
    output, generated_gib = measure("recipes/generate.py", f"model.hf_path={exported}", *request)
    reply = json.loads(output)
    print(
        f"bf16 files {size:.2f} GiB; peak: import {imported_gib:.2f}, export {exported_gib:.2f}, "
        f"generate in float32 {generated_gib:.2f} GiB"
    )
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(exported, dtype=torch.float32)
    processor = Processor.from_pretrained(exported)
    view = processor.view([Image.open(tmp_path / "image.png")], "what digit is it?", [PixelConfig()])
    logits = response_logits(model, view, torch.tensor(reply["token_ids"]))
    forbidden = torch.tensor(processor.forbidden_token_ids)
    assert logits.index_fill(-1, forbidden, -torch.inf).argmax(-1).tolist() == reply["token_ids"]
    # an export holds one file and, while torch's reader copies it, three times one float32 matrix (the head: 1.16 GiB)
    assert exported_gib < 4.5 and imported_gib < 5 and generated_gib < 5
