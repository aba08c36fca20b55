"""Image files to upright RGB pixels: the one way by which every image is read, in preparation and in a run.

Pillow decodes. What it would show wrongly without a word is put right here, or refused.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from nemo_vopd.images import UnusableSample, check_sides, turn_box, upright_size

MAX_IMAGE_PIXELS = 100_000_000
"""Decoded images beyond this (300 MB as RGB) are dropped: one such file can kill a data worker."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What `load_image` reads (AVIF: where Pillow has it). Pillow knows more, and hands EPS to Ghostscript to execute."""
_LARGEST_VALUES = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))
"""Largest values of grey images with that many bits: cameras and scanners store 10 to 14 of them in 16."""
_DARK = 32
_MARK = 77
"""What the pixels of a PNG are before they are decoded: any value but the zero that Pillow leaves."""
_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of each EXIF orientation upright."""
_TURNS_BACK = {**_TURNS, 6: _TURNS[8], 8: _TURNS[6]}


class ImageFacts(NamedTuple):
    """What preparation asks of an image."""

    size: tuple[int, int]
    """Width and height as it is stored."""
    orientation: int
    """EXIF orientation, 1 to 8; 1 is upright."""
    flat: bool
    """Whether all pixels have one colour."""
    dark: bool
    """Whether no colour of any pixel reaches 32 of 255, as when 12 bits are stored in 16."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height as it is shown."""
        return upright_size(self.size, self.orientation)


