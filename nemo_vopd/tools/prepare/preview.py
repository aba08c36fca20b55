"""A contact sheet of some records of a source: full image with the box, the teacher's crop, question and answer."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from nemo_vopd.errors import OptionError
from nemo_vopd.tools.prepare.intake import Prepared, RecordOptions, read_record
from nemo_vopd.tools.prepare.prepare import check_options, plan_source
from nemo_vopd.tools.prepare.rows import Plan, Source
from nemo_vopd.tools.prepare.sources import open_sources
from nemo_vopd.views import UnusableSample, check_box, check_sides, crop_box, load_image, load_with_box

_PAPER, _INK, _MUTED, _LINE, _RED = (250, 249, 247), (28, 33, 40), (89, 98, 110), (216, 213, 207), (221, 45, 30)
_MARGIN, _GAP, _FULL, _CROP, _HEIGHT = 28, 16, 400, 290, 290
_CELL_WIDTH, _TEXT_HEIGHT = _FULL + _GAP + _CROP, 116
_CHUNK, _TRIES = 64, 16


@dataclass
class _Cell:
    record: Prepared
    image: Image.Image
    crop: Image.Image
    bbox: object
    """In pixels of the upright image."""
    window: tuple[int, int, int, int] | None
    """Corners of the crop in the image; None where the crop is a file."""


def write_preview(
    sources: Sequence[Path],
    target: Path,
    *,
    crop: dict[str, Any],
    crop_pixels: tuple[int, int],
    num_samples: int = 12,
    split: str | None = None,
    image_root: Path | None = None,
    progress: bool = True,
    **record_options: Any,
) -> None:
    """Draw `num_samples` records, evenly spread over `sources`, to the PNG file `target`; the same ones each time.

    `crop` are the fields of CropConfig, `crop_pixels` the least and most pixels that crops are resized to;
    `record_options` those of RecordOptions. Raises OptionError as `prepare` does.
    """
    options = RecordOptions(**record_options)
    check_options(options, sources, None, shard_size=1, workers=1)
    if num_samples < 1:
        raise OptionError("preview_samples", num_samples, "must be at least 1", "set preview_samples=12")
    opened = open_sources(sources, split, image_root)
    plans = [plan_source(source, _CHUNK, options, progress) for source in opened]
    cells: list[_Cell] = []
    tried = 0
    for source, plan, count in zip(
        opened, plans, _shares([plan.num_records for plan in plans], num_samples), strict=True
    ):
        for attempt in _spread(source, plan, options, crop, crop_pixels[0], count):
            tried += 1
            cells += [attempt] if isinstance(attempt, _Cell) else []
    if not cells:
        raise OptionError("source", sources[0], f"none of {tried} records can be used", "prepare it to see why")
    sheet = _draw(cells, crop, crop_pixels, ", ".join(str(path) for path in sources))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    sheet.save(temporary, "PNG")
    os.replace(temporary, target)
    print(f"{len(cells)} records in {target}; {tried - len(cells)} others could not be used")


def _shares(sizes: list[int], num_samples: int) -> list[int]:
    """`num_samples` over the sources, by size, at least one of each that has any."""
    whole = max(sum(sizes), 1)
    return [min(size, max(1, round(num_samples * size / whole))) if size else 0 for size in sizes]


def _spread(
    source: Source, plan: Plan, options: RecordOptions, crop: dict[str, Any], min_pixels: int, count: int
) -> Iterator[_Cell | UnusableSample]:
    """Attempts at records at even distances; where one cannot be used, the next ones."""
    following = 0
    for number in range(count):
        start = max(following, (2 * number + 1) * plan.num_records // (2 * count))
        for ordinal in range(start, min(start + _TRIES, plan.num_records)):
            attempt = _attempt(source, plan, options, crop, min_pixels, ordinal)
            following = ordinal + 1
            yield attempt
            if isinstance(attempt, _Cell):
                break


def _attempt(
    source: Source, plan: Plan, options: RecordOptions, crop: dict[str, Any], min_pixels: int, ordinal: int
) -> _Cell | UnusableSample:
    chunk = plan.chunks[ordinal // _CHUNK]
    try:
        if ordinal in chunk.duplicates:
            raise UnusableSample("duplicate_id")
        rows = source.rows(chunk, options.columns)
        record = read_record(next(row for row in rows if row.ordinal == ordinal), source, options)
        image, bbox = load_with_box(record.image, record.bbox, options.max_image_pixels)
        if record.crop is not None:
            return _Cell(record, image, load_image(record.crop, options.max_image_pixels), bbox, None)
        window = crop_box(bbox, image.size, **crop, min_pixels=min_pixels)
        check_sides(window[2] - window[0], window[3] - window[1])
        return _Cell(record, image, image.crop(window), bbox, window)
    except UnusableSample as unusable:
        return unusable


def _draw(cells: list[_Cell], crop: dict[str, Any], crop_pixels: tuple[int, int], title: str) -> Image.Image:
    columns = min(2, len(cells))
    rows = math.ceil(len(cells) / columns)
    width = _MARGIN * (columns + 1) + columns * _CELL_WIDTH
    top = 84
    sheet = Image.new("RGB", (width, top + rows * (_HEIGHT + _TEXT_HEIGHT + _MARGIN)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 20), _shorten(title, width // 12), _INK, ImageFont.load_default(22))
    policy = ", ".join(f"{name} {value}" for name, value in crop.items() if value is not None)
    sizes = f"red: box, grey: crop; crops are resized to {crop_pixels[0]:,} to {crop_pixels[1]:,} pixels"
    draw.text((_MARGIN, 52), _shorten(f"crop: {policy}; {sizes}", width // 8), _MUTED, ImageFont.load_default(15))
    for place, cell in enumerate(cells):
        x = _MARGIN + place % columns * (_CELL_WIDTH + _MARGIN)
        y = top + place // columns * (_HEIGHT + _TEXT_HEIGHT + _MARGIN)
        _draw_cell(sheet, draw, cell, x, y, crop_pixels)
    return sheet


def _draw_cell(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, cell: _Cell, x: int, y: int, crop_pixels: tuple[int, int]
) -> None:
    record = cell.record
    factor, left, top = _paste(sheet, cell.image, x, y, _FULL)
    if cell.window is not None:
        _outline(draw, cell.window, factor, left, top, _PAPER, _MUTED)
    if cell.bbox is not None:
        _outline(draw, check_box(cell.bbox, cell.image.size), factor, left, top, (255, 255, 255), _RED)
    crop_factor, crop_left, crop_top = _paste(sheet, cell.crop, x + _FULL + _GAP, y, _CROP)
    if cell.bbox is not None and cell.window is not None:
        x1, y1, x2, y2 = check_box(cell.bbox, cell.image.size)
        dx, dy = cell.window[:2]
        inner = (x1 - dx, y1 - dy, x2 - dx, y2 - dy)
        _outline(draw, inner, crop_factor, crop_left, crop_top, (255, 255, 255), _RED)
    bold, small = ImageFont.load_default(16), ImageFont.load_default(14)
    line = y + _HEIGHT + 8
    question = " ".join(record.question.split())
    for text in _lines(question, 84, 2):
        draw.text((x, line), text, _INK, bold)
        line += 21
    answer = "no answer" if record.answer is None else f"answer: {' '.join(record.answer.split())}"
    draw.text((x, line + 1), _shorten(answer, 100), _MUTED, small)
    draw.text((x, line + 20), _sizes(cell, crop_pixels), _MUTED, small)
    draw.text((x, line + 39), _shorten(record.id, 100), _MUTED, small)
    draw.line((x, y + _HEIGHT + _TEXT_HEIGHT, x + _CELL_WIDTH, y + _HEIGHT + _TEXT_HEIGHT), _LINE)


def _sizes(cell: _Cell, crop_pixels: tuple[int, int]) -> str:
    width, height = cell.crop.size
    area = width * height
    factor = math.sqrt(min(max(area, crop_pixels[0]), crop_pixels[1]) / area)
    kind = "crop" if cell.window is not None else "crop image"
    text = f"image {cell.image.width}x{cell.image.height}; {kind} {width}x{height}"
    text += f", resized {factor:.2g} times" if abs(factor - 1) > 0.005 else ""
    share = cell.record.relative_area()
    return text + (f"; box {100 * share:.2g}% of the image" if share is not None else "; no box")


def _paste(sheet: Image.Image, image: Image.Image, x: int, y: int, width: int) -> tuple[float, int, int]:
    """Fit `image` into `width` x _HEIGHT at (x, y), aligned left and down; (factor, left, top)."""
    factor = min(width / image.width, _HEIGHT / image.height)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    # small crops are shown in the pixels they have: enlarging smoothly would promise detail
    resample = Image.Resampling.NEAREST if factor > 2 else Image.Resampling.LANCZOS
    top = y + _HEIGHT - size[1]
    sheet.paste(image.resize(size, resample), (x, top))
    return factor, x, top


def _outline(
    draw: ImageDraw.ImageDraw,
    box: Sequence[float],
    factor: float,
    left: int,
    top: int,
    halo: tuple[int, int, int],
    colour: tuple[int, int, int],
) -> None:
    """A frame around `box`, visible on any ground, however small the box."""
    x1, y1, x2, y2 = (round(value * factor) for value in box)
    x1, y1, x2, y2 = left + x1, top + y1, left + max(x2, x1 + 2), top + max(y2, y1 + 2)
    draw.rectangle((x1 - 3, y1 - 3, x2 + 2, y2 + 2), outline=halo, width=1)
    draw.rectangle((x1 - 2, y1 - 2, x2 + 1, y2 + 1), outline=colour, width=2)


def _lines(text: str, width: int, most: int) -> list[str]:
    lines = textwrap.wrap(text, width) or [""]
    if len(lines) > most:
        lines = [*lines[: most - 1], _shorten(" ".join(lines[most - 1 :]), width)]
    return lines


def _shorten(text: str, width: int) -> str:
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= width else text[: width - 3].rstrip() + "..."
