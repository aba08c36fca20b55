"""Model directories of strangers: each gives transformers' logits, or one line that names file and rule."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from nemo_vopd.batch import Packing
from nemo_vopd.config import Config, ModelConfig, PixelConfig, PrecisionConfig
from nemo_vopd.data.processor import Processor
from nemo_vopd.errors import OptionError
from nemo_vopd.tools.prepare.tiny_model import write_tiny_model
from nemo_vopd.vlm.build import build_vlm, check_model, weights_dtype
from tests.vlm.tiny_qwen3_vl import write_tiny_qwen3_vl


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    write_tiny_model(folder / "qwen2_5", seed=5)
    write_tiny_model(folder / "tied", seed=5, tie_word_embeddings=True)
    write_tiny_qwen3_vl(folder / "qwen3", folder / "qwen2_5")
    return folder


def edit(name, **changes):
    """Change fields of the JSON file `name`; "a.b" is field b of a, and a value of `DROP` takes the field out."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        for key, value in changes.items():
            place = content
            *path, last = key.split("__")
            for part in path:
                place = place[part]
            if value is DROP:
                del place[last]
            else:
                place[last] = value
        (folder / name).write_text(json.dumps(content))

    return apply


DROP = object()
TEXT, VISION = "text_config__", "vision_config__"


def config(**changes):
    return edit("config.json", **changes)


def text(**changes):
    return config(**{TEXT + key: value for key, value in changes.items()})


def vision(**changes):
    return config(**{VISION + key: value for key, value in changes.items()})


def pixels(**changes):
    return edit("preprocessor_config.json", **changes)


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def weights(change):
    """Change the dictionary of tensors in model.safetensors."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def sharded(folder: Path, stray: bool = False) -> None:
    """Two files and an index; with `stray` a third of an earlier save, with other numbers, which the index lacks."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if stray:
        save_file({name: tensors[name] + 1 for name in names[:5]}, folder / "model-00001-of-00003.safetensors")


def as_hub(folder: Path) -> None:
    """The flat config.json of the Hub's first Qwen2.5-VL, with its old names."""
    content = json.loads((folder / "config.json").read_text())
    inner = content.pop("text_config")
    rope = inner.pop("rope_parameters")
    inner.pop("model_type")
    inner.pop("layer_types")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    content |= inner | {"rope_scaling": scaling, "rope_theta": 10.9, "sliding_window": 8, "use_sliding_window": False}
    content["vision_config"] |= {"in_chans": 3, "spatial_patch_size": 14}
    (folder / "config.json").write_text(json.dumps(content))


def as_transformers_5(folder: Path) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    content = {"processor_class": "Qwen2_5_VLProcessor", "image_processor": settings}
    (folder / "processor_config.json").write_text(json.dumps(content))