def load_image(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode `data`, a file in one of IMAGE_FORMATS, to an upright RGB image; of an animation, its first frame.

    The EXIF orientation is applied, transparent pixels are laid on white, and grey of more than 8 bits is scaled by
    the bits in use. Raises UnusableSample: image_too_large (more than `max_pixels`) and image_too_small, known from
    the header before anything is decoded, or unreadable_image.
    """
    return load_with_box(data, None, max_pixels)[0]


def load_with_box(data: bytes, bbox: object, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[Image.Image, object]:
    """The image of `load_image`, and `bbox`, which refers to the stored pixels, in its pixels."""
    stored, orientation = _decode(data, max_pixels)
    shown = stored.transpose(_TURNS[orientation]) if orientation in _TURNS else stored.copy()
    return shown, turn_box(bbox, orientation, stored.size) if bbox is not None else None


def check_image(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> ImageFacts:
    """Facts about an image that `load_image` takes; it is decoded in full. Raises UnusableSample alike."""
    stored, orientation = _decode(data, max_pixels)
    extrema: Any = stored.getextrema()
    flat = all(low == high for low, high in extrema)
    return ImageFacts(stored.size, orientation, flat, not flat and max(high for _, high in extrema) < _DARK)


def _decode(data: bytes, max_pixels: int) -> tuple[Image.Image, int]:
    """(RGB pixels as they are stored, EXIF orientation). Raises UnusableSample as `load_image` does."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UnusableSample("image_too_large", f"{width}x{height} has more than {max_pixels} pixels")
            check_sides(width, height)
            return _LOADERS.get(str(image.format), _load)(image, data)
    except UnusableSample:
        raise
    except Image.DecompressionBombError as error:
        raise UnusableSample("image_too_large", str(error)) from None
    except (UnidentifiedImageError, KeyError):  # KeyError: none of the others, and this Pillow has no AVIF
        detail = f"not one of {', '.join(IMAGE_FORMATS)}, or of a kind that Pillow does not read"
        raise UnusableSample("unreadable_image", detail) from None
    except Exception as error:  # Pillow's decoders raise almost anything for damaged files
        raise UnusableSample("unreadable_image", f"{type(error).__name__}: {error}") from None


def _load(image: Any, data: bytes) -> tuple[Image.Image, int]:
    image.load()
    return _as_rgb(image), _orientation(image)


def _load_png(image: Any, data: bytes) -> tuple[Image.Image, int]:
    """Raises UnusableSample where Pillow would leave rows black because they are missing in an intact stream."""
    depth = {"L;2": 2, "L;4": 4, "RGB;16B": 16}.get(image.tile[0].args, 8)
    if "transparency" in image.info and depth != 8:  # Pillow compares the stored value with the pixels in 8 bits
        if depth == 16:
            raise UnusableSample("unreadable_image", "a PNG with 16 bits a colour, one of which stands for transparent")
        image.info["transparency"] = image.info["transparency"] % 2**depth * 255 // (2**depth - 1)
    (width, height), covered = image.size, image.tile[0].extents
    # of an interlaced image the last pass holds the odd rows, from left to right
    last = height - 1 - (height % 2 if image.info.get("interlace") else 0)
    image.im = Image.new(image.mode, image.size, _MARK).im
    image.load()
    row = (0, last, width, last + 1)
    if image.crop(row).tobytes() == Image.new(image.mode, (width, 1), _MARK).tobytes():
        with Image.open(io.BytesIO(data), formats=("PNG",)) as again:  # without the mark
            if again.crop(row).tobytes() != image.crop(row).tobytes():
                raise UnusableSample("unreadable_image", "the last rows of the PNG are missing")
    return _as_rgb(image, covered), _orientation(image)


def _load_jpeg(image: Any, data: bytes) -> tuple[Image.Image, int]:
    """Raises UnusableSample where a mark of the end hides that the data of a sequential JPEG end too early."""
    image.load()
    corner = image.getpixel((image.width - 1, image.height - 1))
    if set(np.atleast_1d(corner).tolist()) <= {127, 128}:  # the grey that libjpeg shows for what is missing
        # what follows a whole image is not read, so more data before the mark change the pixels of a cut one alone
        end = data.rfind(b"\xff\xd9")
        longer = data[:end] + bytes(range(1, 100)) + data[end:]
        with Image.open(io.BytesIO(longer), formats=("JPEG",)) as other:
            if other.tobytes() != image.tobytes():
                raise UnusableSample("unreadable_image", "the last rows of the JPEG are missing")
    return _as_rgb(image), _orientation(image)


def _load_webp(image: Any, data: bytes) -> tuple[Image.Image, int]:
    if data[12:16] == b"VP8X" and data[20] & 2:  # an animation
        # its first frame may leave part of the canvas transparent, whatever the header says about transparency
        image.rawmode = image._mode = "RGBA"
    return _load(image, data)


def _load_gif(image: Any, data: bytes) -> tuple[Image.Image, int]:
    covered = image.tile[0].extents
    image.load()
    return _as_rgb(image, covered), _orientation(image)


def _load_tiff(image: Any, data: bytes) -> tuple[Image.Image, int]:
    """Raises UnusableSample for the kinds whose numbers Pillow misreads."""
    orientation = _orientation(image)  # which Pillow applies and forgets on loading
    image.load()
    tags, is_raw = image.tag_v2, image.info["compression"] == "raw"
    bits, is_unsigned = tags.get(258, (1,))[0], tags.get(339, (1,))[0] == 1
    misread = {
        "white stored as 0 in more than 8 bits": tags.get(262) == 0 and bits > 8,
        "signed numbers of 8 bits": bits == 8 and not is_unsigned,
        "unsigned numbers above 2^31": image.mode == "I" and is_unsigned and image.getextrema()[0] < 0,
        "colours of 16 bits in separate planes": tags.get(284) == 2 and bits == 16 and is_raw,
        "compressed big-endian numbers": tags.prefix == b"MM" and image.mode in ("I", "F") and not is_raw,
    }
    for kind, found in misread.items():
        if found:
            raise UnusableSample("unreadable_image", f"a TIFF with {kind}, which Pillow reads wrongly")
    stored = image.transpose(_TURNS_BACK[orientation]) if orientation in _TURNS else image
    return _as_rgb(stored), orientation


_LOADERS: dict[str, Callable[[Any, bytes], tuple[Image.Image, int]]] = {
    "PNG": _load_png,
    "JPEG": _load_jpeg,
    "WEBP": _load_webp,
    "GIF": _load_gif,
    "TIFF": _load_tiff,
}
"""What decodes an opened image, where it takes more than `_load`."""


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image; 1 where there is none, or none that can be read."""
    with contextlib.suppress(Exception):  # what EXIF parts hold is not always EXIF
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
        return value if value in _TURNS else 1
    return 1


def _as_rgb(image: Image.Image, covered: tuple[int, int, int, int] | None = None) -> Image.Image:
    """The loaded `image` as RGB, itself where it is that already; white outside of what its data have `covered`."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _as_grey(image).convert("RGB")
    if image.mode in ("P", "PA") and image.palette is None:
        raise UnusableSample("unreadable_image", "an image of palette colours without its palette")
    if image.has_transparency_data:
        # what is transparent shows white paper, as in Qwen's own utilities: black text on nothing stays readable
        white = Image.new("RGBA", image.size, "white")
        image = image.convert("LA") if image.mode == "La" else image
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if covered not in (None, (0, 0, *image.size)):
        white = Image.new("RGB", image.size, "white")
        white.paste(rgb.crop(covered), covered)
        return white
    return rgb


def _as_grey(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or floats in 8 bits; Pillow's own conversion makes everything above 255 white.

    Black to white is 0 to the largest number of as many bits as are in use; of floats, 0 to 1 or to such a number where
    the largest value fills more than half of that, else to the largest value; with negative numbers, the least to the
    largest one. Raises UnusableSample (unreadable_image) for what is not finite.
    """
    values = np.asarray(image if image.mode == "F" else image.convert("I"), dtype=np.float32)
    clear = values == image.info.get("transparency")  # the one value of a PNG that stands for transparent
    values = np.where(clear, 0, values)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UnusableSample("unreadable_image", f"pixels of mode {image.mode} are not finite")
    if low >= 0:
        is_float = image.mode == "F"
        end = next((end for end in (1,) * is_float + _LARGEST_VALUES if high <= end), high)
        low, high = 0, high if is_float and 2 * high <= end else end
    grey = np.rint((values - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)
    return Image.fromarray(np.where(clear, np.uint8(255), grey))
