"""Records with image files to an Energon data set: crude WebDataset shards and their index.

A record is stored as `<index>.image` (the file's bytes as they are), optionally `<index>.crop`, and `<index>.json`
(id, question, bbox, answer). Everything a later view may need is kept; nothing is resized or re-encoded.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator
from tqdm import tqdm

from nemo_vopd.data.files import whole_directory
from nemo_vopd.data.records import check_answer, check_id, check_question
from nemo_vopd.data.views import MAX_IMAGE_PIXELS, UnusableSample, check_box, load_image
from nemo_vopd.errors import OptionError

_DATASET_YAML = "__module__: megatron.energon\n__class__: CrudeWebdataset\nsubflavors:\n  nemo_vopd: 1\n"
MAX_LINE_BYTES = 16 << 20
"""Longer lines are dropped without being held in memory: a file that is no JSONL can be one line."""
MAX_IMAGE_BYTES = 3 * MAX_IMAGE_PIXELS
"""Longer image files are dropped unread; the largest image that is accepted takes this when decoded."""


@dataclass
class Prepared:
    """A checked record, ready to be written."""

    id: str
    question: str
    image: bytes
    crop: bytes | None
    bbox: list[float] | None
    answer: str | None


def prepare(
    source: Path,
    output: Path,
    *,
    shard_size: int = 1000,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    workers: int = 4,
    overwrite: bool = False,
    progress: bool = True,
) -> dict:
    """Convert the JSONL file `source` into the Energon data set `output`.

    Two layouts, record by record: `image, question, bbox or crop_image` (optional `answer, id`), and Vision-OPD-6K's
    `images, teacher_images, problem` (optional `answer, id, bbox`). Image paths are relative to the folder of
    `source` and must stay inside. Unusable records are dropped. `shard_size` is in records, `workers` in threads.

    Returns and prints {"kept": int, "dropped": {reason: count}}. Raises OptionError when `source` is missing,
    `output` exists (unless `overwrite`), a number is out of range, or nothing is left.
    """
    source, output = Path(source), Path(output)
    _check_options(source, output, shard_size, max_image_pixels, workers, overwrite)
    dropped: Counter[str] = Counter()
    examples: dict[str, str] = {}
    try:
        with whole_directory(output, option="output", replace=overwrite) as temporary:
            records = _checked_records(source, max_image_pixels, workers, dropped, examples, progress)
            kept = _write_shards(records, temporary, shard_size)
            if not kept:
                reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.most_common()) or "it is empty"
                raise OptionError("source", source, f"no record can be used ({reasons})", "check its format and paths")
            _write_index(temporary, workers)
    except FileExistsError:
        raise OptionError("output", output, "was made by another process meanwhile", "use that one") from None
    print(f"kept {kept} records in {output}, dropped {sum(dropped.values())}")
    for reason, count in dropped.most_common():
        print(f"  dropped {count}: {reason} (first: {examples[reason]})")
    return {"kept": kept, "dropped": dict(dropped)}


def _check_options(source: Path, output: Path, shard_size: int, pixels: int, workers: int, overwrite: bool) -> None:
    if not source.is_file():
        raise OptionError("source", source, "is not a file", "give a JSONL file with one record a line")
    for option, value in (("shard_size", shard_size), ("max_image_pixels", pixels), ("workers", workers)):
        if value < 1:
            raise OptionError(option, value, "must be at least 1", f"set {option}=1 or more")
    if pixels > MAX_IMAGE_PIXELS:
        rule = f"must be at most {MAX_IMAGE_PIXELS}: larger images are dropped when they are loaded"
        raise OptionError("max_image_pixels", pixels, rule, "lower it and scale the images down")
    if output.exists() and not overwrite:
        raise OptionError("output", output, "exists", "choose another directory or set overwrite=true")
    if output.exists() and not (output / ".nv-meta").is_dir():
        raise OptionError("output", output, "exists and is no prepared data set", "choose another directory")


def _checked_records(
    source: Path, max_pixels: int, workers: int, dropped: Counter, examples: dict[str, str], progress: bool
) -> Iterator[Prepared]:
    """The usable records in order; the others go to `dropped`, with one example for each reason."""
    root, seen = source.parent.resolve(), set()

    def check(numbered: tuple[int, bytes]) -> tuple[int, Prepared | UnusableSample]:
        number, line = numbered
        try:
            return number, _read(line, root, max_pixels, f"{source.stem}-{number:08d}")
        except UnusableSample as unusable:
            return number, unusable

    with (
        open(source, "rb") as file,
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=source.stat().st_size, unit="B", unit_scale=True, desc="prepare", disable=not progress) as bar,
    ):
        lines = _lines(file)
        # a window at a time: executor.map would otherwise read every image of the file ahead of the writer
        while window := list(islice(lines, 16 * workers)):
            for number, result in pool.map(check, window):
                if isinstance(result, Prepared) and result.id in seen:
                    result = UnusableSample("duplicate_id", result.id)
                if isinstance(result, UnusableSample):
                    dropped[result.reason] += 1
                    examples.setdefault(result.reason, f"line {number}: {result.detail or result.reason}"[:200])
                else:
                    seen.add(result.id)
                    yield result
            bar.update(file.tell() - bar.n)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, numbered from 1; of an overlong one, its first MAX_LINE_BYTES + 1 bytes."""
    pieces = iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")
    for number, line in enumerate(pieces, start=1):
        piece = line
        while len(piece) > MAX_LINE_BYTES and not piece.endswith(b"\n"):
            piece = next(pieces, b"")
        if line.strip() or len(line) > MAX_LINE_BYTES:
            yield number, line


