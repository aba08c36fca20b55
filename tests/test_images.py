import io
import math
import pickle
import random

import numpy as np
import pytest
from PIL import Image, ImageOps

from nemo_vopd.config import CropConfig
from nemo_vopd.images import (
    DROP_REASONS,
    UnusableSample,
    check_box,
    check_image,
    crop_box,
    draw_box,
    load_image,
    load_with_box,
    turn_box,
    turn_box_back,
)


def reason(function, *args, **kwargs):
    with pytest.raises(UnusableSample) as caught:
        function(*args, **kwargs)
    assert caught.value.reason in DROP_REASONS
    return caught.value.reason


def png(width, height, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "bbox",
    [None, "1234", b"1234", [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, "3", 4], [0, 0, True, 1], {"x": 1}]
    + [[0, 0, value, 5] for value in (math.nan, math.inf, -math.inf, 10**400, None)],
)
def test_wrong_types_are_malformed(bbox):
    assert reason(check_box, bbox, (100, 50)) == "malformed_record"


@pytest.mark.parametrize("bbox", [[5, 5, 5, 9], [5, 5, 9, 5], [9, 5, 5, 9], [5, 9, 9, 5], [0, 0, 0, 0]])
def test_no_area_is_empty(bbox):
    assert reason(check_box, bbox, (100, 50)) == "empty_box"


@pytest.mark.parametrize("bbox", [[100, 0, 120, 9], [-9, 0, 0, 9], [0, 50, 9, 60], [0, -9, 9, 0]])
def test_outside_touching_edge_is_outside(bbox):
    assert reason(check_box, bbox, (100, 50)) == "box_outside_image"


def test_partly_outside_is_clipped():
    assert check_box((-5, -5, 200, 20.5), (100, 50)) == (0, 0, 100, 20.5)


def test_quickstart_crop_is_42_pixels_for_every_cell_and_jitter():
    for centre_x in (28, 56, 84):
        for centre_y in (28, 56, 84):
            for jitter in range(-3, 4):
                x, y = centre_x - 7 + jitter, centre_y - 10 + jitter
                left, top, right, bottom = crop_box(
                    [x, y, x + 15, y + 21], (112, 112), scale=2.0, min_side=28, square=True
                )
                assert (right - left, bottom - top) == (42, 42)
                # the glyph is at one place of the crop, whatever the parity of its corner
                assert (x - left, y - top) == (14, 11)


@pytest.mark.parametrize("square", [True, False])
def test_crop_lies_inside_and_holds_the_box(square):
    rng = random.Random(0)
    for _ in range(3000):
        width, height = rng.randint(1, 300), rng.randint(1, 300)
        x1, y1 = rng.uniform(-50, width - 0.01), rng.uniform(-50, height - 0.01)
        bbox = [x1, y1, max(x1, 0) + rng.uniform(0.01, 200), max(y1, 0) + rng.uniform(0.01, 200)]
        scale, min_side = rng.choice([1.0, 1.5, 2.0, 3.7]), rng.choice([1, 28, 56])
        left, top, right, bottom = crop_box(bbox, (width, height), scale=scale, min_side=min_side, square=square)
        assert all(isinstance(v, int) for v in (left, top, right, bottom))
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        bx1, by1, bx2, by2 = check_box(bbox, (width, height))
        assert left <= bx1 and top <= by1 and bx2 <= right and by2 <= bottom
        assert right - left >= min(min_side, width) and bottom - top >= min(min_side, height)
        if square and max(right - left, bottom - top) <= min(width, height):
            assert right - left == bottom - top


def test_crop_scales_with_the_longer_side_and_shifts_at_the_edge():
    assert crop_box([40, 40, 60, 50], (200, 200), scale=2.0, min_side=1, square=True) == (30, 25, 70, 65)
    assert crop_box([40, 40, 60, 50], (200, 200), scale=2.0, min_side=1, square=False) == (30, 35, 70, 55)
    assert crop_box([0, 190, 20, 200], (200, 200), scale=2.0, min_side=1, square=True) == (0, 160, 40, 200)


def test_draw_box_marks_a_copy_inside_the_image():
    image = Image.new("RGB", (20, 10))
    drawn = np.asarray(draw_box(image, [2, 3, 8, 30], width=1))
    assert not np.asarray(image).any()
    red = (drawn == (255, 0, 0)).all(-1)
    assert red[3, 2:8].all() and red[9, 2:8].all() and red[3:, 2].all() and red[3:, 7].all()
    assert red.sum() == 2 * 6 + 2 * 5
    assert reason(draw_box, image, [0, 0, 0, 0]) == "empty_box"