def newer_names(folder: Path) -> None:
    """Names as transformers has them since its version 5, beside a rotary table as the first files had."""

    def rename(tensors):
        for name in list(tensors):
            inner = name.removeprefix("model.")
            if inner != name:
                tensors[f"model.language_model.{inner}"] = tensors.pop(name)
            elif name.startswith("visual."):
                tensors[f"model.{name}"] = tensors.pop(name)
        tensors["model.language_model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)

    weights(rename)(folder)


def both(*changes):
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def store_head(difference):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + difference

    return weights(change)


def rename_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")


def old_beside(folder: Path) -> None:
    """A second file with the same names and other numbers."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value + 1 for name, value in tensors.items()}, folder / "a.safetensors")


ROPE = {"rope_type": "default", "rope_theta": 10.9, "mrope_section": [2, 3, 3]}
ACCEPTED = {
    "theta is no whole number": ("qwen2_5", text(rope_parameters=ROPE)),
    "sections with a zero": ("qwen2_5", text(rope_parameters=ROPE | {"mrope_section": [0, 4, 4]})),
    "as on the Hub": ("qwen2_5", as_hub),
    "norms of another epsilon": ("qwen2_5", text(rms_norm_eps=0.1)),
    "windows of another size": ("qwen2_5", vision(window_size=28)),
    "another activation in the tower": ("qwen2_5", vision(hidden_act="gelu")),
    "every layer of the tower sees all": ("qwen2_5", vision(fullatt_block_indexes=[0, 1])),
    "another theta in the tower": ("qwen2_5", vision(rope_parameters={"rope_type": "axial", "rope_theta": 50.0})),
    "tied": ("tied", lambda folder: None),
    "tied, the same head stored": ("tied", store_head(0.0)),
    "tied in the inner part only": ("tied", config(tie_word_embeddings=DROP, **{TEXT + "tie_word_embeddings": True})),
    "shards with a stray one": ("qwen2_5", lambda folder: sharded(folder, stray=True)),
    "another file beside model.safetensors": ("qwen2_5", old_beside),
    "one file of another name": ("qwen2_5", rename_weights),
    "newer names": ("qwen2_5", newer_names),
    "processor_config.json": ("qwen2_5", as_transformers_5),
    "the Hub's name of the image processor": ("qwen2_5", pixels(image_processor_type="Qwen2_5_VLImageProcessor")),
    "one number for all channels": ("qwen2_5", pixels(image_mean=0.5, image_std=0.3)),
    "pixels that are not normalised": ("qwen2_5", pixels(do_normalize=False)),
    "qwen3": ("qwen3", lambda folder: None),
    "qwen3, theta is no whole number": ("qwen3", text(rope_parameters=ROPE | {"mrope_section": [6, 3, 3]})),
    "qwen3, another activation in the tower": ("qwen3", vision(hidden_act="silu")),
    "the tower returns tuples": ("qwen3", vision(return_dict=False)),
    "attention of the file's choosing": ("qwen3", config(attn_implementation="someone/kernel")),
    # transformers would ask for the package, so it reads the directory without this field
    "attention of another package": (
        "qwen2_5",
        both(rename_weights, config(_attn_implementation="flash_attention_2")),
    ),
    "the old name of the image processor": (
        "qwen2_5",
        pixels(image_processor_type=DROP, feature_extractor_type="Qwen2VLFeatureExtractor"),
    ),
    "no number format in config.json": ("qwen2_5", config(dtype=DROP)),
    "fields of no meaning": ("qwen2_5", text(use_cache=False, initializer_range=9.0, sliding_window=4, colour="red")),
}


def nan_in(name):
    def change(tensors):
        tensors[name].view(-1)[3] = float("nan")

    return weights(change)


def to_8_bits(tensors):
    name = "model.norm.weight"
    tensors[name] = tensors[name].to(torch.int8)


def index_to(entry):
    def apply(folder: Path) -> None:
        sharded(folder)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"][next(iter(index["weight_map"]))] = entry
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return apply


def twice_in_the_shards(folder: Path) -> None:
    sharded(folder)
    tensors = load_file(folder / "model-2.safetensors")
    tensors |= dict([next(iter(load_file(folder / "model-1.safetensors").items()))])
    save_file(tensors, folder / "model-2.safetensors")


def cut(name):
    return lambda folder: (folder / name).write_text((folder / name).read_text()[:60])


def template(content):
    return write("chat_template.jinja", content)


def joined(first, second, rows):
    """`rows` rows of the tensor `second` are moved to the tensor `first`: each is wrong, and their sum is right."""

    def change(tensors):
        tensors[first] = torch.cat([tensors[first], tensors[second][:rows]])
        tensors[second] = tensors[second][rows:].clone()

    return weights(change)


def put(name, make):
    """The tensor `name` is what `make` gives for the one that is there, or for None."""
    return weights(lambda tensors: tensors.update({name: make(tensors.get(name))}))


def unreadable(name, make):
    """A file `name` beside the weights a.safetensors, which `make` creates."""
    return both(rename_weights, lambda folder: make(folder / name))


def special(word):
    """The tokenizer reads `word` as one special token."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        token = {"id": 60, "content": word, "single_word": False, "lstrip": False, "rstrip": False}
        content["added_tokens"].append(token | {"normalized": False, "special": True})
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return apply


def no_tokens(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"], content["added_tokens"] = {}, []
    (folder / "tokenizer.json").write_text(json.dumps(content))
    content = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("extra_special_tokens", "unk_token", "eos_token", "pad_token"):
        content.pop(name, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def text_rope(**changes):
    return text(rope_parameters=ROPE | changes)


def axial(theta):
    return vision(rope_parameters={"rope_type": "axial", "rope_theta": theta})


def named_templates(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "{{ messages }}"}]
    edit("tokenizer_config.json", chat_template=named)(folder)


PROMPT = "<|image_pad|>{{ messages[0]['content'][1]['text'] }}"
NO_USER = "{{ raise_exception('a system turn is needed') }}"
ENDLESS = (
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
)
REFUSED = {
    "tied, another head stored": ("tied", store_head(1e-3), "lm_head.weight.*tie_word_embeddings=false"),
    "sliding windows": (
        "qwen2_5",
        text(use_sliding_window=True, sliding_window=8, max_window_layers=1, layer_types=DROP),
        "use_sliding_window",
    ),
    "layers of another kind": (
        "qwen2_5",
        text(layer_types=["full_attention", "chunked_attention", "full_attention"]),
        "layer_types.*layer 1",
    ),
    "layers of no kind": ("qwen2_5", text(layer_types=["full_attention", "linear", "full_attention"]), "layer_types"),
    "yarn": ("qwen2_5", text(rope_parameters=ROPE | {"rope_type": "yarn", "factor": 2.0}), "rope_type=yarn"),
    "a part of the head is turned": (
        "qwen2_5",
        text(rope_parameters=ROPE | {"partial_rotary_factor": 0.5}),
        "partial_rotary_factor",
    ),
    "no rope": ("qwen2_5", text(rope_parameters=None, rope_scaling=None), "mrope_section=None"),
    "sections that do not add up": (
        "qwen2_5",
        text(rope_parameters=ROPE | {"mrope_section": [2, 3, 4]}),
        "add up to 8",
    ),
    "sections that are none": ("qwen2_5", text(rope_parameters=ROPE | {"mrope_section": "233"}), "mrope_section"),
    "sections that are a number": ("qwen2_5", text(rope_parameters=ROPE | {"mrope_section": 8}), "mrope_section=8"),
    "a negative theta": ("qwen2_5", text(rope_parameters=ROPE | {"rope_theta": -1.0}), "rope_theta"),
    "another activation": ("qwen2_5", text(hidden_act="gelu"), "hidden_act=gelu"),
    "dropout": ("qwen2_5", text(attention_dropout=0.1), "attention_dropout=0.1"),
    "biases": ("qwen3", text(attention_bias=True), "attention_bias"),
    "head_dim of another family": ("qwen2_5", text(head_dim=32), "head_dim=32"),
    "attention to what comes later": ("qwen2_5", text(is_causal=False), "is_causal"),
    "weights of another name": ("qwen2_5", config(transformers_weights="a.safetensors"), "transformers_weights"),
    "the language model quantized": ("qwen2_5", text(quantization_config={"bits": 4}), "quantization_config"),
    "a tower with other angles": (
        "qwen3",
        vision(rope_parameters={"rope_type": "linear", "factor": 2.0}),
        "vision_config",
    ),
    "a tower with other heads": ("qwen3", vision(head_dim=12), "vision_config.head_dim=12"),
    "angles by kind of layer": (
        "qwen3",
        text(rope_parameters={"full_attention": ROPE}),
        "text_config.rope_parameters",
    ),
    "weights of torch.save": ("qwen2_5", both(rename_weights, write("pytorch_model.bin", "")), "pytorch_model.bin"),
    "a checkpoint beside the weights": (
        "qwen2_5",
        write("shard-00001-model-00001-of-00001.safetensors", ""),
        "another format .shard-00001",
    ),
    "quantized": ("qwen2_5", config(quantization_config={"quant_method": "awq", "bits": 4}), "quantization_config"),
    "weights of 8 bits": ("qwen2_5", weights(to_8_bits), "model.norm.weight.*I8"),
    "sizes as text": ("qwen2_5", text(hidden_size="64"), "config.json.*hidden_size"),
    "no heads": ("qwen2_5", text(num_attention_heads=0), "num_attention_heads=0"),
    "groups that do not divide": ("qwen2_5", text(num_key_value_heads=3), "num_key_value_heads=3"),
    "a tower of another width": ("qwen2_5", vision(out_hidden_size=32), "out_hidden_size=32"),
    "four channels": ("qwen2_5", vision(in_channels=4), "in_channels=4, and images have 3"),
    "windows smaller than a patch": ("qwen2_5", vision(window_size=14), "window_size=14"),
    "config.json empty": ("qwen2_5", write("config.json", ""), "config.json cannot be read as JSON"),
    "config.json cut": ("qwen2_5", cut("config.json"), "config.json cannot be read as JSON"),
    "config.json a list": ("qwen2_5", write("config.json", "[]"), "config.json holds no JSON object"),
    "text_config a list": ("qwen2_5", config(text_config=[]), "config.json"),
    "tokenizer.json cut": ("qwen2_5", cut("tokenizer.json"), "tokenizer.json cannot be read as JSON"),
    "tokenizer_config.json empty": (
        "qwen2_5",
        write("tokenizer_config.json", ""),
        "tokenizer_config.json cannot be read",
    ),
    "generation_config.json cut": ("qwen2_5", cut("generation_config.json"), "generation_config.json cannot be read"),
    "preprocessor_config.json cut": (
        "qwen2_5",
        cut("preprocessor_config.json"),
        "preprocessor_config.json cannot be read",
    ),
    "preprocessor_config.json a list": ("qwen2_5", write("preprocessor_config.json", "[]"), "holds no JSON object"),
    "index cut": ("qwen2_5", both(sharded, cut("model.safetensors.index.json")), "index.json cannot be read"),
    "index leads outside": ("qwen2_5", index_to("../other.safetensors"), "not in the directory itself"),
    "index names a file that is not there": (
        "qwen2_5",
        index_to("model-3.safetensors"),
        "model-3.safetensors, which is not there",
    ),
    "a tensor in two files": ("qwen2_5", twice_in_the_shards, "model-1.safetensors.*model-2.safetensors"),
    "a tensor under two names": (
        "qwen2_5",
        weights(lambda t: t.update({"model.language_model.norm.weight": t["model.norm.weight"].clone()})),
        "model.norm.weight",
    ),
    "not a number": ("qwen2_5", nan_in("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight.*not finite"),
    "not a number in the tower": (
        "qwen2_5",
        nan_in("visual.merger.mlp.0.bias"),
        "visual.merger.mlp.0.bias.*not finite",
    ),
    "a token beyond the embedding": ("qwen2_5", text(vocab_size=20), "token id .* vocab_size=20"),
    "an end token of no tokenizer": ("qwen2_5", edit("generation_config.json", eos_token_id=500), "eos_token_id=500"),
    "a template without an image": (
        "qwen2_5",
        template("{{ messages[0]['content'][1]['text'] }}"),
        "chat template writes 0 image tokens",
    ),
    "a template that leaves the question out": (
        "qwen2_5",
        template("<|image_pad|>"),
        "chat template leaves the question out",
    ),
    "a template of wrong syntax": ("qwen2_5", template("{% for %}"), "chat template ends in an error"),
    "a template that refuses": ("qwen2_5", template(NO_USER), "a system turn is needed"),
    "named templates without a default": ("qwen2_5", named_templates, "chat template"),
    "an endless template": ("qwen2_5", template(ENDLESS), "chat template does not end within"),
    "another image token": ("qwen2_5", config(image_token_id=5), "image_token_id=5 .*<.image_pad.>, which is 6"),
    "the image token of qwen3": ("qwen3", config(image_token_id=3), "image_token_id=3 is not the tokenizer's"),
    "an image token below 0": ("qwen2_5", config(image_token_id=-1), "image_token_id=-1 is not the tokenizer's"),
    "the tokenizer names another image token": (
        "qwen2_5",
        edit("tokenizer_config.json", extra_special_tokens={"image_token": "<|video_pad|>"}),
        "image_token_id=6 .*<.video_pad.>",
    ),
    "a longer key and a shorter value": (
        "qwen2_5",
        joined("model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight", 16),
        "k_proj.weight .48, 64. where config.json asks for .32, 64",
    ),
    "a longer gate": (
        "qwen2_5",
        joined("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight", 8),
        "gate_proj.weight .200, 64. where config.json asks for .192, 64",
    ),
    "tied, a longer head": (
        "tied",
        weights(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].repeat(2, 1)})),
        "lm_head.weight .256, 64. where config.json asks for .128, 64",
    ),
    "a norm that is one number": ("qwen2_5", put("model.norm.weight", lambda _: torch.tensor(2.0)), "norm.weight .. "),
    "a bias that is one number": (
        "qwen2_5",
        put("model.layers.0.self_attn.q_proj.bias", lambda _: torch.tensor(2.0)),
        "q_proj.bias .. where",
    ),
    "a norm of the tower that is one number": (
        "qwen2_5",
        put("visual.merger.ln_q.weight", lambda _: torch.tensor(2.0)),
        "visual.merger.ln_q.weight .. where",
    ),
    "a tensor without a name": ("qwen2_5", put("", lambda _: torch.ones(1)), "unknown a tensor without a name"),
    "not a number in the head": (
        "qwen2_5",
        nan_in("lm_head.weight"),
        "lm_head.weight, which is not finite.*; copy the model again",
    ),
    "a link that leads nowhere": (
        "qwen2_5",
        unreadable("b.safetensors", lambda file: file.symlink_to("nowhere")),
        "b.safetensors, which is a folder or a link that leads nowhere",
    ),
    "a link to itself": (
        "qwen2_5",
        unreadable("model.safetensors", lambda file: file.symlink_to(file.name)),
        "model.safetensors, which is a folder or a link",
    ),
    "a folder with the name of weights": ("qwen2_5", unreadable("b.safetensors", Path.mkdir), "b.safetensors, which"),
    "a pipe with the name of weights": ("qwen2_5", unreadable("b.safetensors", os.mkfifo), "b.safetensors, which"),
    "index names a file too long": ("qwen2_5", index_to("a" * 5000), "aaa ..., which is not there"),
    "an activation that does not exist": ("qwen2_5", vision(hidden_act="nope"), "vision_config.hidden_act=nope"),
    "qwen3, an activation that does not exist": ("qwen3", vision(hidden_act="nope"), "vision_config.hidden_act=nope"),
    "theta of the tower as text": ("qwen2_5", axial("5"), "vision_config.rope_parameters.rope_theta='5'"),
    "theta of the tower is null": ("qwen3", axial(None), "vision_config.rope_parameters.rope_theta=None"),
    "theta of the tower is 0": ("qwen2_5", axial(0), "vision_config.rope_parameters.rope_theta=0"),
    "theta of the tower is not a number": ("qwen2_5", axial(float("nan")), "vision_config.*rope_theta=nan"),
    "theta beyond float32": ("qwen2_5", text_rope(rope_theta=10**39), "text_config.*rope_theta=1000.*000 must be"),
    "theta beyond float64": ("qwen2_5", text_rope(rope_theta=10**400), "text_config.*rope_theta=1000.*000 must be"),
    "theta below float32": ("qwen2_5", text_rope(rope_theta=1e-300), "text_config.*rope_theta=1e-300 must be"),
    "epsilon is not a number": ("qwen2_5", text(rms_norm_eps=float("nan")), "text_config.rms_norm_eps=nan"),
    "a negative epsilon": ("qwen3", text(rms_norm_eps=-1.0), "text_config.rms_norm_eps=-1.0"),
    "a tower that looks back only": ("qwen2_5", vision(is_causal=True), "vision_config.is_causal=True"),
    "qwen3, a tower that looks back only": ("qwen3", vision(is_causal=True), "vision_config.is_causal=True"),
    "causal as text": ("qwen2_5", text(is_causal="false"), "text_config.is_causal=false"),
    "the model returns tuples": ("qwen2_5", config(return_dict=False), "return_dict=False"),
    "the language model returns tuples": ("qwen3", text(return_dict=False), "text_config.return_dict=False"),
    "a layer with an epsilon of its own": (
        "qwen2_5",
        text(per_layer_config={"1": {"rms_norm_eps": 0.5}}),
        "text_config.per_layer_config",
    ),
    "layers of null": ("qwen3", text(layer_types=None), "text_config.layer_types=None"),
    "heads of no width": ("qwen3", text(head_dim=0), "text_config.head_dim=0 must be a whole number"),
    "heads of an odd width": (
        "qwen2_5",
        both(text(hidden_size=60), vision(out_hidden_size=60), text_rope(mrope_section=[2, 2, 3])),
        "15 wide, an odd number",
    ),
    "padding beyond the embedding": ("qwen2_5", text(pad_token_id=500), "config.json makes no model .*adding_idx"),
    "a vocabulary beyond memory": ("qwen2_5", text(vocab_size=10**9), "embed_tokens.weight .128, 64. where"),
    "a vocabulary beyond numbers": ("qwen2_5", text(vocab_size=10**30), "text_config.vocab_size=1000.*000 must be"),
    "layers beyond memory": ("qwen2_5", text(intermediate_size=2**45), "text_config.intermediate_size=35184372088832"),
    "a tower beyond memory": ("qwen2_5", vision(intermediate_size=10**9), "visual.blocks.0.mlp.gate_proj"),
    "a wide tower beyond memory": ("qwen3", vision(hidden_size=10**8), "visual.patch_embed.proj.weight .32, 3"),
    "layers beyond number": ("qwen2_5", text(num_hidden_layers=10**12), "num_hidden_layers=1000000000000 must be"),
    "a tower of layers beyond number": ("qwen3", vision(depth=10**12), "depth=1000000000000 must be 1000 or less"),
    "positions below 0": ("qwen3", vision(num_position_embeddings=-4), "num_position_embeddings=-4"),
    "positions beyond numbers": ("qwen3", vision(num_position_embeddings=2**60), "num_position_embeddings=11529"),
    "windows beyond images": ("qwen2_5", vision(window_size=10**9), "vision_config.window_size=1000000000"),
    "patches beyond images": ("qwen3", vision(patch_size=2**31), "vision_config.patch_size=2147483648"),
    "a tokenizer without tokens": ("qwen2_5", no_tokens, "tokenizer without the image token"),
    "a word that is a special token": ("qwen2_5", special("is"), "special token 'is'"),
    "a template that cuts": ("qwen2_5", template(PROMPT.replace("['text']", "['text'][:255]")), "leaves the question"),
    "a template that takes short questions": (
        "qwen2_5",
        template("{% if messages[0]['content'][1]['text']|length > 15 %}{{ raise_exception('too long') }}{% endif %}"),
        "chat template ends in an error .too long",
    ),
    "a template of one endless operation": (
        "qwen2_5",
        template("{{ (9**(9**9)) % 7 }}" + PROMPT),
        "chat template does not end within 1 seconds",
    ),
    "a template that never stops talking": (
        "qwen2_5",
        template(PROMPT + "{{ ' red' * 100000 }}"),
        "chat template makes .* characters",
    ),
    "patches as text": ("qwen2_5", pixels(patch_size="14"), "patch_size='14', and the vision tower of config.json 14"),
    "the old name of another image processor": (
        "qwen2_5",
        pixels(image_processor_type=DROP, feature_extractor_type="CLIPFeatureExtractor"),
        "CLIPImageProcessor",
    ),
    "config.json names another image processor": (
        "qwen2_5",
        both(pixels(image_processor_type=DROP), config(image_processor_type="CLIPImageProcessor")),
        "CLIPImageProcessor",
    ),
    "a list of image processors": ("qwen2_5", pixels(image_processor_type=["Qwen2VLImageProcessor"]), "processor .'Qw"),
    "an image processor that is a list": (
        "qwen2_5",
        write("processor_config.json", '{"image_processor": []}'),
        "processor_config.json has an image_processor that is no JSON object",
    ),
    "one size for all images": ("qwen2_5", pixels(size={"height": 224, "width": 224}), "size .*224.* shortest_edge"),
    "pixels as text": ("qwen2_5", pixels(size=DROP, min_pixels="3136"), "size .*'3136'.* shortest_edge"),
    "sizes in no order": ("qwen2_5", pixels(min_pixels=9**6, max_pixels=9**5), "size .*531441.* in this order"),
    "other patches": ("qwen2_5", pixels(patch_size=16), "patch_size=16"),
    "merged otherwise": ("qwen2_5", pixels(merge_size=1), "merge_size=1"),
    "other frames": ("qwen2_5", pixels(temporal_patch_size=1), "temporal_patch_size=1"),
    "images of their own size": ("qwen2_5", pixels(do_resize=False), "do_resize=false"),
    "divided by zero": ("qwen2_5", pixels(image_std=[0, 0, 0]), "not finite"),
    "a filter that does not exist": ("qwen2_5", pixels(resample=77), "image processor ends in an error"),
    "another image processor": ("qwen2_5", pixels(image_processor_type="CLIPImageProcessor"), "CLIPImageProcessor"),
}


