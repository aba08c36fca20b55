"""Malformed records and images, and what must become of each: the material of test_fuzz.py."""

import io
import json
import os
import pickle
import random
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, features

GOOD = {"image": "images/good.png", "question": "what digit is red?", "bbox": [10, 12, 25, 30]}
SIZE = (64, 48)
LOSSY = ["JPEG", "WEBP"] + [name for name, part in (("JPEG2000", "jpg_2000"), ("AVIF", "avif")) if features.check(part)]
FORMATS = ["PNG", "GIF", "TIFF", "BMP", "PPM", *LOSSY]
ANY = "any"
"""Expectation of a case whose damage is random: kept or dropped, but counted."""


@dataclass
class Case:
    """One line of JSONL; `prepared` and `loaded` are the reasons for which each stage drops it (None: kept)."""

    line: bytes
    prepared: str | None = None
    loaded: str | None = None


def record(prepared=None, loaded=None, **fields):
    return Case(json.dumps({**GOOD, **fields}).encode(), prepared, loaded)


def many(prepared, field, values, **fields):
    return [record(prepared, **{**fields, field: value}) for value in values]


def picture(mode="RGB", size=SIZE):
    noise = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(format, image=None, **options):
    buffer = io.BytesIO()
    (image or picture()).save(buffer, format, **options)
    return buffer.getvalue()


def png(width, height, data=b"", chunks=b"", depth=1):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunks + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


def headers(width, height):
    """{format: a file that claims to be `width` x `height` pixels and has next to none}."""
    jpeg, tiff, webp = (bytearray(encoded(name)) for name in ("JPEG", "TIFF", "WEBP"))
    start = jpeg.index(b"\xff\xc0") + 5
    jpeg[start : start + 4] = struct.pack(">HH", height, width)
    table = struct.unpack("<I", tiff[4:8])[0] + 2
    for entry in range(table, table + 24, 12):  # the first two tags are width and height
        tiff[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, width if entry == table else height)
    canvas = struct.pack("<I", width - 1 & 0xFFFFFF)[:3] + struct.pack("<I", height - 1 & 0xFFFFFF)[:3]
    frame = b"ANMF" + struct.pack("<I", len(webp) + 4) + bytes(6) + b"\x3f\0\0\x2f\0\0" + bytes(4) + webp[12:]
    body = b"WEBPVP8X\x0a\0\0\0\2\0\0\0" + canvas + b"ANIM\6\0\0\0" + bytes(6) + frame
    bmp = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return {
        "png": png(width, height),
        "jpeg": bytes(jpeg),
        "tiff": bytes(tiff),
        "webp": b"RIFF" + struct.pack("<I", len(body)) + bytes(body),
        "bmp": b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + bmp,
        "gif": b"GIF89a" + struct.pack("<HH3xc4xHHx", width, height, b",", width, height) + b"\2\0;",
        "ppm": f"P6 {width} {height} 255\n".encode(),
    }


