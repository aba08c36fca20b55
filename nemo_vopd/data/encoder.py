"""A stored record to a sample: both of its prompts, or the reason why it cannot be used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from nemo_vopd.batch import DroppedSample, Sample, View
from nemo_vopd.config import DataConfig
from nemo_vopd.data.dataset import RawRecord, iterate_records
from nemo_vopd.data.processor import Processor
from nemo_vopd.data.record_fields import check_answers, check_id, check_question
from nemo_vopd.decoding import load_image, load_with_box
from nemo_vopd.images import UnusableSample, check_sides, crop_box, draw_box

_MAX_CHARACTERS_PER_TOKEN = 32
"""No readable text has more on average; that of English is between four and five."""


@dataclass
class SampleEncoder:
    """Builds the two prompts of a record. `teacher_view`: crop | full | full_and_crop | boxed."""

    data: DataConfig
    teacher_view: str
    processor: Processor

    def __call__(self, record: RawRecord) -> Sample | DroppedSample:
        """The Sample of `record`, or why it cannot be used."""
        sample_id = record.name
        try:
            meta = parse_meta(record.meta)
            sample_id = check_id(meta.get("id", sample_id))
            if record.image is None:
                raise UnusableSample("missing_image")
            image, bbox = load_with_box(record.image, meta.get("bbox"))
            return self._encode(record, sample_id, meta, image, bbox)
        except UnusableSample as unusable:
            return DroppedSample(sample_id, unusable.reason, unusable.detail)

    def _encode(self, record: RawRecord, sample_id: str, meta: dict, image: Image.Image, bbox: object) -> Sample:
        data, crop = self.data, record.crop
        # the hint belongs to the prompt, never to the emptiness check
        question = check_question(meta.get("question")) + data.question_hint
        if len(question) > _MAX_CHARACTERS_PER_TOKEN * data.max_prompt_length:  # before tokenizing it at great cost
            detail = f"{len(question)} characters, data.max_prompt_length={data.max_prompt_length}"
            raise UnusableSample("overlong_prompt", detail)
        full = draw_box(image, _required(bbox)) if data.draw_box else image
        student = self._view([full], question, [data.full])
        if self.teacher_view == "full":
            teacher = student
        elif self.teacher_view == "boxed":
            teacher = self._view([draw_box(image, _required(bbox))], question, [data.full])
        else:
            evidence = load_image(crop) if crop is not None else cut_crop(image, bbox, data)
            if self.teacher_view == "crop":
                teacher = self._view([evidence], question, [data.crop_pixels])
            else:
                teacher = self._view([full, evidence], question, [data.full, data.crop_pixels])
        return Sample(sample_id, record.key, student, teacher, question, check_answers(meta.get("answer")))

    def _view(self, images: list[Image.Image], question: str, pixels: list) -> View:
        view = self.processor.view(images, question, pixels)
        if view.num_tokens > self.data.max_prompt_length:
            detail = f"{view.num_tokens} tokens, data.max_prompt_length={self.data.max_prompt_length}"
            raise UnusableSample("overlong_prompt", detail)
        return view


def cut_crop(image: Image.Image, bbox: object, data: DataConfig) -> Image.Image:
    """The evidence-centred crop of `image` around `bbox`, by `data.crop`. Raises UnusableSample."""
    if bbox is None:
        raise UnusableSample("missing_crop", "neither bbox nor crop image")
    box = crop_box(bbox, image.size, **vars(data.crop), min_pixels=data.crop_pixels.min_pixels)
    check_sides(box[2] - box[0], box[3] - box[1])
    return image.crop(box)


def _required(bbox: object) -> object:
    if bbox is None:
        raise UnusableSample("missing_box", "the view shows the evidence box, and the record has none")
    return bbox


def parse_meta(data: bytes | None) -> dict:
    """The stored json of a record (id, question, bbox, answer), its fields unchecked. Raises UnusableSample."""
    try:
        meta = json.loads(data or b"null")
    except (ValueError, RecursionError) as error:
        raise UnusableSample("malformed_record", f"not JSON: {error}") from None
    if not isinstance(meta, dict):
        raise UnusableSample("malformed_record", "the stored json is no object")
    return meta


def iterate_samples(
    path: str | Path,
    data: DataConfig,
    teacher_view: str,
    processor: Processor,
    limit: int | None = None,
    *,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Iterator[Sample | DroppedSample]:
    """Every `dp_size`-th of the first `limit` records (default: all) of `path`, from `dp_rank` on, for evaluation.

    Views follow `data` and `teacher_view`; `data.path` is not used. Raises OptionError as `iterate_records` does.
    """
    encode = SampleEncoder(data, teacher_view, processor)
    yield from map(encode, islice(iterate_records(path, limit), dp_rank, None, dp_size))