def test_load_image_converts_and_refuses():
    assert load_image(png(5, 4, "L")).mode == "RGB"
    assert load_image(png(4, 5, "RGBA")).size == (4, 5)
    assert reason(load_image, png(30, 40), max_pixels=1199) == "image_too_large"
    assert load_image(png(30, 40), max_pixels=1200).size == (30, 40)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "jpeg")
    assert reason(load_image, buffer.getvalue()[:-700]) == "unreadable_image"
    for data in (b"", b"text", png(30, 40)[:40], png(30, 40)[:-30]):
        assert reason(load_image, data) == "unreadable_image"


def test_size_is_checked_before_decoding():
    header = png(16, 16)[:33].replace((16).to_bytes(4, "big") * 2, (60000).to_bytes(4, "big") * 2)
    # the pixels do not exist: only the header can have been read
    assert reason(load_image, header) in ("image_too_large", "unreadable_image")


def test_unusable_sample_survives_a_process_boundary():
    copy = pickle.loads(pickle.dumps(UnusableSample("empty_box", "why")))
    assert (copy.reason, copy.detail) == ("empty_box", "why")


def stored(image, name="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def test_grey_of_more_than_eight_bits_keeps_its_shades():
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    shades = np.linspace(0, 252, 64).reshape(8, 8)
    unit = (shades / 252).astype(np.float32)
    cases = {
        "16 bits": (ramp, 65535), "16 bits in 32": (ramp.astype(np.int32), 65535), "12 bits": (ramp // 16, 4095),
        "10 bits": (ramp // 64, 1023), "8 bits": (ramp // 256, 255), "fractions": (unit, 1),
        "shares of 255": (unit * 255, 255), "with negative numbers": (unit * 8 - 4, 8),
        "more than 16 bits": (ramp.astype(np.int32) * 1000, 65024000 - 512000),
    }  # fmt: skip
    for name, (pixels, white) in cases.items():
        for kind in ("tiff", "png") if pixels.dtype == np.uint16 else ("tiff",):
            shown = np.asarray(load_image(stored(Image.fromarray(pixels), kind))).astype(float)
            expected = (pixels - min(0, float(pixels.min()))) * (255 / white)
            assert np.abs(shown - expected[..., None]).max() <= 1.01, (name, kind)
    hole = unit.copy()
    hole[3, 3] = np.nan
    assert reason(load_image, stored(Image.fromarray(hole), "tiff")) == "unreadable_image"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "gif"])
def test_what_is_transparent_shows_white(mode):
    """Black text on nothing: with the transparency dropped, all of it would be black."""
    picture = Image.new("RGBA", (12, 8), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (2, 2, 6, 6))
    if mode in ("RGB", "L"):  # one colour stands for nothing
        picture = Image.new(mode, (12, 8), 7 if mode == "L" else (7, 7, 7))
        picture.paste(0, (2, 2, 6, 6))
        data = stored(picture, transparency=7 if mode == "L" else (7, 7, 7))
    elif mode in ("P", "gif"):
        data = stored(picture, "gif") if mode == "gif" else stored(picture.quantize(4))
    else:
        data = stored(picture.convert(mode))
    expected = np.full((8, 12, 3), 255)
    expected[2:6, 2:6] = 0
    assert np.array_equal(np.asarray(load_image(data)), expected)
    half = stored(Image.new("RGBA", (8, 8), (200, 0, 0, 51)))
    assert load_image(half).getpixel((3, 3)) == (244, 204, 204)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_and_boxes_are_shown_upright(kind, orientation):
    """As Pillow turns them; the box stays around the same pixels, and comes back."""
    box, image = (8, 16, 24, 56), Image.new("RGB", (96, 64), (10, 200, 30))
    image.paste((250, 0, 250), box)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "webp" else {"quality": 95} if kind == "jpeg" else {}
    data = stored(image, kind, exif=exif, **options)
    shown, turned = load_with_box(data, list(box))
    with Image.open(io.BytesIO(data)) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    assert np.array_equal(np.asarray(shown), np.asarray(expected))
    facts = check_image(data)
    assert facts.upright_size == shown.size == load_image(data).size and not facts.flat
    if kind == "tiff":  # which Pillow turns itself: its pixels are never seen as they are stored
        assert facts.orientation == 1
        return
    assert facts.orientation == orientation and facts.size == (96, 64)
    pixels = np.asarray(shown.crop(turned)).astype(int)
    assert (np.abs(pixels - [250, 0, 250]).mean() < 12) and pixels.shape[0] * pixels.shape[1] == 16 * 40
    assert turn_box_back(turned, orientation, (96, 64)) == list(box)
    for wrong in ([5, 5, 2, 9], "abcd", [1, 2, 3], [float("nan")] * 4, None):
        assert turn_box(wrong, orientation, (96, 64)) is wrong


def test_exif_that_is_none_leaves_the_image_as_it_is():
    image = Image.new("RGB", (9, 7))
    for exif in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\xff", b""):
        assert load_image(stored(image, "jpeg", exif=exif)).size == (9, 7)
    assert check_image(stored(image)).flat and not check_image(stored(Image.effect_noise((9, 7), 50))).flat


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 3), (3, 3)])
def test_images_that_can_show_nothing_are_too_small(size):
    assert reason(load_image, png(*size)) == "image_too_small"
    assert load_image(png(max(size[0], 4), max(size[1], 4))).mode == "RGB"


