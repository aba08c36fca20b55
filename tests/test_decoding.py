"""Every image file is shown as its authors see it, or refused by name."""

import io
import struct
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image, ImageOps

from nemo_vopd.decoding import check_image, load_image, load_with_box
from nemo_vopd.images import UnusableSample, turn_box, turn_box_back
from tests.test_images import reason


def png(width, height, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "png")
    return buffer.getvalue()


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


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "tiff, packed"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_and_boxes_are_shown_upright(kind, orientation):
    """As Pillow turns them; the box stays around the same pixels, and comes back."""
    box, image = (8, 16, 24, 56), Image.new("RGB", (96, 64), (10, 200, 30))
    image.paste((250, 0, 250), box)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"webp": {"lossless": True}, "jpeg": {"quality": 95}, "tiff, packed": {"compression": "tiff_lzw"}}
    data = stored(image, kind.split(",")[0], exif=exif, **options.get(kind, {}))
    shown, turned = load_with_box(data, list(box))
    with Image.open(io.BytesIO(data)) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    assert np.array_equal(np.asarray(shown), np.asarray(expected))
    facts = check_image(data)
    assert facts.upright_size == shown.size == load_image(data).size and not facts.flat
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
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) // 2
    assert check_image(stored(Image.fromarray(grey))).dark and not check_image(stored(Image.fromarray(grey + 1))).dark
    assert not check_image(stored(image)).dark


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 3), (3, 3)])
def test_images_that_can_show_nothing_are_too_small(size):
    assert reason(load_image, png(*size)) == "image_too_small"
    assert load_image(png(max(size[0], 4), max(size[1], 4))).mode == "RGB"


