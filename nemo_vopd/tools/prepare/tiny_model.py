"""What tests, quickstart and `--config-name tiny` run on: a Qwen2.5-VL of 0.4M random parameters, as from the Hub."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils.logging import disable_progress_bar

from nemo_vopd.errors import OptionError
from nemo_vopd.tools.prepare.folders import whole_directory
from nemo_vopd.tools.prepare.prepare import prepare
from nemo_vopd.tools.prepare.synthetic import COLOURS, write_digits

_NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
_SPECIAL_TOKENS = [f"<|{name}|>" for name in _NAMES]
_ID = {name: i for i, name in enumerate(_NAMES)}
_WORDS = ("user", "assistant", "what", "digit", "is", "it", "a", ".", "?", *map(str, range(10)), *COLOURS)
_UNKNOWN = "<unk>"

# Qwen's, without the system turn and without video
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "max_window_layers": 3,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
    "vision_depth": 2,
    "vision_hidden_size": 64,
    "vision_intermediate_size": 128,
    "vision_num_heads": 4,
    "vision_window_size": 56,
    "vision_initializer_range": 0.15,
}


def write_tiny_model(output: Path, *, seed: int, **overrides: int | float | bool) -> None:
    """Write config, weights, tokenizer, image processor and generation config to the new directory `output`.

    `overrides` change text sizes by their Hugging Face names (`num_hidden_layers=4`), vision sizes with the prefix
    `vision_` (`vision_depth=3`). The same seed and sizes give the same files. Raises OptionError for an unknown
    size and when `output` exists.
    """
    config = _config(overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
        _initialise(model, config)
    ends = [_ID["im_end"], _ID["endoftext"]]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=_ID["endoftext"])
    disable_progress_bar()  # for one small file
    # where a file exists, a concurrent caller was faster; what it wrote is the same
    with contextlib.suppress(FileExistsError), whole_directory(output) as temporary:
        model.save_pretrained(temporary)
        _tokenizer().save_pretrained(temporary)
        # bilinear: as the 42 to 56 pixel enlargement of the quickstart's crops was tuned
        Qwen2VLImageProcessorPil(resample=2).save_pretrained(temporary)
        for file in temporary.iterdir():  # safetensors writes files that only its owner can read
            file.chmod((temporary / "config.json").stat().st_mode)


def ensure_tiny_assets(hf_path: Path, data_path: Path) -> None:
    """Make the tiny model and the tiny data set where they are missing and the paths bear the tiny run's names.

    These are the last parts in conf/model/tiny.yaml and conf/data/tiny.yaml; other paths are the user's own.
    Deterministic, and safe for concurrent processes: each writes under a temporary name, the first rename wins and
    the others use its result. What exists is left as it is. Raises OptionError when a place cannot be written.
    """
    for path, name, make in ((hf_path, "tiny-vlm", write_tiny_model), (data_path, "tiny-digits", _write_data)):
        if path.name == name and not path.exists():
            try:
                make(path, seed=1)
            except OptionError:
                if not path.exists():  # else another process was faster
                    raise


def _write_data(output: Path, seed: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        write_digits(Path(scratch) / "digits", num_samples=256, seed=seed)
        prepare(Path(scratch) / "digits" / "data.jsonl", output, workers=1, progress=False)


def _config(overrides: dict[str, int | float | bool]) -> Qwen2_5_VLConfig:
    for name, value in overrides.items():
        if name not in _SIZES:
            raise OptionError(name, value, "is no size of the tiny model", f"use one of {', '.join(_SIZES)}")
    sizes = {**_SIZES, **overrides}
    vision = {name.removeprefix("vision_"): size for name, size in sizes.items() if name.startswith("vision_")}
    text = {name: size for name, size in sizes.items() if not name.startswith("vision_")}
    half_head = text["hidden_size"] // text["num_attention_heads"] // 2
    temporal = half_head // 4
    # Qwen's proportions: 16, 24, 24 of 64; the odd one out goes to width
    sections = [temporal, (half_head - temporal) // 2, half_head - temporal - (half_head - temporal) // 2]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    ids = {"bos_token_id": _ID["endoftext"], "eos_token_id": _ID["im_end"]}
    return Qwen2_5_VLConfig(
        text_config={**text, **ids, "rope_parameters": rope, "rms_norm_eps": 1e-6},
        vision_config={
            **vision,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": text["hidden_size"],
            "fullatt_block_indexes": [vision["depth"] - 1],
        },
        image_token_id=_ID["image_pad"],
        video_token_id=_ID["video_pad"],
        vision_start_token_id=_ID["vision_start"],
        vision_end_token_id=_ID["vision_end"],
        vision_token_id=_ID["vision_pad"],  # type: ignore[call-arg]
        tie_word_embeddings=text["tie_word_embeddings"],
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype="float32",
    )


def _initialise(model: torch.nn.Module, config: Qwen2_5_VLConfig) -> None:
    """Set every parameter here: which modules a transformers release initialises, and how, has changed before."""
    for name, parameter in model.named_parameters():
        part: Any = config.vision_config if "visual" in name else config.text_config
        if name.endswith(".bias"):
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim == 1:  # the only vectors that are no biases are norm weights
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=part.initializer_range)


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the synthetic task; anything else is <unk>."""
    vocabulary = {word: i for i, word in enumerate((*_SPECIAL_TOKENS, _UNKNOWN, *_WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # splits punctuation off, drops newlines
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=_UNKNOWN,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=_SPECIAL_TOKENS,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