def test_only_picture_formats_are_tried(monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("a program was run"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert reason(load_image, eps) == "unreadable_image"


def test_details_quote_data_safely():
    for detail in ("\x1b[31mred\n" * 9, "x" * 10**6, "\ud800"):
        shown = UnusableSample("malformed_record", detail).detail
        assert shown.isprintable() and len(shown) <= 300


def window(bbox, size, **options):
    left, top, right, bottom = crop_box(bbox, size, **{"scale": 1.0, "min_side": 1, "square": False, **options})
    assert 0 <= left <= bbox[0] and bbox[2] <= right <= size[0] and 0 <= top <= bbox[1] and bbox[3] <= bottom <= size[1]
    return right - left, bottom - top


def test_margin_is_in_pixels_after_the_scale():
    assert window([400, 400, 420, 410], (1000, 1000), scale=2.0, margin=15) == (70, 50)
    assert window([400, 400, 420, 410], (1000, 1000), scale=2.0, margin=15, square=True) == (70, 70)
    assert window([400, 0, 420, 10], (1000, 30), scale=2.0, margin=15) == (70, 30)


def test_upscaling_is_bounded_as_far_as_the_image_allows():
    for limit in (1.0, 1.5, 3.0):
        for square in (True, False):
            width, height = window(
                [400, 400, 420, 410], (1000, 1000), max_upscale=limit, min_pixels=40_000, square=square
            )
            assert (40_000 / limit**2) <= width * height < (40_000 / limit**2) * 1.2
            assert square == (width == height)
    assert window([400, 400, 420, 410], (1000, 1000), max_upscale=20, min_pixels=40_000) == (20, 10)
    # where the image ends on one axis, the window grows along the other
    assert window([400, 5, 420, 15], (1000, 20), max_upscale=2.0, min_pixels=40_000) == (500, 20)
    assert window([5, 5, 15, 15], (20, 20), max_upscale=2.0, min_pixels=40_000) == (20, 20)


def test_aspect_is_bounded_as_far_as_the_image_allows():
    assert window([100, 100, 500, 110], (1000, 1000), max_aspect=4.0) == (400, 100)
    assert window([100, 100, 110, 500], (1000, 1000), max_aspect=4.0) == (100, 400)
    assert window([100, 100, 500, 110], (1000, 1000), max_aspect=4.0, square=True) == (400, 400)
    assert window([0, 10, 900, 20], (1000, 50), max_aspect=4.0) == (900, 50)
    assert window([0, 10, 1000, 20], (1000, 400), scale=3.0, max_aspect=4.0) == (1000, 250)


def test_defaults_of_the_policy_change_nothing():
    rng = random.Random(1)
    for _ in range(500):
        size = (rng.randint(50, 300), rng.randint(50, 300))
        x, y = rng.uniform(0, 40), rng.uniform(0, 40)
        bbox = [x, y, x + rng.uniform(1, 60), y + rng.uniform(1, 60)]
        options = {"scale": 2.0, "min_side": 28, "square": rng.random() < 0.5}
        policy = vars(CropConfig(**options))
        assert crop_box(bbox, size, **policy, min_pixels=3136) == crop_box(bbox, size, **options)


def test_checking_an_image_is_loading_it_without_the_pixels():
    for mode in ("RGB", "L", "RGBA", "P"):
        assert check_image(png(9, 7, mode)).size == load_image(png(9, 7, mode)).size == (9, 7)
    for data in (b"", png(30, 40)[:40], png(30, 40)[:-30]):
        assert reason(check_image, data) == "unreadable_image"
    assert reason(check_image, png(30, 40), max_pixels=1199) == "image_too_large"
    assert reason(check_image, png(30, 3)) == "image_too_small"
