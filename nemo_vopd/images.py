"""Image geometry of the views: boxes and evidence-centred crops. Pure functions of their arguments.

Boxes are (x1, y1, x2, y2) in pixels, x to the right, y down, the far edge exclusive. Images are shown upright, as
cameras mean them (EXIF); boxes in data sets refer to the stored pixels and are turned with their image.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence

from PIL import Image, ImageDraw

DROP_REASONS = (
    "malformed_record",
    "duplicate_id",
    "empty_question",
    "missing_image",
    "missing_crop",
    "missing_box",
    "path_outside_folder",
    "unreadable_image",
    "image_too_large",
    "image_too_small",
    "extreme_aspect",
    "several_images",
    "empty_box",
    "box_outside_image",
    "overlong_prompt",
)
"""Every word `UnusableSample.reason` and `DroppedSample.reason` can be."""

MIN_IMAGE_SIDE = 4
"""Images and crops with a shorter side are dropped: enlarged to the model's patches they show one flat colour."""
MAX_ASPECT = 200
"""More elongated images and crops are dropped: Qwen's image processor refuses them."""
_MAX_DETAIL = 300

Box = tuple[float, float, float, float]


class UnusableSample(Exception):
    """A record cannot be used. It is dropped and counted under `reason`; the run goes on."""

    def __init__(self, reason: str, detail: str = "") -> None:
        """`reason` is one of DROP_REASONS; `detail` says more, for a person, and may quote the data."""
        assert reason in DROP_REASONS, reason
        # quoted data goes to terminals and logs: neither megabytes nor control sequences may
        detail = "".join(c if c.isprintable() else "?" for c in detail[:_MAX_DETAIL])
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self):
        """Keep both parts when the exception crosses a process boundary."""
        return UnusableSample, (self.reason, self.detail)


def check_box(bbox: object, image_size: tuple[int, int]) -> Box:
    """`bbox` clipped to an image of `image_size` (width, height) pixels.

    Raises UnusableSample: malformed_record (not four finite numbers), empty_box (no area), box_outside_image (no
    part of the box lies in the image).
    """
    if not isinstance(bbox, Sequence) or isinstance(bbox, str | bytes) or len(bbox) != 4:
        raise UnusableSample("malformed_record", f"bbox must be [x1, y1, x2, y2], got {reprlib.repr(bbox)}")
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and _finite(v) for v in bbox):
        raise UnusableSample("malformed_record", f"bbox must hold four finite numbers, got {reprlib.repr(bbox)}")
    x1, y1, x2, y2 = bbox
    if x2 <= x1 or y2 <= y1:
        raise UnusableSample("empty_box", f"{list(bbox)} has no area")
    width, height = image_size
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if x2 <= x1 or y2 <= y1:
        raise UnusableSample("box_outside_image", f"{list(bbox)} in an image of {width}x{height}")
    return x1, y1, x2, y2


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def crop_box(
    bbox: object,
    image_size: tuple[int, int],
    *,
    scale: float,
    min_side: int,
    square: bool,
    margin: int = 0,
    max_upscale: float | None = None,
    max_aspect: float | None = None,
    min_pixels: int = 0,
) -> tuple[int, int, int, int]:
    """The evidence-centred crop (x1, y1, x2, y2), whole pixels, inside the image and around the whole box.

    `square`: the side is `scale` times the longer side of the box; else each side is `scale` times that of the
    box. `margin` pixels are added at each edge, and the sides are at least `min_side`. `max_upscale`: the crop
    grows until scaling it to `min_pixels` pixels lengthens its sides by at most this factor; `max_aspect`
    (not with `square`): its shorter side grows until longer / shorter is at most this. Both as far as the image
    allows: sides are at most those of the image, and a crop that would leave it is shifted inside.

    Raises UnusableSample as `check_box` does.
    """
    x1, y1, x2, y2 = check_box(bbox, image_size)
    # at least the whole pixels the box touches: with fractional boxes that can be one more than its side
    width = max(round(scale * (x2 - x1)) + 2 * margin, math.ceil(x2) - math.floor(x1), min_side)
    height = max(round(scale * (y2 - y1)) + 2 * margin, math.ceil(y2) - math.floor(y1), min_side)
    if square:
        width = height = max(width, height)
    if max_upscale is not None:
        width, height = _grow(width, height, min_pixels / max_upscale**2, image_size)
    if max_aspect is not None and not square:
        width, height = min(width, image_size[0]), min(height, image_size[1])
        width, height = max(width, math.ceil(height / max_aspect)), max(height, math.ceil(width / max_aspect))
    left, right = _place(x1, x2, width, image_size[0])
    top, bottom = _place(y1, y2, height, image_size[1])
    return left, top, right, bottom


