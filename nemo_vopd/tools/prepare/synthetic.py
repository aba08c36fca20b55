"""Coloured digits on a grid: a visual question whose evidence is small, with its box, made in seconds.

Three digits of three colours stand in three of nine cells of a grey 112x112 image; the question names a colour.
The full image is 16 image tokens, the teacher's crop of 42x42 pixels, enlarged to 56x56, is 4: the same digit
covers more of what the model sees, which opens the gap between the two views.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from nemo_vopd.images import crop_box
from nemo_vopd.tools.prepare.folders import whole_directory

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (40, 70, 220),
    "yellow": (235, 215, 40),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
}
IMAGE_SIDE = 112
CLOSE_UP_SIDE = 56
_GREY = 118
_CELL, _BORDER, _JITTER, _SCALE = 28, 14, 3, 3
_BLOCK = 1024
"""Samples rendered together; each block has its own random stream, so a longer set starts like a shorter one."""

_FONT = """
.###. ..#.. .###. ##### ...#. ##### ..##. ##### .###. .###.
#...# .##.. #...# ...#. ..##. #.... .#... ....# #...# #...#
#..## ..#.. ....# ..#.. .#.#. ####. #.... ...#. #...# #...#
#.#.# ..#.. ...#. ...#. #..#. ....# ####. ..#.. .###. .####
##..# ..#.. ..#.. ....# ##### ....# #...# .#... #...# ....#
#...# ..#.. .#... #...# ...#. #...# #...# .#... #...# ...#.
.###. .###. ##### .###. ...#. .###. .###. .#... .###. .##..
"""


def _glyphs() -> np.ndarray:
    """[10, 21, 15] bool: the digits, 5x7 bitmaps enlarged by three."""
    rows = [line.split() for line in _FONT.split("\n") if line]
    small = np.array([[[c == "#" for c in row[digit]] for row in rows] for digit in range(10)])
    return small.repeat(_SCALE, axis=1).repeat(_SCALE, axis=2)


def render_digits(num_samples: int, rng: np.random.Generator) -> tuple[np.ndarray, list[dict]]:
    """`num_samples` images [n, 112, 112, 3] uint8 and their records (question, answer, bbox, without id)."""
    glyphs = _glyphs()
    height, width = glyphs.shape[1:]
    images = np.full((num_samples, IMAGE_SIDE, IMAGE_SIDE, 3), _GREY, dtype=np.uint8)
    names, values = list(COLOURS), np.array(list(COLOURS.values()), dtype=np.uint8)
    cells = rng.permuted(np.tile(np.arange(9), (num_samples, 1)), axis=1)[:, :3]
    colours = rng.permuted(np.tile(np.arange(len(names)), (num_samples, 1)), axis=1)[:, :3]
    digits = rng.integers(10, size=(num_samples, 3))
    jitter = rng.integers(-_JITTER, _JITTER + 1, size=(num_samples, 3, 2))
    # cell centres (28, 56, 84) lie on corners of merged 28x28 patches, and so does the centre of the crop
    centres = _BORDER + _CELL // 2 + _CELL * np.stack([cells % 3, cells // 3], axis=-1)
    corners = centres + jitter - np.array([width // 2, height // 2])
    records = []
    for i in range(num_samples):
        for cell in range(3):
            x, y = corners[i, cell]
            images[i, y : y + height, x : x + width][glyphs[digits[i, cell]]] = values[colours[i, cell]]
        # cell, colour and digit are drawn independently, so asking for the first glyph loses nothing
        x, y, colour = int(corners[i, 0, 0]), int(corners[i, 0, 1]), names[colours[i, 0]]
        records.append(
            {
                "question": f"what digit is {colour}?",
                "answer": f"it is a {colour} {digits[i, 0]} .",
                "bbox": [x, y, x + width, y + height],
            }
        )
    return images, records


def close_up(image: Image.Image, bbox: list[int], side: int) -> tuple[Image.Image, list[float]]:
    """The `side` x `side` pixel region around `bbox`, resized to 56x56, and the box in it."""
    x1, y1, x2, y2 = crop_box(bbox, image.size, scale=1.0, min_side=side, square=True)
    factor = CLOSE_UP_SIDE / (x2 - x1)
    region = image.crop((x1, y1, x2, y2)).resize((CLOSE_UP_SIDE, CLOSE_UP_SIDE), Image.Resampling.BILINEAR)
    return region, [round((value - offset) * factor, 3) for value, offset in zip(bbox, (x1, y1, x1, y1), strict=True)]


def write_digits(output: Path, *, num_samples: int, seed: int, close_up_fraction: float = 0.0) -> None:
    """Write `output`/images/*.png and `output`/data.jsonl (id, image, question, answer, bbox).

    `close_up_fraction` of the samples show a close-up of the evidence as their full image. The same arguments give
    the same files; other seeds give independent streams. Raises OptionError when `output` exists.
    """
    with whole_directory(output) as temporary:
        (temporary / "images").mkdir()
        with open(temporary / "data.jsonl", "w") as lines:
            for start in range(0, num_samples, _BLOCK):
                rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(start // _BLOCK,)))
                images, records = render_digits(_BLOCK, rng)
                is_close_up = rng.random(_BLOCK) < close_up_fraction
                sides = rng.integers(42, 47, size=_BLOCK)
                for i in range(min(_BLOCK, num_samples - start)):
                    image, record = Image.fromarray(images[i]), records[i]
                    if is_close_up[i]:
                        image, record["bbox"] = close_up(image, record["bbox"], int(sides[i]))
                    name = f"digits-{seed}-{start + i:06d}"
                    image.save(temporary / "images" / f"{name}.png", compress_level=1)
                    lines.write(json.dumps({"id": name, "image": f"images/{name}.png", **record}) + "\n")