def _read(line: bytes, root: Path, max_pixels: int, default_id: str) -> Prepared:
    """One checked record. Raises UnusableSample."""
    if len(line) > MAX_LINE_BYTES:
        raise UnusableSample("malformed_record", f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UnusableSample("malformed_record", f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise UnusableSample("malformed_record", "not a JSON object")
    image_name, crop_name, question = _fields(record)
    question = check_question(question)
    sample_id, answer = check_id(record.get("id", default_id)), check_answer(record.get("answer"))
    if image_name is None:
        raise UnusableSample("missing_image", "no image is named")
    image = _read_file(root, image_name, "missing_image")
    crop = None if crop_name is None else _read_file(root, crop_name, "missing_crop")
    bbox = record.get("bbox")
    if bbox is None and crop is None:
        raise UnusableSample("missing_crop", "neither bbox nor crop image")
    # decoded in full: a truncated file is found now, not in the middle of a run
    size = load_image(image, max_pixels).size
    if bbox is not None:
        check_box(bbox, size)
    if crop is not None:
        load_image(crop, max_pixels)
    return Prepared(sample_id, question, image, crop, bbox, answer)


def _fields(record: dict) -> tuple[object, object, object]:
    """(image path, crop path, question) in either layout."""
    if "images" not in record:
        return record.get("image"), record.get("crop_image"), record.get("question")
    problem = record.get("problem")
    if isinstance(problem, str):
        # the layout marks the place of the image in the text; here the chat template decides it
        problem = problem.replace("<image>\n", "").replace("<image>", "")
    image = _only_image(record["images"], "missing_image")
    crops = record.get("teacher_images")
    return image, None if crops is None else _only_image(crops, "missing_crop"), problem


def _only_image(images: object, missing: str) -> object:
    """The path in a list of one image, given as text or as {"path": ...} or {"image": ...}."""
    if not isinstance(images, list):
        raise UnusableSample("malformed_record", "images must be a list")
    if len(images) != 1:
        raise UnusableSample(missing if not images else "malformed_record", f"{len(images)} images in place of one")
    image = images[0].get("path", images[0].get("image")) if isinstance(images[0], dict) else images[0]
    if image is None:
        raise UnusableSample(missing, "an image without a path")
    return image


def _read_file(root: Path, name: object, missing: str) -> bytes:
    """Bytes of the file `name` under `root`; links are followed before the check, so none leads outside."""
    if not isinstance(name, str) or not name:
        raise UnusableSample("malformed_record", "an image path is not a text")
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise UnusableSample("path_outside_folder", name)
        if not path.is_file():  # opening a FIFO would wait for ever
            raise UnusableSample(missing, f"{name}: not a file")
        size = path.stat().st_size
        if size > MAX_IMAGE_BYTES:
            raise UnusableSample("image_too_large", f"{name}: {size} bytes, more than {MAX_IMAGE_BYTES}")
        return path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        raise UnusableSample(missing, f"{name}: {type(error).__name__}") from None


def _write_shards(records: Iterator[Prepared], folder: Path, shard_size: int) -> int:
    """Write shard-000000.tar, ...; returns the number of records."""
    index = 0
    while shard := list(islice(records, 1)):
        with tarfile.open(folder / f"shard-{index // shard_size:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            while shard:
                _add(tar, f"{index:09d}", shard[0])
                index += 1
                shard = list(islice(records, 1)) if index % shard_size else []
    return index


def _add(tar: tarfile.TarFile, key: str, record: Prepared) -> None:
    meta = {"id": record.id, "question": record.question, "bbox": record.bbox, "answer": record.answer}
    parts = {"image": record.image, "crop": record.crop, "json": json.dumps(meta, ensure_ascii=False).encode()}
    for name, data in parts.items():
        if data is not None:
            info = tarfile.TarInfo(f"{key}.{name}")
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))


def _write_index(folder: Path, workers: int) -> None:
    """Energon's index of the shards and the file that says how to read them."""
    shards = sorted(path.name for path in folder.glob("shard-*.tar"))
    with contextlib.redirect_stdout(io.StringIO()):  # Energon's own progress notes
        WebdatasetPreparator.prepare_dataset(
            folder, shards, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=min(workers, len(shards))
        )
    (folder / ".nv-meta" / "dataset.yaml").write_text(_DATASET_YAML)