def copy(families, tmp_path, family, change) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(families / family, folder)
    change(folder)
    return folder


def open_all(folder, groups):
    """Everything that a recipe reads of a directory."""
    config = Config(model=ModelConfig(hf_path=str(folder)), precision=PrecisionConfig(dtype="fp32"))
    check_model(config)
    return Processor.from_pretrained(folder), build_vlm(config, groups).chunks[0]


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted_directories_give_transformers_logits(case, families, tmp_path, groups):
    folder = copy(families, tmp_path, *ACCEPTED[case])
    processor, ours = open_all(folder, groups)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    view = processor.view([picture], "what digit is red?", [PixelConfig(3136, 12544)])
    with torch.no_grad():
        hidden = ours(
            view.token_ids, view.position_ids, Packing.of([view.num_tokens]), view.pixel_values, view.grid_thw
        )
        logits = hidden[:, 0] @ ours.output_weight().T
        # transformers reads no file of another name
        whole = families / ACCEPTED[case][0] if (folder / "a.safetensors").is_file() else folder
        theirs = AutoModelForImageTextToText.from_pretrained(
            whole, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        is_image = (view.token_ids == processor.image_token_id).int()
        expected = theirs(
            input_ids=view.token_ids[None],
            mm_token_type_ids=is_image[None],
            pixel_values=view.pixel_values,
            image_grid_thw=view.grid_thw,
        ).logits[0]
    torch.testing.assert_close(logits, expected, atol=3e-5, rtol=1e-4)


def test_the_template_and_the_end_tokens_are_those_of_transformers(families, tmp_path, groups):
    """processor_config.json, chat_template.json, chat_template.jinja; without generation_config.json, config.json."""
    folder = tmp_path / "model"
    shutil.copytree(families / "qwen2_5", folder)
    plain = "<|image_pad|>{{ messages[0]['content'][1]['text'] }}"

    def first_word():
        processor = Processor.from_pretrained(folder)
        view = processor.view([Image.new("RGB", (56, 56))], "digit", [PixelConfig(3136, 3136)])
        return processor.decode(view.token_ids).split()[0]

    for name, word in (
        ("chat_template.jinja", "red"),
        ("chat_template.json", "blue"),
        ("processor_config.json", "green"),
    ):
        template = f"{word} {plain}"
        (folder / name).write_text(template if name.endswith("jinja") else json.dumps({"chat_template": template}))
        assert first_word() == word
    (folder / "generation_config.json").unlink()
    for changes, ids in (({TEXT + "eos_token_id": [2, 10]}, [2, 10]), ({"eos_token_id": 10}, [10])):
        config(**changes)(folder)
        assert Processor.from_pretrained(folder).end_token_ids == ids
    config(eos_token_id=DROP, **{TEXT + "eos_token_id": DROP})(folder)
    assert Processor.from_pretrained(folder).end_token_ids == [2]


def test_the_number_format_is_that_of_the_files(families, tmp_path, groups):
    """Where config.json names none, the first weight decides, as in transformers."""
    folder = copy(families, tmp_path, "qwen2_5", config(dtype=DROP))
    automatic = Config(model=ModelConfig(hf_path=str(folder)), precision=PrecisionConfig(dtype="auto"))
    assert weights_dtype(automatic) == torch.float32
    weights(lambda tensors: tensors.update({name: value.bfloat16() for name, value in tensors.items()}))(folder)
    assert weights_dtype(automatic) == torch.bfloat16


@pytest.mark.parametrize("case", REFUSED)
def test_refused_directories_are_named(case, families, tmp_path, groups, monkeypatch):
    monkeypatch.setattr("nemo_vopd.data.processor.PROBE_SECONDS", 1.0)
    family, change, rule = REFUSED[case]
    folder = copy(families, tmp_path, family, change)
    with pytest.raises(OptionError, match=rule) as caught:
        open_all(folder, groups)
    assert caught.value.option == "model.hf_path" and "\n" not in str(caught.value) and len(str(caught.value)) < 700
