"""examples.json of a run: questions with both views and answers, and responses token by token, images inside."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from nemo_vopd.tools.report.numbers import as_float

MAX_IMAGE_SIDE = 640
"""Larger images are shrunk before they are kept: the page shows none of them wider."""
_PIXEL_ART_SIDE = 256
"""Small images are kept exactly, larger ones as photographs are."""
_DATA_URI = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*")
Box = tuple[float, float, float, float]
TopTokens = list[list[tuple[str, float]]]


@dataclass
class Picture:
    """An image as a data URI, and its size before it was shrunk, in pixels."""

    uri: str
    width: int
    height: int


@dataclass
class Answer:
    """What the model said, and whether it is right as accuracy counts it; None: not known."""

    text: str
    right: bool | None


@dataclass
class Example:
    """One question with both views, and the model's answers before and after training where they are known."""

    image: Picture | None
    bbox: Box | None
    """The evidence in pixels of the image before it was shrunk: left, top, right, bottom."""
    crop: Picture | None
    question: str
    answer: str | None
    full_before: Answer | None
    full_after: Answer | None
    crop_before: Answer | None
    crop_after: Answer | None

    @property
    def shown_box(self) -> Box | None:
        """The part of the box that lies in the image; None where there is none to draw."""
        if self.image is None or self.bbox is None or not all(map(math.isfinite, self.bbox)):
            return None
        sides = 2 * (self.image.width, self.image.height)
        left, top, right, bottom = (min(max(edge, 0.0), side) for edge, side in zip(self.bbox, sides, strict=True))
        return (left, top, right, bottom) if left < right and top < bottom else None


@dataclass
class TokenTrace:
    """One response of the student, and what both policies gave each of its T tokens."""

    image: Picture | None
    crop: Picture | None
    question: str
    tokens: list[str]
    student_log_probs: list[float]
    """[T] log-probability of the sampled token, nats; the full view."""
    teacher_log_probs: list[float]
    """[T] the same; the crop view."""
    divergence: list[float]
    """[T] generalised Jensen-Shannon divergence, 0 to ln 2."""
    student_top: TopTokens
    """[T] the most probable tokens and their probabilities."""
    teacher_top: TopTokens


@dataclass
class Examples:
    """The contents of examples.json."""

    examples: list[Example] = field(default_factory=list)
    traces: list[TokenTrace] = field(default_factory=list)
    note: str = ""
    """Which models wrote and scored the responses of `traces`."""


def picture(image: Image.Image) -> Picture:
    """`image` as it is kept: at most MAX_IMAGE_SIDE wide and high; exact when small, else as JPEG."""
    width, height = image.size
    shown = image if image.mode in ("RGB", "L") else image.convert("RGB")
    exact = max(shown.size) <= _PIXEL_ART_SIDE
    if max(shown.size) > MAX_IMAGE_SIDE:
        shown = shown.copy()
        shown.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    buffer = io.BytesIO()
    if exact:
        shown.save(buffer, format="PNG", optimize=True)
    else:
        shown.save(buffer, format="JPEG", quality=82, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(f"data:image/{'png' if exact else 'jpeg'};base64,{data}", width, height)


def write_examples(path: Path, content: Examples) -> None:
    """Write `path`; numbers that are not finite become null."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(_without_nan(dataclasses.asdict(content))) + "\n", encoding="utf-8")
    partial.replace(path)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_examples(data: dict[str, Any]) -> Examples:
    """The contents of the JSON object `data`; what has another form than `write_examples` gives it is left out."""
    return Examples(
        [_example(row) for row in _rows(data.get("examples"))],
        [_trace(row) for row in _rows(data.get("traces"))],
        _text(data.get("note")) or "",
    )


def _example(row: dict[str, Any]) -> Example:
    answers = [_answer(row.get(f"{view}_{moment}")) for view in ("full", "crop") for moment in ("before", "after")]
    bbox = row.get("bbox")
    box = tuple(as_float(edge) for edge in bbox) if isinstance(bbox, list) and len(bbox) == 4 else None
    image, crop = _picture(row.get("image")), _picture(row.get("crop"))
    question, answer = _text(row.get("question")) or "", _text(row.get("answer"))
    return Example(image, box, crop, question, answer, *answers)  # type: ignore[arg-type]


def _answer(value: object) -> Answer | None:
    if not isinstance(value, dict) or value.get("text") is None:
        return None
    right = value.get("right")
    return Answer(str(value["text"]), right if isinstance(right, bool) else None)


def _trace(row: dict[str, Any]) -> TokenTrace:
    return TokenTrace(
        _picture(row.get("image")),
        _picture(row.get("crop")),
        _text(row.get("question")) or "",
        [str(token) for token in _list(row.get("tokens"))],
        *(_numbers(row.get(key)) for key in ("student_log_probs", "teacher_log_probs", "divergence")),
        student_top=_tops(row.get("student_top")),
        teacher_top=_tops(row.get("teacher_top")),
    )


def _numbers(value: object) -> list[float]:
    return [as_float(number) for number in _list(value)]


def _tops(value: object) -> TopTokens:
    return [
        [(str(pair[0]), as_float(pair[1])) for pair in _list(top) if isinstance(pair, list) and len(pair) == 2]
        for top in _list(value)
    ]


def _picture(value: object) -> Picture | None:
    """A picture whose URI can only be an image."""
    if not isinstance(value, dict) or not isinstance(value.get("uri"), str) or not _DATA_URI.fullmatch(value["uri"]):
        return None
    width, height = as_float(value.get("width")), as_float(value.get("height"))
    return Picture(value["uri"], int(width), int(height)) if width >= 1 and height >= 1 else None


def _rows(value: object) -> list[dict[str, Any]]:
    return [row for row in _list(value) if isinstance(row, dict)]


def _list(value: object) -> list:
    return value if isinstance(value, list) else []


def _text(value: object) -> str | None:
    return None if value is None else str(value)
