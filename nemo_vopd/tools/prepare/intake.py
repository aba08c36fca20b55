"""One row of a source to one checked record, its images read and decoded once."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_vopd.data.record_fields import (
    Conversation,
    check_answers,
    check_question,
    evidence_box,
    is_blank,
    read_conversation,
    without_hint,
)
from nemo_vopd.decoding import MAX_IMAGE_PIXELS, ImageFacts, check_image
from nemo_vopd.images import MAX_ASPECT, UnusableSample, check_box, crop_box, turn_box, turn_box_back
from nemo_vopd.tools.prepare.options import LISTS, PrepareOptions
from nemo_vopd.tools.prepare.rows import Row, Source, record_id

TRAITS = (
    "answer",
    "box",
    "crop",
    "hint",  # the question carries the hint
    "rotated",  # the image is turned or mirrored by EXIF
    "flat",  # the image has one colour
    "dark",  # the image is nearly black
    "several_questions",  # the conversation asks more than once
    "several_boxes",
    "leaving",  # the box reaches beyond the image
    "fraction",  # no number of a box is above 1, and it is not given in fractions
    "large",  # a box given in pixels of an image with a side above 1500 pixels
    "large_thousandths",  # ... of which no coordinate is above 1000
    "large_percent",  # ... of which no coordinate is above 100
    "upscaled",  # the crop is enlarged more than twice
    "extreme_crop",  # the crop is too elongated for an image processor
)
"""What records are counted under."""
_LARGE, _UPSCALED = 1500, 2.0
MAX_IMAGE_BYTES = 3 * MAX_IMAGE_PIXELS
"""Longer image files are dropped unread; the largest image that is accepted takes this when decoded."""


@dataclass
class Prepared:
    """A checked record, ready to be written."""

    id: str
    question: str
    image: bytes
    crop: bytes | None
    bbox: list[float] | None
    """Corners in pixels of the image as it is stored."""
    answers: list[str]
    """Reference answers, any of which is right."""
    facts: ImageFacts
    split: str
    """train | validation"""
    traits: set[str]
    """What it is counted under: see `TRAITS`."""

    def relative_area(self) -> float | None:
        """Area of the box inside the image, over that of the image."""
        if self.bbox is None:
            return None
        x1, y1, x2, y2 = check_box(self.bbox, self.facts.size)
        return (x2 - x1) * (y2 - y1) / math.prod(self.facts.size)


def read_record(
    row: Row, source: Source, options: PrepareOptions, prefix: str = "", crop_policy: dict[str, Any] | None = None
) -> Prepared:
    """The checked record of `row`; its id begins with `prefix`. Raises UnusableSample.

    `crop_policy` are the options of `crop_box` by which its crop is judged; without them it is not.
    """
    values, columns = row.values, options.columns
    if isinstance(values, UnusableSample):
        raise values
    asked = _conversation(values, options)
    question = check_question(asked.question)
    hinted = options.hint_text in question
    if hinted and options.hint == "remove":
        question = check_question(without_hint(question, options.hint_text))
    sample_id = record_id(row, source, columns)
    answers = check_answers(columns.find("answer", values)[1]) or check_answers(asked.answer)
    image_column, value = columns.find("image", values)
    if is_blank(value) and asked.images:
        image_column, value = "images", asked.images
    if value is None and image_column not in LISTS:
        raise UnusableSample("missing_image", "no image is named")
    image = _image(value, image_column, source, "missing_image")
    crop_column, value = columns.find("crop_image", values)
    crop = None if value is None else _image(value, crop_column, source, "missing_crop")
    (box_column, given), num_boxes = columns.find("bbox", values), 0
    # ms-swift's records say themselves that their boxes are fractions
    is_unit = box_column == "objects.bbox" and values["objects"].get("bbox_type") == "norm1"
    box_format = "xyxy_unit" if is_unit else options.bbox_format
    if given is None and crop is None:
        raise UnusableSample("missing_crop", "neither bbox nor crop image")
    # decoded in full: a truncated file is found now, not in the middle of a run
    facts = check_image(image, options.max_image_pixels)
    size = facts.upright_size if options.bbox_frame == "upright" else facts.size
    bbox = shown = None
    if given is not None:
        bbox, num_boxes = evidence_box(given, box_format, size)
        shown = bbox if options.bbox_frame == "upright" else turn_box(bbox, facts.orientation, facts.size)
        bbox = turn_box_back(shown, facts.orientation, facts.size)
    crop_size = None if crop is None else check_image(crop, options.max_image_pixels).size
    traits = {
        "answer": bool(answers),
        "crop": crop is not None,
        "hint": hinted,
        "rotated": facts.orientation != 1,
        "flat": facts.flat,
        "dark": facts.dark,
        "several_questions": asked.num_questions > 1,
        "several_boxes": num_boxes > 1,
    }
    if bbox is not None:
        traits |= _of_box(given, box_format, bbox, facts.size)
    if crop_policy is not None and (crop_size is not None or shown is not None):
        traits |= _of_crop(shown, facts.upright_size, crop_size, crop_policy)
    has_id = bool(columns.find("id", values)[0])
    # a default id counts records, and would move those behind a new one to the other side
    key = sample_id.encode() if options.split_by == "id" and has_id else image
    split = side(key, options.validation_fraction)
    named = {name for name, holds in traits.items() if holds}
    return Prepared(prefix + sample_id, question, image, crop, bbox, answers, facts, split, named)  # type: ignore[arg-type]


def _conversation(values: dict, options: PrepareOptions) -> Conversation:
    column, value = options.columns.find("question", values)
    asked = read_conversation(value, column)
    if column == "instruction" and isinstance(more := values.get("input"), str) and more.strip():
        asked.question = f"{asked.question}\n{more}"  # as LLaMA-Factory joins them
    return asked


def _of_box(given: object, box_format: str, bbox: object, size: tuple[int, int]) -> dict[str, bool]:
    """The traits of a box: as it is `given` in `box_format`, and in pixels of the stored image of `size`."""
    (x1, y1, x2, y2), (width, height) = bbox, size  # type: ignore[misc]
    boxes: Any = given
    largest = [max(box) for box in (boxes if isinstance(boxes[0], list | tuple) else [boxes])]
    large = max(size) > _LARGE and box_format in ("xyxy", "xywh")
    return {
        "box": True,
        "leaving": x1 < -1 or y1 < -1 or x2 > width + 1 or y2 > height + 1,  # a pixel is rounding
        "fraction": box_format != "xyxy_unit" and min(largest) <= 1,
        "large": large,
        "large_thousandths": large and max(largest) <= 1000,
        "large_percent": large and max(largest) <= 100,
    }


def _of_crop(
    bbox: object, image_size: tuple[int, int], crop_size: tuple[int, int] | None, policy: dict[str, Any]
) -> dict[str, bool]:
    """The traits of a crop: one that is given, with its size, else the one around `bbox` by `policy`."""
    if crop_size is None:
        left, top, right, bottom = crop_box(bbox, image_size, **policy)
        crop_size = right - left, bottom - top
    width, height = crop_size
    return {
        "upscaled": math.sqrt(policy.get("min_pixels", 0) / (width * height)) > _UPSCALED,
        "extreme_crop": max(width, height) > MAX_ASPECT * min(width, height),
    }


def side(key: bytes, validation_fraction: float) -> str:
    """train | validation, by a hash of `key` alone: what other records there are changes nothing."""
    place = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
    return "validation" if place < validation_fraction else "train"


def _image(value: object, column: str, source: Source, missing: str) -> bytes:
    """The bytes of an image: given by path, by {"path": ...}, in tables also by {"bytes": ...} or as themselves."""
    listed = column in LISTS or isinstance(value, list)
    if listed and not _holds_bytes(value):
        if not isinstance(value, list):
            raise UnusableSample("malformed_record", "images must be a list")
        if len(value) != 1:
            raise UnusableSample("several_images" if value else missing, f"{len(value)} images in place of one")
        value = value[0]
    if listed or source.tabular:
        if isinstance(value, dict):
            content = value.get("bytes")
            given = isinstance(content, bytes) or _holds_bytes(content)
            value = content if given else value.get("path", value.get("image", value.get("url")))
        if value is None:
            raise UnusableSample(missing, "an image without a path")
    if _holds_bytes(value):
        value = bytes(value)  # type: ignore[arg-type]
    if isinstance(value, bytes):
        if len(value) > MAX_IMAGE_BYTES:
            raise UnusableSample("image_too_large", f"{len(value)} bytes, more than {MAX_IMAGE_BYTES}")
        return value
    return _read_file(source.root, value, missing)


def _holds_bytes(value: object) -> bool:
    """Whether `value` is the bytes of a file as a list of numbers, as tables of uint8 give them."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, int) and 0 <= one < 256 for one in value)


def _read_file(root: Path, name: object, missing: str) -> bytes:
    """Bytes of the file `name` under `root`; links are followed before the check, so none leads outside."""
    if not isinstance(name, str) or not name:
        raise UnusableSample("malformed_record", "an image path is not a text")
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise UnusableSample("path_outside_folder", name)
        if not path.is_file():  # opening a FIFO would wait for ever
            raise UnusableSample(missing, f"{name}: not a file")
        size = path.stat().st_size
        if size > MAX_IMAGE_BYTES:
            raise UnusableSample("image_too_large", f"{name}: {size} bytes, more than {MAX_IMAGE_BYTES}")
        return path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        raise UnusableSample(missing, f"{name}: {type(error).__name__}") from None