def _grow(width: int, height: int, area: float, limit: tuple[int, int]) -> tuple[int, int]:
    """Both sides longer by one factor until they enclose `area` pixels; where the image ends, one side alone."""
    if width * height >= area:
        return width, height
    factor = math.sqrt(area / (width * height))
    width, height = math.ceil(width * factor), math.ceil(height * factor)
    if width > limit[0]:
        height = max(height, math.ceil(area / limit[0]))
    elif height > limit[1]:
        width = max(width, math.ceil(area / limit[1]))
    return width, height


def _place(low: float, high: float, side: int, limit: int) -> tuple[int, int]:
    """One axis: `side` pixels centred on [low, high), holding it, shifted into [0, limit)."""
    side = min(side, limit)
    # floor, not round: round-half-even would let the crop jump by a pixel with the parity of the box
    start = math.floor((low + high - side) / 2)
    start = min(max(start, math.ceil(high) - side), math.floor(low))
    start = min(max(start, 0), limit - side)
    return start, start + side


def draw_box(image: Image.Image, bbox: object, width: int | None = None) -> Image.Image:
    """A copy of the RGB `image` with `bbox` outlined in red, `width` pixels thick (default: by image size).

    Raises UnusableSample as `check_box` does.
    """
    x1, y1, x2, y2 = check_box(bbox, image.size)
    copy = image.copy()
    outline = (math.floor(x1), math.floor(y1), math.ceil(x2) - 1, math.ceil(y2) - 1)
    thickness = max(1, round(min(image.size) / 200)) if width is None else width
    ImageDraw.Draw(copy).rectangle(outline, outline=(255, 0, 0), width=thickness)
    return copy


def check_sides(width: int, height: int) -> None:
    """Raise UnusableSample (extreme_aspect, image_too_small) if an image or crop of this size cannot be shown."""
    if min(width, height) < MIN_IMAGE_SIDE:
        raise UnusableSample("image_too_small", f"{width}x{height}, sides must be at least {MIN_IMAGE_SIDE} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnusableSample("extreme_aspect", f"{width}x{height}, longer side over shorter side above {MAX_ASPECT}")


def upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Width and height that an image stored as `size` has when it is shown as its EXIF `orientation` says."""
    width, height = size
    return (height, width) if orientation >= 5 else (width, height)


def turn_box(bbox: object, orientation: int, size: tuple[int, int]) -> object:
    """The box that `bbox`, in pixels of an image stored as `size`, has in the upright image.

    What is no box stays as it is, for `check_box` to refuse.
    """
    try:
        check_box(bbox, size)
    except UnusableSample as unusable:
        if unusable.reason != "box_outside_image":
            return bbox
    (x1, y1, x2, y2), (width, height) = bbox, size  # type: ignore[misc]
    if orientation in (2, 3, 7, 8):
        x1, x2 = width - x2, width - x1
    if orientation in (3, 4, 6, 7):
        y1, y2 = height - y2, height - y1
    return [y1, x1, y2, x2] if orientation >= 5 else [x1, y1, x2, y2]


def turn_box_back(bbox: object, orientation: int, size: tuple[int, int]) -> object:
    """The inverse of `turn_box`: from the upright image to one stored as `size`."""
    back = {6: 8, 8: 6}.get(orientation, orientation)
    return turn_box(bbox, back, upright_size(size, orientation))
