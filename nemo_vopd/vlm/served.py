"""Which values of config.json are computed exactly; every other one is refused by name.

A field that is listed here may have any value. All others must have transformers' default: what a stranger's model, or
a later version of transformers, sets differently would otherwise be ignored and change the numbers in silence.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Collection
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from nemo_vopd.hf_directory import refusal
from nemo_vopd.vlm.language import head_dim

_INERT = {"initializer_range", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"}
"""Change nothing that is computed here: initialisation, generation with transformers, limits that nobody reads."""
_TEXT_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_TEXT_SERVED = {*_TEXT_SIZES, "vocab_size", "rms_norm_eps", "layer_types", "rope_parameters", "head_dim"}
_WINDOWS = {"use_sliding_window", "sliding_window", "max_window_layers"}
"""Say which layers attend to a window; transformers makes `layer_types` of them, which is what its layers read."""
_VISION_SIZES = ("depth", "hidden_size", "intermediate_size", "num_heads", "patch_size", "spatial_merge_size")
_VISION_SIZES += ("temporal_patch_size", "out_hidden_size", "num_position_embeddings", "window_size")
_LARGEST = {"patch_size": 64, "spatial_merge_size": 8, "temporal_patch_size": 8, "window_size": 10_000}
"""Sizes that decide what an image takes in memory, far above those of any model; the files show the other sizes."""
_LARGEST_SIZE = 10**9
_SMALLEST_NUMBER, _LARGEST_NUMBER = 1e-30, 1e30
"""Beyond these, angles and norms leave float32."""
_ROPE = {"rope_type", "type", "rope_theta", "mrope_section", "mrope_interleaved"}
_CORRECT = "correct config.json, or copy the model again"
_WITHOUT = "give a model without it"


def check_served(hf: Any, path: str) -> None:
    """Raise OptionError, which names the field, unless the model `hf` of the directory `path` is computed exactly.

    The vision tower is transformers' own and takes any value that fits; the language model is Megatron's.
    """
    text, vision = hf.text_config, hf.vision_config
    if any(getattr(part, "quantization_config", None) is not None for part in (hf, text)):
        raise refusal(path, "config.json has a quantization_config", "give the model that is not quantized")
    if getattr(hf, "transformers_weights", None) is not None:
        what = "config.json names other weight files (transformers_weights), which are not read"
        raise refusal(path, what, "give a directory with model.safetensors or its index")
    for name, part, causal in (("", hf, True), ("text_config.", text, True), ("vision_config.", vision, False)):
        if part.is_heterogeneous:
            raise refusal(path, f"config.json has {name}per_layer_config, which is not computed", _WITHOUT)
        if getattr(part, "is_causal", causal) is not causal:
            what = f"config.json: {name}is_causal={part.is_causal} is not computed, only is_causal={causal} is"
            raise refusal(path, what, _WITHOUT)
        if part is not vision and part.return_dict is not True:  # what is asked of the tower says so itself
            raise refusal(path, f"config.json has {name}return_dict={part.return_dict}", "take it out")
    _check_sizes(text, "text_config", (*_TEXT_SIZES, "vocab_size", "head_dim"), path)
    _check_sizes(vision, "vision_config", _VISION_SIZES, path)
    _check_defaults(text, "text_config", _TEXT_SERVED | _WINDOWS | _INERT, path)
    kinds = getattr(text, "layer_types", ())
    if not isinstance(kinds, list | tuple):
        raise refusal(path, f"config.json: text_config.layer_types={kinds} is no list", _CORRECT)
    for number, kind in enumerate(kinds):
        if kind != "full_attention":
            # the field that people set is another one than the list that transformers makes of it
            name = "use_sliding_window" if getattr(text, "use_sliding_window", False) else "layer_types"
            what = f"config.json: text_config.{name} gives layer {number} {kind}, and only full_attention is computed"
            raise refusal(path, what, "give a model whose layers attend to everything before them")
    _check_number(text.rms_norm_eps, "text_config.rms_norm_eps", 0, path)
    _check_heads(text, path)
    _check_rope(text, path)
    _check_tower(vision, text.hidden_size, path)


def _check_sizes(part: Any, name: str, sizes: Collection[str], path: str) -> None:
    """Raise OptionError for a field in `sizes` of the class of `part` that is no size."""
    known = {field.name for field in dataclasses.fields(part)}
    for size in sizes:
        if size not in known:
            continue
        value, largest = getattr(part, size), _LARGEST.get(size, _LARGEST_SIZE)
        if type(value) is not int or not 1 <= value <= largest:
            what = f"config.json: {name}.{size}={reprlib.repr(value)} must be a whole number from 1 to {largest}"
            raise refusal(path, what, _CORRECT)


def _check_number(value: Any, name: str, lowest: float, path: str) -> None:
    if type(value) not in (int, float) or not lowest <= value <= _LARGEST_NUMBER:
        what = f"config.json: {name}={reprlib.repr(value)} must be a number from {lowest} to {_LARGEST_NUMBER}"
        raise refusal(path, what, _CORRECT)


def _check_defaults(part: PreTrainedConfig, name: str, served: Collection[str], path: str) -> None:
    """Raise OptionError for a field of the class of `part` that is not in `served` and has not its default value."""
    of_all_models = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    for field in dataclasses.fields(type(part)):  # type: ignore[arg-type]
        if field.name in of_all_models or field.name in served:
            continue
        value, default = getattr(part, field.name), field.default
        if value != default:
            what = f"config.json: {name}.{field.name}={value} is not computed, only {field.name}={default} is"
            raise refusal(path, what, _WITHOUT)


def _check_heads(text: Any, path: str) -> None:
    heads, groups, hidden = text.num_attention_heads, text.num_key_value_heads, text.hidden_size
    if heads % groups:
        what = f"config.json: text_config.num_key_value_heads={groups} does not divide num_attention_heads={heads}"
        raise refusal(path, what, _CORRECT)
    known = {field.name for field in dataclasses.fields(text)}
    width = getattr(text, "head_dim", None)
    if "head_dim" not in known and width not in (None, hidden // heads):
        # transformers would take it for the rotary angles alone
        what = f"config.json: text_config.head_dim={width} is no field of this kind of model"
        raise refusal(path, what, "take it out, or give a model whose heads share the hidden size")
    if width is None and hidden % heads:
        what = f"config.json: text_config.num_attention_heads={heads} does not divide hidden_size={hidden}"
        raise refusal(path, what, _CORRECT)
    if head_dim(text) % 2:  # rotary angles turn pairs
        raise refusal(path, f"config.json: the heads of text_config are {head_dim(text)} wide, an odd number", _CORRECT)


def _check_rope(text: Any, path: str) -> None:
    rope = text.rope_parameters
    if not isinstance(rope, dict) or "rope_type" not in rope:
        raise refusal(path, f"config.json: text_config.rope_parameters={rope} is no one set of parameters", _CORRECT)
    place = "config.json: text_config.rope_parameters (rope_scaling in older files)"
    if rope["rope_type"] != "default":
        what = f"{place} has rope_type={rope['rope_type']}, and only default is computed"
        raise refusal(path, what, "give the model as it was before its context was extended")
    if unknown := sorted(name for name, value in rope.items() if name not in _ROPE and value is not None):
        what = f"{place} has {unknown[0]}={rope[unknown[0]]}, which is not computed"
        raise refusal(path, what, _WITHOUT)
    _check_number(rope["rope_theta"], "text_config.rope_parameters.rope_theta", _SMALLEST_NUMBER, path)
    sections, half = rope.get("mrope_section"), head_dim(text) // 2
    numbers = sections if isinstance(sections, list | tuple) else []
    whole = all(type(number) is int and number >= 0 for number in numbers)
    if not whole or len(numbers) != 3 or sum(numbers) != half:
        what = f"{place} has mrope_section={sections}, which must be three whole numbers that add up to {half}"
        raise refusal(path, what, _CORRECT)


def _check_tower(vision: Any, hidden: int, path: str) -> None:
    if vision.in_channels != 3:
        what = f"config.json: vision_config.in_channels={vision.in_channels}, and images have 3"
        raise refusal(path, what, "give a model for RGB images")
    if vision.out_hidden_size != hidden:
        what = f"config.json: vision_config.out_hidden_size={vision.out_hidden_size} is not text_config.hidden_size"
        raise refusal(path, f"{what}={hidden}", _CORRECT)
    if vision.hidden_size % (4 * vision.num_heads):
        what = f"config.json: vision_config.hidden_size={vision.hidden_size} is no multiple of 4 * num_heads"
        raise refusal(path, f"{what}={4 * vision.num_heads}", _CORRECT)  # angles of two axes, each a half of a half
    if getattr(vision, "head_dim", None) not in (None, vision.hidden_size // vision.num_heads):
        raise refusal(path, f"config.json: vision_config.head_dim={vision.head_dim} is no field of the tower", _CORRECT)
    if vision.hidden_act not in ACT2FN:
        what = f"config.json: vision_config.hidden_act={vision.hidden_act} is no activation that transformers knows"
        raise refusal(path, what, _CORRECT)
    rope = vision.rope_parameters or {}
    if (kind := rope.get("rope_type", "axial")) not in ("axial", "default"):
        what = f"config.json: vision_config.rope_parameters has rope_type={kind}, and only axial is computed"
        raise refusal(path, what, _WITHOUT)
    if "rope_theta" in rope:
        name = "vision_config.rope_parameters.rope_theta"
        _check_number(rope["rope_theta"], name, _SMALLEST_NUMBER, path)
    window = getattr(vision, "window_size", None)
    if window is not None and window < vision.patch_size * vision.spatial_merge_size:
        what = f"config.json: vision_config.window_size={window} is less than one merged patch"
        raise refusal(path, what, _CORRECT)