class Payload:
    """Unpickling this creates the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class Fuzz:
    """Writes the images of all cases under `root` and collects the cases by class."""

    def __init__(self, root: Path, payload: Path, seed: int = 0):
        self.root, self.payload, self.rng = root, payload, random.Random(seed)
        (root / "images").mkdir(parents=True)
        self.write("good.png", encoded("PNG"))
        self.groups = {
            "usable": self.usable(),
            "broken images": self.broken_images(),
            "sizes": self.sizes(),
            "paths": self.paths(),
            "boxes": self.boxes(),
            "texts": self.texts(),
            "types": self.types(),
            "lines": self.lines(),
            "random": self.random_damage(),
        }

    def write(self, name, data):
        (self.root / "images" / name).write_bytes(data)
        return f"images/{name}"

    def image(self, name, data, prepared=None, loaded=None, **fields):
        return record(prepared, loaded, id=name, image=self.write(name, data), **{"bbox": [1, 1, 9, 9], **fields})

    def usable(self):
        """Odd but good: other formats and modes, animations, junk beside the pixels, a wrong suffix."""
        cases = [self.image(f"{name}.img", encoded(name)) for name in FORMATS]
        cases += [self.image(f"tail-{name}", encoded(name) + b"junk" * 50) for name in FORMATS]
        for mode in ("1", "L", "LA", "P", "RGBA"):
            cases.append(self.image(f"mode-{mode}.png", encoded("PNG", picture(mode))))
        for mode, name in (("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF"), ("LAB", "TIFF"), ("P", "GIF")):
            cases.append(self.image(f"mode-{mode}.{name}", encoded(name, picture(mode))))
        deep = np.linspace(0, 65535, SIZE[0] * SIZE[1]).reshape(SIZE[::-1])
        cases.append(self.image("16-bit.png", encoded("PNG", Image.fromarray(deep.astype(np.uint16)))))
        cases.append(self.image("32-bit.tiff", encoded("TIFF", Image.fromarray(deep.astype(np.int32)))))
        cases.append(self.image("float.tiff", encoded("TIFF", Image.fromarray((deep / 257).astype(np.float32)))))
        cases.append(self.image("transparent.png", encoded("PNG", picture("P"), transparency=bytes(range(256)))))
        frames = {"save_all": True, "append_images": [picture("L"), picture("RGB", (9, 9)).resize(SIZE)]}
        cases += [self.image(f"moving.{name}", encoded(name, **frames)) for name in ("GIF", "WEBP", "PNG", "TIFF")]
        cases.append(self.image("stereo.jpg", encoded("MPO", **frames)))
        cases.append(self.image("exif.jpg", encoded("JPEG", exif=b"Exif\0\0" + self.rng.randbytes(500))))
        cases.append(self.image("icc.jpg", encoded("JPEG", icc_profile=self.rng.randbytes(500))))
        cases.append(record(id="only a crop", crop_image=self.write("c.jpg", encoded("JPEG")), bbox=None))
        cases.append(record(id="normal", image="./images//../images/good.png/"))
        return cases

    def broken_images(self):
        reason = "unreadable_image"
        files = {f"cut-{part}-{name}": encoded(name)[:part] for name in FORMATS for part in (0, 1, 7, 20)}
        files |= {f"half-{name}": (data := encoded(name))[: len(data) // 2] for name in FORMATS}
        files |= {f"no-start-{name}": encoded(name)[4:] for name in FORMATS}
        files["page.png"] = b"<!DOCTYPE html><title>404</title>"
        files["drawing.svg"] = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
        files["program.eps"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
        files["zeros.bmp"], files["noise.webp"] = bytes(5000), self.rng.randbytes(5000)
        files["payload.pkl"] = pickle.dumps(Payload(self.payload))
        files["payload.npy"] = b"\x93NUMPY\1\0" + files["payload.pkl"]
        bomb = zlib.compress(bytes(50_000_000), 9)
        text = struct.pack(">I", len(bomb) + 3) + (body := b"zTXta\0\0" + bomb) + struct.pack(">I", zlib.crc32(body))
        files["bomb.png"] = png(8, 8, bytes(16), text)
        cases = [self.image(name, data, reason) for name, data in files.items()]
        for name in ("half-PNG", "payload.pkl", "page.png", "zeros.bmp"):
            cases.append(record(reason, crop_image=f"images/{name}"))
        return cases

    def sizes(self):
        cases = [self.image(f"20000.{n}", data, "image_too_large") for n, data in headers(20_000, 20_000).items()]
        cases += [self.image(f"65535.{n}", data, "image_too_large") for n, data in headers(65_535, 65_535).items()]
        cases += [self.image(f"0.{n}", d, "unreadable_image") for n, d in headers(0, 0).items() if n != "webp"]
        whole = png(20_000, 20_000, bytes(2501) * 20_000)
        cases.append(self.image("20000-whole.png", whole, "image_too_large"))
        cases.append(record("image_too_large", crop_image="images/20000-whole.png"))
        for size in ((1, 1), (1, 60), (60, 1), (3, 60), (60, 3)):
            name = f"{size[0]}x{size[1]}.png"
            cases.append(self.image(name, encoded("PNG", picture(size=size)), "image_too_small", bbox=[0, 0, 1, 1]))
            cases.append(record("image_too_small", crop_image=f"images/{name}"))
        for size in ((4, 4), (4, 800), (800, 4), (5, 9)):
            cases.append(self.image(f"{size}.png", encoded("PNG", picture(size=size)), bbox=[0, 0, 1, 1]))
        for size in ((4, 4000), (4000, 4)):
            data = encoded("PNG", picture(size=size))
            cases.append(self.image(f"{size}.png", data, "extreme_aspect", bbox=[0, 0, 4, 4]))
        with open(self.root / "images" / "sparse.png", "wb") as file:
            file.truncate(2 << 30)
        cases.append(record("image_too_large", image="images/sparse.png"))
        return cases

    def paths(self):
        images, outside = self.root / "images", self.root.parent / "outside"
        outside.mkdir()
        (outside / "secret.png").write_bytes(encoded("PNG"))
        os.mkfifo(images / "fifo.png")
        (images / "folder.png").mkdir()
        links = {"out": outside / "secret.png", "out-folder": outside, "relative": "../../outside", "root": "/"}
        links |= {"zero": "/dev/zero", "loop": "loop", "to-fifo": "fifo.png", "dangling": "none.png", "in": "good.png"}
        for name, target in links.items():
            (images / name).symlink_to(target)
        leading_out = """/etc/passwd /dev/zero /dev/stdin /proc/self/environ .. ../outside/secret.png images/out
            images/../../outside/secret.png images/out-folder/secret.png images/relative/secret.png images/zero
            images/root/etc/passwd images/./../images/out images/none/../../../outside/secret.png""".split()
        missing = """images/fifo.png images/to-fifo images/folder.png images . images/dangling images/loop ~/x.png
            file:///etc/passwd images/good.png/x C:\\x.png""".split()
        odd = ["\0", "images/a\0.png", "x" * 300, "x/" * 5000, "\x1b[31m.png", "\ud800.png", "images/\udcff.png", " "]
        wrong = ["", 5, True, [{"url": 5}], {"path": "images/good.png"}, 1e400]
        cases = [record(id="inner link", image="images/in")]
        for field, reason in (("image", "missing_image"), ("crop_image", "missing_crop")):
            cases += many("path_outside_folder", field, [*leading_out, str(outside / "secret.png")])
            cases += many(reason, field, missing + odd) + many("malformed_record", field, wrong)
        listed = [[{"path": "images/out"}], [{"image": "/dev/zero"}], ["../outside/secret.png"]]
        cases += many("path_outside_folder", "images", listed, problem="q")
        cases += many("missing_image", "images", [["images/fifo.png"], [{}]], problem="q")
        cases += many("missing_image", "images", [[None], []], image=None, problem="q")
        return cases + [record(id=f"beside {empty}", images=empty) for empty in ([None], [], None)]

    def boxes(self):
        inf, nan, big = float("inf"), float("nan"), 10**300
        wrong = ["", "1,2,3,4", 5, True, {}, [], [1, 2, 3], [1, 2, 3, 4, 5], [[1, 2, 3]], [[1, 2], [3, 4]]]
        values = ["4", None, nan, inf, -inf, True, [4], {}, 10**400, -(10**400), "\ud800"]
        wrong += [[1, 2, 3, value] for value in values] + [[value, 2, 3, 4] for value in values]
        wrong += [nested(900), nested(200, {"x": 1}), "9" * 100_000, [0] * 100_000]
        empty = [(5, 5, 5, 9), (5, 5, 9, 5), (9, 5, 5, 9), (5, 9, 9, 5), (0, 0, 0, 0), (big, 0, 9, 9), (-1, -1, -2, -2)]
        out = [(64, 0, 70, 9), (0, 48, 9, 60), (-9, 0, 0, 9), (0, -9, 9, 0), (big, 0, 2 * big, 9), (-1e308, 0, -1, 9)]
        fine = [(-5, -5, 70, 60), (0, 0, big, 1e308), (0.2, 0.3, 0.4, 0.5), (63.5, 47.5, 64, 48), (1e-320, 0, 1, 1)]
        fine += [(0, 0, 1, 1), (-big, -1e308, 1, 1)]
        cases = many("malformed_record", "bbox", wrong) + many("missing_crop", "bbox", [None])
        cases += many("empty_box", "bbox", empty) + many("box_outside_image", "bbox", out)
        return cases + [record(id=f"box-{i}", bbox=box) for i, box in enumerate(fine)]

    def texts(self):
        half, layout = "\ud800", {"images": ["images/good.png"], "problem": "<image>\n"}
        cases = many("empty_question", "question", ["", " ", "\n\t\r ", "\u3000\u2003\x1f", "<image>", " <image>\n"])
        cases += many("empty_question", "question", ["\0", "\uffff\U0010ffff", "\ufeff\u200b"])
        cases += [record("empty_question", **layout), record("malformed_record", answer="x" * 1_000_001)]
        cases += many("malformed_record", "question", [half, "what \udfff?", half * 9])
        cases += many("malformed_record", "answer", [half]) + many("malformed_record", "id", [half, "x" * 1001])
        cases += many("overlong_prompt", "question", ["digit " * 200_000, "x" * 2_000_000])
        long = ["digit " * 100_000, "?" * 100_000, " " * 900_000 + "?", "x" * 900_000, "\U0001f600" * 5000]
        special = ["<|image_pad|>", "a <|im_end|>\n<|im_start|>system", "<|vision_start|>" * 50, "<unk>"]
        odd = ["what\0is\0it", "\x1b[2Jred\x07", "\u202ered", "{{ messages }}{% endfor %}", "the <image> tag"]
        odd += ["\ufeff?", "</s>", "<|", "a\u0301" * 50, "?\uffff\U0010ffff", "𒐫ﷺ\u200d", "%s%n%x", "\\", '"']
        for loaded, texts in (("overlong_prompt", long), ("malformed_record", special), (None, odd)):
            cases += [record(None, loaded, id=f"text-{text[:9]!a}", question=text) for text in texts]
        return cases

    def types(self):
        bad, good = "malformed_record", "images/good.png"
        cases = many(bad, "question", [True, 3, -1.5, [], {}, [[]], ["what?"], {"text": "what?"}, None])
        cases += many(bad, "id", ["", "  ", True, None, 1.5, [], {}, ["a"], 10**1001])
        cases += many(bad, "answer", [{}, [{}], [["a"]], nested(90)])
        cases += many(bad, "images", [True, good, {}, 1, [[]], [1.5]], problem="q")
        cases += many("unreadable_image", "images", [[1], [[1, 2, 255]]], problem="q")  # the bytes of a file
        cases += many("several_images", "images", [[good, good], [good] * 9], problem="q")
        cases += many(bad, "problem", [True, 3, {}, [{}]], images=[good])
        cases += many(bad, "problem", [[], None], images=[good], question=None)
        cases += many(bad, "teacher_images", [True, good, [1.5]], images=[good], problem="q")
        cases += many("several_images", "teacher_images", [[good, good]], images=[good], problem="q")
        cases += many("missing_crop", "teacher_images", [[], [{}], [None]], images=[good], problem="q")
        for first, again in (("same", "same"), ("7", 7), (0, 0), (-(10**50), str(-(10**50)))):
            cases += [
                record(id=first),
                record("duplicate_id", id=again),
                record("duplicate_id", id=again, question="?"),
            ]
        answers = (True, 3, -0.5, float("nan"), "", "\0", None, [], ["a"], ["a", 3, None])
        return cases + [record(id=f"answer-{i}", answer=value) for i, value in enumerate(answers)]

    def lines(self):
        good = json.dumps({**GOOD, "id": "line"}).encode()
        lines = [good[:cut] for cut in range(1, len(good), 9)]
        lines += [b"null", b"3", b'"text"', b"[]", b"NaN", b"{}", b"{}{}", b"[" * 100_000, b'{"a":' * 100_000, b"\0"]
        lines += [
            good + good,
            good[:-1] + b",}",
            b"// note",
            good.replace(b'"', b"'"),
            b"id,image\r",
            b"\xef\xbb\xbf\0",
        ]
        lines += [good.replace(b"red", junk) for junk in (b"\xff\xc3", b"\x01", b"\xed\xa0\x80", b"\xc0\x80", b"\xf5")]
        lines += [
            good.replace(b"12", b"1" * 5000),
            b"x" * (17 << 20),
            b" " * (17 << 20) + good,
            good.decode().encode("utf-16"),
        ]
        bom, crlf, twice, blank, deep, wide = (good.replace(b"line", b"line%d" % i) for i in range(6))
        fine = [b"\xef\xbb\xbf" + bom, crlf + b"\r", b'{"id": 5, ' + twice[1:], b" \t " + blank + b" "]
        fine += [deep[:-1] + b', "x": ' + b"[" * 300 + b"]" * 300 + b"}"]
        fine += [wide[:-1] + b', "x": "' + b"y" * 5_000_000 + b'"}']
        return [Case(line, "malformed_record") for line in lines] + [Case(line) for line in fine]

    def random_damage(self):
        """Flipped bits in images, mutated bytes in lines, random JSON in fields."""
        rng, cases = self.rng, []
        for name in FORMATS:
            for trial in range(8):
                data = bytearray(encoded(name))
                for _ in range(2 ** rng.randrange(8)):
                    data[rng.randrange(len(data) if trial % 2 else 64)] ^= 1 << rng.randrange(8)
                cases.append(self.image(f"flip-{trial}-{name}", bytes(data), ANY, ANY))
        for trial in range(60):
            line = bytearray(json.dumps({**GOOD, "id": f"mutant-{trial}"}).encode())
            for _ in range(rng.randint(1, 4)):
                line[rng.randrange(len(line))] = rng.choice([c for c in range(256) if c != 10])
            cases.append(Case(bytes(line), ANY, ANY))
        for trial in range(80):
            field = rng.choice("id image question bbox crop_image answer images teacher_images problem".split())
            cases.append(record(ANY, ANY, **{"id": f"field-{trial}", field: json_value(rng)}))
        return cases


def nested(depth, value=0):
    for _ in range(depth):
        value = [value]
    return value


def json_value(rng, depth=0):
    """A random JSON value: numbers, texts, lists of four, objects with the keys that are looked at."""
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind < 5:
        scalars = [None, True, 10 ** rng.randrange(400), rng.uniform(-99, 99), float("nan"), "", "images/good.png"]
        return rng.choice([*scalars, rng.randint(-9, 70), chr(rng.randrange(0x11000))])
    if kind < 7:
        return [json_value(rng, depth + 1) for _ in range(rng.choice([0, 1, 1, 4, 4]))]
    return {rng.choice(["path", "image", "bytes", "x"]): json_value(rng, depth + 1) for _ in range(2)}
