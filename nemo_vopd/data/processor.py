"""Prompts as the model's own processor writes them: chat template, image patches, M-RoPE positions."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nemo_vopd.batch import View
from nemo_vopd.config import PixelConfig
from nemo_vopd.data.opening import Parts, check_ends, check_patches, open_parts, refused_by_name, time_limit
from nemo_vopd.hf_directory import one_line, refusal
from nemo_vopd.images import UnusableSample, check_sides

_VISION_TOKEN = re.compile(r"<\|?.*(vision|image|video).*\|?>")
_MAX_CACHED_TEMPLATES = 64  # each can be megabytes
PROBE_SECONDS = 10.0
"""Time limit for a prompt and for the first image; they take milliseconds."""
_PROBE_QUESTION = " ".join(["What is it?"] * 100)  # long, for templates that cut or refuse long ones
_MAX_PROBE_PROMPT = 100_000
_OWN_TEMPLATE = "use the chat template of the model's publisher"


class Processor:
    """Tokenizer, image processor and special ids of one Hugging Face directory."""

    def __init__(self, parts: Parts) -> None:
        """Use `from_pretrained`."""
        self.path, self.tokenizer, self.image_processor, self.hf, self.end_token_ids = parts
        self.image_token_id: int = self.hf.image_token_id
        self._special_texts = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        self._template_options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        if "enable_thinking" in str(self.tokenizer.chat_template):
            self._template_options["enable_thinking"] = False
        self._templates: dict[tuple[str, int], list[int]] = {}

    @classmethod
    def from_pretrained(cls, hf_path: str | Path) -> Processor:
        """Load the directory `hf_path`, never the network, and try it on one prompt and one image.

        Raises OptionError (model.hf_path) if it is incomplete or does not belong together.
        """
        processor = cls(open_parts(hf_path))
        path = processor.path
        for text in processor._special_texts:
            if text in _PROBE_QUESTION:
                what = f"tokenizer.json has the special token {text!r}, and questions may hold this text"
                raise refusal(path, what, "take it out of the special tokens")
        options = processor._template_options | {"tokenize": False}
        render = partial(processor.tokenizer.apply_chat_template, _messages(_PROBE_QUESTION, 1), **options)
        check_ends(path, "its chat template", render, PROBE_SECONDS)
        with refused_by_name(path, "its chat template", PROBE_SECONDS):
            prompt = render()
            if _PROBE_QUESTION not in prompt:
                raise refusal(path, "its chat template leaves the question out", _OWN_TEMPLATE)
            if len(prompt) > _MAX_PROBE_PROMPT:
                what = f"its chat template makes {len(prompt)} characters of {len(_PROBE_QUESTION)}"
                raise refusal(path, what, _OWN_TEMPLATE)
            processor._template(_PROBE_QUESTION, 1)
        with refused_by_name(path, "its image processor", PROBE_SECONDS):
            side = 4 * processor.image_processor.patch_size * processor.image_processor.merge_size
            image = Image.linear_gradient("L").convert("RGB").resize((2 * side, side))
            values, grid = processor.patches(image, PixelConfig(1, 2 * side * side))
            check_patches(path, values, grid[0].tolist(), processor.hf)
        return processor

    @property
    def pad_token_id(self) -> int:
        """The id that fills up batches; any id serves, as padding is never attended to nor predicted."""
        pad = self.tokenizer.pad_token_id
        return self.end_token_ids[0] if pad is None else pad

    @property
    def pixel_limits(self) -> PixelConfig:
        """The range of sizes in the model's own image processor, which transformers and vLLM use unless told."""
        size = self.image_processor.size
        return PixelConfig(size["shortest_edge"], size["longest_edge"])

    @property
    def vocab_size(self) -> int:
        """Rows of the model's embedding, padding included: the width of its logits."""
        return self.hf.text_config.vocab_size

    @property
    def forbidden_token_ids(self) -> list[int]:
        """Image, video and vision ids: a response that held one could not be scored (its image would be missing)."""
        named = {value for key, value in vars(self.hf).items() if _is_vision_id(key, value)}
        added = {i for i, token in self.tokenizer.added_tokens_decoder.items() if _VISION_TOKEN.match(token.content)}
        return sorted(i for i in (named | added) - set(self.end_token_ids) if 0 <= i < self.vocab_size)

    def view(self, images: list[Image.Image], question: str, pixels: list[PixelConfig]) -> View:
        """The prompt of `question` about RGB `images`; image i is resized into the range `pixels[i]`.

        Raises UnusableSample: empty_question, malformed_record (the question contains a special token, which would
        be read as one, or the chat template makes no prompt of it), extreme_aspect.
        """
        if not question.strip():
            raise UnusableSample("empty_question")
        template = self._template(question, len(images))
        encoded = [self.patches(image, limits) for image, limits in zip(images, pixels, strict=True)]
        grid_thw = torch.cat([grid for _, grid in encoded])
        merge = self.image_processor.merge_size
        token_ids, counts = [], iter((grid_thw.prod(dim=1) // merge**2).tolist())
        for token in template:
            token_ids += [token] * next(counts) if token == self.image_token_id else [token]
        ids = torch.tensor(token_ids)
        return View(
            token_ids=ids,
            position_ids=mrope_positions(ids, grid_thw, self.image_token_id, merge),
            pixel_values=torch.cat([values for values, _ in encoded]),
            grid_thw=grid_thw,
        )

    def patches(self, image: Image.Image, limits: PixelConfig) -> tuple[Tensor, Tensor]:
        """([N, C * temporal_patch * patch * patch] float32, [1, 3] int64) of one RGB image. Raises UnusableSample."""
        check_sides(*image.size)
        size = {"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}
        output = self.image_processor(images=[image], size=size, return_tensors="np")
        return torch.from_numpy(np.ascontiguousarray(output["pixel_values"])), torch.from_numpy(
            output["image_grid_thw"]
        )

    def encode_answer(self, text: str) -> list[int]:
        """The ids of a whole response: `text`, then the end token."""
        return self.tokenizer.encode(text, add_special_tokens=False) + self.end_token_ids[:1]

    def decode(self, ids: list[int] | Tensor) -> str:
        """The text of response ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _template(self, question: str, num_images: int) -> list[int]:
        """Ids of the templated prompt with one image token for each image."""
        key = (question, num_images)
        if key not in self._templates:
            for text in self._special_texts:
                if text in question:
                    raise UnusableSample("malformed_record", f"the question contains the special token {text}")
            messages = _messages(question, num_images)
            try:
                with time_limit(PROBE_SECONDS):
                    ids = self.tokenizer.apply_chat_template(messages, **self._template_options)
            except Exception as error:  # a template is a program, and may refuse a question that it alone knows of
                what = f"the chat template ends in an error ({one_line(error)})"
                raise UnusableSample("malformed_record", what) from None
            if (found := ids.count(self.image_token_id)) != num_images:
                token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
                what = f"its chat template writes {found} image tokens ({token}, config.json's image_token_id"
                raise refusal(self.path, f"{what}={self.image_token_id}) for {num_images} images", _OWN_TEMPLATE)
            # rendering costs more than a small image: student and teacher share it, and so do repeated questions
            if len(self._templates) >= _MAX_CACHED_TEMPLATES:
                self._templates.clear()
            self._templates[key] = ids
        return self._templates[key]


def _messages(question: str, num_images: int) -> list[dict[str, Any]]:
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def mrope_positions(token_ids: Tensor, grid_thw: Tensor, image_token_id: int, merge: int) -> Tensor:
    """[3, P] int64 positions (temporal, height, width) of the prompt `token_ids` [P], as Qwen2.5-VL counts them.

    Text advances all three by one. An image of `grid_thw` row (t, h, w) that starts at p has positions p + (its
    index along time, height, width of the merged grid); text goes on at p + max(h, w) / merge.
    """
    pieces, start, position = [], 0, 0
    image_starts = _run_starts(token_ids == image_token_id, grid_thw.prod(dim=1) // merge**2)
    for image_start, (t, h, w) in zip(image_starts, grid_thw.tolist(), strict=True):
        text = image_start - start
        pieces.append((position + torch.arange(text)).expand(3, text))
        position += text
        merged = torch.cartesian_prod(torch.arange(t), torch.arange(h // merge), torch.arange(w // merge))
        pieces.append(position + merged.T)
        start = image_start + merged.shape[0]
        position += max(h, w) // merge
    rest = token_ids.numel() - start
    pieces.append((position + torch.arange(rest)).expand(3, rest))
    return torch.cat(pieces, dim=1)


def _run_starts(is_image: Tensor, counts: Tensor) -> list[int]:
    """Index of the first token of each image, given how many tokens each has (images may touch)."""
    where = is_image.nonzero().flatten()
    assert where.numel() == int(counts.sum()), "image tokens do not match the image grids"
    return where[counts.cumsum(0) - counts].tolist()


def _is_vision_id(key: str, value: object) -> bool:
    return isinstance(value, int) and bool(re.fullmatch(r"(image|video|vision)(_start|_end)?_token_id", key))
