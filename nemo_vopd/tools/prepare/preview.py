"""A contact sheet of some records of a source: full image with the box, the teacher's crop, question and answer."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from nemo_vopd.decoding import load_image, load_with_box
from nemo_vopd.errors import OptionError
from nemo_vopd.images import UnusableSample, check_box, check_sides, crop_box
from nemo_vopd.tools.prepare.intake import Prepared, read_record
from nemo_vopd.tools.prepare.options import PrepareOptions
from nemo_vopd.tools.prepare.rows import Chunk, Source, plan_chunks
from nemo_vopd.tools.prepare.sources import open_sources

_PAPER, _INK, _MUTED, _LINE, _RED = "#faf9f7", "#1c2128", "#59626e", "#d8d5cf", "#dd2d1e"
_MARGIN, _GAP, _FULL, _CROP, _HEIGHT, _TOP = 28, 16, 400, 290, 290, 84
_CELL_WIDTH, _TEXT_HEIGHT = _FULL + _GAP + _CROP, 116
_CHUNK, _TRIES = 64, 16
Frame = tuple[Sequence[float], str, str]
"""Box in an image, colour of the halo around it, colour of the frame."""


@dataclass
class _Cell:
    record: Prepared
    image: Image.Image
    crop: Image.Image
    bbox: object
    """Box in pixels of the upright image."""
    window: tuple[int, int, int, int] | None
    """Corners of the crop in the image; None where the crop is a file."""


def write_preview(
    paths: Sequence[Path],
    target: Path,
    *,
    crop: dict[str, Any],
    crop_pixels: tuple[int, int],
    num_samples: int = 12,
    progress: bool = True,
    **options: Any,
) -> None:
    """Draw `num_samples` records, evenly spread over the sources, to the PNG file `target`; the same ones each time.

    `crop` are the fields of CropConfig, `crop_pixels` the least and most pixels that crops are resized to; `options`
    the fields of `PrepareOptions`. Raises OptionError as `prepare` does.
    """
    chosen = PrepareOptions(**options)
    chosen.check(len(paths))
    if num_samples < 1:
        raise OptionError("preview_samples", num_samples, "must be at least 1", "set preview_samples=12")
    sources = open_sources(paths, chosen.split, chosen.image_root)
    plans = [plan_chunks(source, _CHUNK, chosen.columns, progress) for source in sources]
    shares = _shares([sum(chunk.count for chunk in chunks) for chunks in plans], num_samples)
    cells: list[_Cell] = []
    tried = 0
    for source, chunks, share in zip(sources, plans, shares, strict=True):
        for cell in _spread(source, chunks, chosen, {**crop, "min_pixels": crop_pixels[0]}, share):
            tried += 1
            cells += [cell] if cell else []
    if not cells:
        raise OptionError("source", paths[0], f"none of {tried} records can be used", "prepare it to see why")
    sheet = _draw(cells, crop, crop_pixels, ", ".join(map(str, paths)))
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target)
    print(f"{len(cells)} records in {target}; {tried - len(cells)} others could not be used")


def _shares(sizes: list[int], num_samples: int) -> list[int]:
    """`num_samples` over the sources, by size, at least one of each that has any."""
    whole = max(sum(sizes), 1)
    return [min(size, max(1, round(num_samples * size / whole))) for size in sizes]


def _spread(
    source: Source, chunks: Sequence[Chunk], options: PrepareOptions, crop: dict[str, Any], count: int
) -> Iterator[_Cell | None]:
    """Records at even distances; where one cannot be used (None), the next ones."""
    num_records = sum(chunk.count for chunk in chunks)
    following = 0
    for number in range(count):
        start = max(following, (2 * number + 1) * num_records // (2 * count))
        for place in range(start, min(start + _TRIES, num_records)):
            following = place + 1
            try:
                cell = _cell(source, chunks[place // _CHUNK], options, crop, place)
            except UnusableSample:
                cell = None
            yield cell
            if cell:
                break


def _cell(source: Source, chunk: Chunk, options: PrepareOptions, crop: dict[str, Any], place: int) -> _Cell:
    """The record at `place`. Raises UnusableSample."""
    if place in chunk.duplicates:
        raise UnusableSample("duplicate_id")
    row = next(row for at, row in source.chunk_rows(chunk, options.columns) if at == place)
    record = read_record(row, source, options)
    image, bbox = load_with_box(record.image, record.bbox, options.max_image_pixels)
    if record.crop is not None:
        return _Cell(record, image, load_image(record.crop, options.max_image_pixels), bbox, None)
    window = crop_box(bbox, image.size, **crop)
    check_sides(window[2] - window[0], window[3] - window[1])
    return _Cell(record, image, image.crop(window), bbox, window)


def _draw(cells: list[_Cell], crop: dict[str, Any], crop_pixels: tuple[int, int], title: str) -> Image.Image:
    columns = min(2, len(cells))
    rows = math.ceil(len(cells) / columns)
    width = _MARGIN * (columns + 1) + columns * _CELL_WIDTH
    sheet = Image.new("RGB", (width, _TOP + rows * (_HEIGHT + _TEXT_HEIGHT + _MARGIN)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 20), _shorten(title, width // 12), _INK, ImageFont.load_default(22))
    policy = ", ".join(f"{name} {value}" for name, value in crop.items() if value is not None)
    sizes = f"red: box, grey: crop; crops are resized to {crop_pixels[0]:,} to {crop_pixels[1]:,} pixels"
    draw.text((_MARGIN, 52), _shorten(f"crop: {policy}; {sizes}", width // 8), _MUTED, ImageFont.load_default(15))
    for number, cell in enumerate(cells):
        x = _MARGIN + number % columns * (_CELL_WIDTH + _MARGIN)
        y = _TOP + number // columns * (_HEIGHT + _TEXT_HEIGHT + _MARGIN)
        frames: list[Frame] = [] if cell.window is None else [(cell.window, _PAPER, _MUTED)]
        frames_of_crop: list[Frame] = []
        if cell.bbox is not None:
            x1, y1, x2, y2 = check_box(cell.bbox, cell.image.size)
            frames.append(((x1, y1, x2, y2), "#ffffff", _RED))
            if cell.window is not None:
                left, top = cell.window[:2]
                frames_of_crop = [((x1 - left, y1 - top, x2 - left, y2 - top), "#ffffff", _RED)]
        _paste(sheet, cell.image, x, y, _FULL, frames)
        _paste(sheet, cell.crop, x + _FULL + _GAP, y, _CROP, frames_of_crop)
        _draw_text(draw, cell, x, y + _HEIGHT, crop_pixels)
    return sheet


def _paste(sheet: Image.Image, image: Image.Image, left: int, y: int, width: int, frames: Sequence[Frame]) -> None:
    """Fit `image` into `width` x _HEIGHT at (left, y), aligned left and down, and draw `frames` on it."""
    factor = min(width / image.width, _HEIGHT / image.height)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    # small crops are shown in the pixels they have: enlarging smoothly would promise detail
    resample = Image.Resampling.NEAREST if factor > 2 else Image.Resampling.LANCZOS
    top = y + _HEIGHT - size[1]
    sheet.paste(image.resize(size, resample), (left, top))
    draw = ImageDraw.Draw(sheet)
    for box, halo, colour in frames:  # visible on any ground, however small the box
        x1, y1, x2, y2 = (round(value * factor) for value in box)
        x1, y1, x2, y2 = left + x1, top + y1, left + max(x2, x1 + 2), top + max(y2, y1 + 2)
        draw.rectangle((x1 - 3, y1 - 3, x2 + 2, y2 + 2), outline=halo, width=1)
        draw.rectangle((x1 - 2, y1 - 2, x2 + 1, y2 + 1), outline=colour, width=2)


def _draw_text(draw: ImageDraw.ImageDraw, cell: _Cell, x: int, y: int, crop_pixels: tuple[int, int]) -> None:
    record = cell.record
    line = y + 8
    for text in textwrap.wrap(_printable(record.question), 84, max_lines=2, placeholder=" ..."):
        draw.text((x, line), text, _INK, ImageFont.load_default(16))
        line += 21
    answer = f"answer: {' or '.join(record.answers)}" if record.answers else "no answer"
    for text in (answer, _sizes(cell, crop_pixels), record.id):
        draw.text((x, line + 1), _shorten(text, 100), _MUTED, ImageFont.load_default(14))
        line += 19
    draw.line((x, y + _TEXT_HEIGHT, x + _CELL_WIDTH, y + _TEXT_HEIGHT), _LINE)


def _sizes(cell: _Cell, crop_pixels: tuple[int, int]) -> str:
    width, height = cell.crop.size
    area = width * height
    factor = math.sqrt(min(max(area, crop_pixels[0]), crop_pixels[1]) / area)
    kind = "crop" if cell.window is not None else "crop image"
    text = f"image {cell.image.width}x{cell.image.height}; {kind} {width}x{height}"
    text += f", resized {factor:.2g} times" if abs(factor - 1) > 0.005 else ""
    share = cell.record.relative_area()
    return text + (f"; box {100 * share:.2g}% of the image" if share is not None else "; no box")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def _shorten(text: str, width: int) -> str:
    text = _printable(text)
    return text if len(text) <= width else text[: width - 3].rstrip() + "..."