def test_only_picture_formats_are_tried(monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("a program was run"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert reason(load_image, eps) == "unreadable_image"


def test_checking_an_image_is_loading_it_without_the_pixels():
    for mode in ("RGB", "L", "RGBA", "P"):
        assert check_image(png(9, 7, mode)).size == load_image(png(9, 7, mode)).size == (9, 7)
    for data in (b"", png(30, 40)[:40], png(30, 40)[:-30]):
        assert reason(check_image, data) == "unreadable_image"
    assert reason(check_image, png(30, 40), max_pixels=1199) == "image_too_large"
    assert reason(check_image, png(30, 3)) == "image_too_small"


def shown(data):
    """[height, width, 3] int; what checking tells agrees."""
    image = load_image(data)
    assert check_image(data).upright_size == image.size
    return np.asarray(image).astype(int)


def refused(data, words):
    for function in (load_image, check_image):
        with pytest.raises(UnusableSample, match=words) as caught:
            function(data)
        assert caught.value.reason == "unreadable_image"


RAMP = np.tile(np.linspace(0, 1, 8), (8, 1))


@pytest.mark.parametrize(
    ("largest", "white"),
    [
        (1, 1),
        (0.6, 1),
        (0.001, 0.001),
        (1.0000002, 1.0000002),
        (1.02, 1.02),
        (2, 2),
        (100, 100),
        (200, 255),
        (300, 300),
    ],
)
def test_floats_are_scaled_by_what_they_fill(largest, white):
    """A maximum just above 1 is no reason to take them for shares of 255."""
    pixels = shown(stored(Image.fromarray((RAMP * largest).astype(np.float32)), "tiff"))
    assert np.abs(pixels[..., 0] - RAMP * 255 * largest / white).max() <= 1


def tiff(values, order="<", packed=False, **changed):
    """A TIFF of `values` [height, width(, colours)], without most of what Pillow's own writer says; tags by number."""
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    data = zlib.compress(data) if packed else data
    bits, colours = 8 * values.dtype.itemsize, values.shape[2] if values.ndim == 3 else 1
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = {256: values.shape[1], 257: values.shape[0], 258: bits, 259: 8 if packed else 1}
    tags |= {262: 2 if colours == 3 else 1, 273: 0, 277: colours, 278: values.shape[0], 279: len(data), 339: kind}
    tags |= {int(name[1:]): value for name, value in changed.items()}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return header + entries + bytes(4) + data


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["u1", "u2", "u4", "i1", "i2", "i4", "f4"])
def test_numbers_of_tiffs_are_read_right_or_refused(kind, packed, order):
    """Pillow misreads several kinds without a word: unsigned ones as signed, big-endian ones as little-endian."""
    dtype = np.dtype(kind)
    largest = 1 if dtype.kind == "f" else np.iinfo(dtype).max
    pixels = (RAMP[:, ::-1] * largest).astype(dtype)
    data = tiff(pixels, order, packed)
    if kind == "i1" or (kind == "u4" and order == "<"):
        refused(data, "signed numbers")
    elif kind == "u4":
        refused(data, "of a kind that Pillow does not read")
    elif packed and order == ">" and dtype.kind != "u":
        refused(data, "compressed big-endian numbers")
    else:
        white = 65535 if kind == "i2" else largest  # 15 bits are in use, which no camera has
        assert np.abs(shown(data)[..., 0] - RAMP[:, ::-1] * 255 * largest / white).max() <= 1
    if kind == "u4" and order == "<":
        assert np.abs(shown(tiff(pixels // 65537, order, packed))[..., 0] - RAMP[:, ::-1] * 255).max() <= 1


def test_tiffs_that_pillow_would_show_in_other_colours():
    for pixels in (RAMP.astype(np.float32), (RAMP * 65535).astype(np.uint16)):
        refused(tiff(pixels, t262=0), "white stored as 0")
    negative = shown(tiff((RAMP * 255).astype(np.uint8), t262=0))  # 8 bits are turned round by Pillow
    assert np.abs(negative[..., 0] - (1 - RAMP) * 255).max() <= 1
    colours = (np.stack([RAMP, 1 - RAMP, RAMP * 0], -1) * 65535).astype(np.uint16)
    refused(tiff(colours, t284=2), "separate planes")
    assert np.abs(shown(tiff(colours)) - colours // 257).max() <= 1
    grey_and_alpha = np.zeros((8, 8, 2), np.uint8)
    grey_and_alpha[2:, 2:, 1] = 255
    pixels = shown(tiff(grey_and_alpha, t262=1, t338=1))  # premultiplied: black in the middle of nothing
    assert (pixels[2:, 2:] == 0).all() and (pixels[:2] == 255).all() and (pixels[:, :2] == 255).all()


ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_file(rows, width, depth, kind, extra=b"", interlaced=False, height=None, missing=0):
    """A PNG of `rows` (bytes, or arrays of pixels where `interlaced`), the last of which are left out of the stream."""
    lines = [bytes(row) for row in rows]
    if interlaced:
        parts = [rows[y, x::dx] for x, top, dx, dy in ADAM7 for y in range(top, len(rows), dy)]
        lines = [(np.packbits(part) if depth == 1 else part).tobytes() for part in parts]
    stream = b"".join(b"\0" + line for line in (lines[:-missing] if missing else lines))
    header = struct.pack(">IIBBBBB", width, height or len(rows), depth, kind, 0, 0, interlaced)
    parts = (chunk(b"IHDR", header), extra, chunk(b"IDAT", zlib.compress(stream)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("depth", "row", "clear", "other"),
    [
        (1, b"\xf0", 1, 0),
        (2, b"\x55\x00", 1, 0),
        (4, b"\x55\x55\0\0", 5, 0),
        (4, b"\0\0\xff\xff", 0, 255),
        (8, bytes([200] * 4 + [0] * 4), 200, 0),
        (16, struct.pack(">8H", *[0x1234] * 4, *[0] * 4), 0x1234, 0),
        (16, struct.pack(">8H", *[0x1234] * 4, *[0x1200] * 4), 0x1234, 72),  # 14 bits are in use
        (16, struct.pack(">8H", *[0xFFFF] * 4, *[0x03FF] * 4), 0xFFFF, 255),  # 10 bits, and a value for nothing
    ],
)
def test_the_transparent_grey_of_a_png(depth, row, clear, other):
    """Of any depth; other greys, however near, stay what they are."""
    pixels = shown(png_file([row] * 8, 8, depth, 0, chunk(b"tRNS", struct.pack(">H", clear))))
    assert (pixels[:, :4] == 255).all() and (pixels[:, 4:] == other).all()


def test_pngs_that_pillow_cannot_show():
    row = struct.pack(">24H", *[0x1234, 0x2345, 0x3456] * 4, *[0] * 12)
    data = partial(png_file, [row] * 8, 8, 16, 2)
    assert (shown(data())[:, :4] == [0x12, 0x23, 0x34]).all()
    refused(data(chunk(b"tRNS", struct.pack(">3H", 0x1234, 0x2345, 0x3456))), "stands for transparent")
    refused(png_file([bytes(8)] * 8, 8, 8, 3), "without its palette")


def gif(transparent=None):
    """8x8 pixels, the first frame of which is a black square of 4x4 at the right and down; colour 0 is red."""
    control = b"" if transparent is None else b"!\xf9\x04" + struct.pack("<BHB", 1, 0, transparent) + b"\0"
    bits = "".join(f"{code:03b}"[::-1] for code in [*[4, 1] * 16, 5])  # each colour on its own: no real compression
    packed = int(bits[::-1], 2).to_bytes((len(bits) + 7) // 8, "little")
    screen = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x91, 2, 0) + bytes([200, 0, 0, 0, 0, 0, 0, 255, 0, 0, 0, 255])
    return screen + control + struct.pack("<cHHHHBB", b",", 4, 4, 4, 4, 0, 2) + bytes([len(packed)]) + packed + b"\0;"


def animated(kind, **options):
    black = Image.new("RGBA", (8, 8))
    black.paste((0, 0, 0, 255), (4, 4, 8, 8))
    return stored(black, kind, save_all=True, append_images=[Image.new("RGBA", (8, 8), "red")], **options)


@pytest.mark.parametrize("data", [gif(), gif(0), gif(3), animated("webp", lossless=True), animated("png")])
def test_first_frames_that_cover_part_of_the_image(data):
    """Pillow writes WebP so: cut to what is opaque, and the file says that nothing is transparent."""
    expected = np.full((8, 8, 3), 255)
    expected[4:, 4:] = 0
    assert np.array_equal(shown(data), expected)


@pytest.mark.parametrize("height", [8, 9])
@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(
    ("mode", "kind"), [("L", 0), ("RGB", 2), ("P", 3), ("LA", 4), ("RGBA", 6), ("I;16", 0), ("1", 0)]
)
def test_missing_rows_of_a_png_are_found(mode, kind, interlaced, height):
    """A stream that ends early, but properly: Pillow leaves the rest black."""
    depth, width = {"I;16": 16, "1": 1}.get(mode, 8), 64
    channels = {"RGB": 3, "LA": 2, "RGBA": 4, "I;16": 2}.get(mode, 1)
    values = np.random.default_rng(0).integers(1, 255, (height, width, channels), dtype=np.uint8)
    rows = values[:, : width // 8] if depth == 1 and not interlaced else values
    palette = chunk(b"PLTE", bytes(range(256)) * 3) if mode == "P" else b""
    write = partial(png_file, width=width, depth=depth, kind=kind, extra=palette, interlaced=interlaced)
    with Image.open(io.BytesIO(write(rows))) as image:
        assert image.mode == mode
    shown(write(rows))
    for missing in (1, 3):
        refused(write(rows, missing=missing), "rows of the PNG are missing")
    for value in (0, 77, 255):  # rows that look like those that are missing
        rows[-4:] = value
        shown(write(rows))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_jpeg_cut_before_a_mark_of_its_end_is_found(mode, share):
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    for options in ({}, {"subsampling": 0}, {"restart_marker_blocks": 3}):
        data = stored(Image.fromarray(noise).convert(mode), "jpeg", quality=90, **options)
        shown(data)
        refused(data[: int(share * len(data))] + b"\xff\xd9", "rows of the JPEG are missing")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_grey_corners_are_no_damage(mode):
    """Whole files whose last pixels are the grey that libjpeg shows for missing ones, also with more behind the end."""
    image = Image.new(mode, (40, 24), (128,) * len(mode) if mode != "L" else 128)
    image.paste((9,) * len(mode) if mode != "L" else 9, (0, 0, 20, 10))
    for options in ({}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 2}):
        data = stored(image, "jpeg", **options)
        assert abs(np.asarray(image.convert("RGB")).astype(int) - shown(data)).max() <= 40
        for behind in (b"\xff\xd9", b"trailer \xff\xd9 of a camera", bytes(100)):
            assert np.array_equal(shown(data), shown(data + behind))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "gif"])
def test_ordinary_images_are_decoded_once(kind, monkeypatch):
    opened, open_image = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **options: opened.append(1) or open_image(*args, **options))
    load_image(stored(Image.fromarray(np.random.default_rng(0).integers(0, 100, (32, 32, 3), dtype=np.uint8)), kind))
    assert opened == [1]
