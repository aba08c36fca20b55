"""One row of a source to one checked record, its images read and decoded once."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from nemo_vopd.data.record_fields import box_in_pixels, check_answers, check_question, question_text, without_hint
from nemo_vopd.images import MAX_IMAGE_PIXELS, ImageFacts, UnusableSample, check_box, check_image, turn_box_back
from nemo_vopd.tools.prepare.options import LISTS, PrepareOptions
from nemo_vopd.tools.prepare.rows import Row, Source, record_id

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
    hinted: bool
    """Whether the question carried the hint."""

    def relative_area(self) -> float | None:
        """Area of the box inside the image, over that of the image."""
        if self.bbox is None:
            return None
        x1, y1, x2, y2 = check_box(self.bbox, self.facts.size)
        return (x2 - x1) * (y2 - y1) / math.prod(self.facts.size)


def read_record(row: Row, source: Source, options: PrepareOptions, prefix: str = "") -> Prepared:
    """The checked record of `row`; its id begins with `prefix`. Raises UnusableSample."""
    values, columns = row.values, options.columns
    if isinstance(values, UnusableSample):
        raise values
    question_column, question = columns.find("question", values)
    question = check_question(question_text(question, question_column))
    hinted = options.hint_text in question
    if hinted and options.hint == "remove":
        question = check_question(without_hint(question, options.hint_text))
    sample_id = record_id(row, source, columns)
    answers = check_answers(columns.find("answer", values)[1])
    image_column, value = columns.find("image", values)
    if value is None and image_column not in LISTS:
        raise UnusableSample("missing_image", "no image is named")
    image = _image(value, image_column, source, "missing_image")
    crop_column, value = columns.find("crop_image", values)
    crop = None if value is None else _image(value, crop_column, source, "missing_crop")
    bbox = columns.find("bbox", values)[1]
    if bbox is None and crop is None:
        raise UnusableSample("missing_crop", "neither bbox nor crop image")
    # decoded in full: a truncated file is found now, not in the middle of a run
    facts = check_image(image, options.max_image_pixels)
    if bbox is not None and options.bbox_frame == "upright":
        bbox = box_in_pixels(bbox, options.bbox_format, facts.upright_size)
        bbox = turn_box_back(bbox, facts.orientation, facts.size)
    elif bbox is not None:
        bbox = box_in_pixels(bbox, options.bbox_format, facts.size)
    if crop is not None:
        check_image(crop, options.max_image_pixels)
    has_id = bool(columns.find("id", values)[0])
    # a default id counts records, and would move those behind a new one to the other side
    key = sample_id.encode() if options.split_by == "id" and has_id else image
    split = side(key, options.validation_fraction)
    return Prepared(prefix + sample_id, question, image, crop, bbox, answers, facts, split, hinted)  # type: ignore[arg-type]


def side(key: bytes, validation_fraction: float) -> str:
    """train | validation, by a hash of `key` alone: what other records there are changes nothing."""
    place = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
    return "validation" if place < validation_fraction else "train"


def _image(value: object, column: str, source: Source, missing: str) -> bytes:
    """The bytes of an image: given by path, by {"path": ...}, in tables also by {"bytes": ...} or as themselves."""
    listed = column in LISTS or (source.tabular and isinstance(value, list))
    if listed:
        if not isinstance(value, list):
            raise UnusableSample("malformed_record", "images must be a list")
        if len(value) != 1:
            reason = "malformed_record" if value else missing
            raise UnusableSample(reason, f"{len(value)} images in place of one")
        value = value[0]
    if listed or source.tabular:
        if isinstance(value, dict):
            content = value.get("bytes")
            value = content if isinstance(content, bytes) else value.get("path", value.get("image"))
        if value is None:
            raise UnusableSample(missing, "an image without a path")
    if isinstance(value, bytes):
        if len(value) > MAX_IMAGE_BYTES:
            raise UnusableSample("image_too_large", f"{len(value)} bytes, more than {MAX_IMAGE_BYTES}")
        return value
    return _read_file(source.root, value, missing)


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
