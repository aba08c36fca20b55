"""Rows of published benchmark files: parquet, TSV, CSV and JSON, one at a time, with the columns they must have."""

from __future__ import annotations

import ast
import base64
import binascii
import contextlib
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_vopd.errors import OptionError

SUFFIXES = (".parquet", ".tsv", ".csv", ".json")
_ROWS_AT_ONCE = 8  # of a parquet file: an image of HR-Bench 8K takes 10 MB
_LONGEST_POINTER = 64
"""VLMEvalKit's TSV files store an image once; rows that share it hold the index of that row in its place."""


def read_rows(path: Path, columns: Sequence[str], option: str = "data.path") -> Iterator[dict[str, Any]]:
    """The rows of `path` with at least `columns`; TSV images that point to an earlier row are filled in.

    Raises OptionError, naming `option`, when the file cannot be read, has other columns or is no table at all.
    """
    try:
        reader = {".parquet": _parquet, ".tsv": _separated, ".csv": _separated, ".json": _json}[path.suffix.lower()]
    except KeyError:
        rule = "is no benchmark file"
        raise OptionError(option, path, rule, f"give one that ends in {', '.join(SUFFIXES)}") from None
    with _told(path, option):
        yield from reader(path, columns, option)


@contextlib.contextmanager
def _told(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except OptionError:
        raise
    except (OSError, ValueError, pa.ArrowException, csv.Error) as error:
        reason = " ".join(str(error).split())[:200]
        raise OptionError(option, path, f"cannot be read ({reason})", "copy it again in full") from None


def columns_of(path: Path, option: str = "data.path") -> list[str]:
    """Names of the columns of `path`. Raises OptionError."""
    if path.suffix.lower() == ".parquet":
        with _told(path, option):
            return pq.read_schema(path).names
    if path.suffix.lower() in (".tsv", ".csv"):
        with _told(path, option), open(path, newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file, delimiter=_delimiter(path)).fieldnames or [])
    return list(next(read_rows(path, (), option), {}))


def check_columns(found: Sequence[str], needed: Sequence[str], path: Path, option: str) -> None:
    """Raise OptionError that names the first missing column and those there are."""
    missing = [name for name in needed if name not in found]
    if missing:
        rule = f"has no column {missing[0]!r} (columns: {', '.join(found)})"
        remedy = f"give a copy of the published file, with the columns {', '.join(needed)}"
        raise OptionError(option, path, rule, remedy)


def image_bytes(value: object) -> bytes | None:
    """The image file in a cell: a {"bytes": ...} struct (Hugging Face), plain bytes, or base64 text; else None."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, str):
        # some files hold a data URI
        text = value.split(",", 1)[1] if value.startswith("data:") else value
        try:
            value = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            return None
    return bytes(value) if isinstance(value, bytes | bytearray) and value else None


def text_list(value: object) -> list[str]:
    """The texts of a list cell; TSV files hold the list as Python or JSON would write it, or one text a line."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value) if value.lstrip().startswith("[") else value.splitlines()
        except (ValueError, SyntaxError):
            value = value.splitlines()
    return [str(item).strip() for item in value or [] if str(item).strip()]  # type: ignore[union-attr]


def _parquet(path: Path, columns: Sequence[str], option: str) -> Iterator[dict[str, Any]]:
    # buffered: else a whole row group, often a thousand images, is in memory at once
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        check_columns(file.schema_arrow.names, columns, path, option)
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
            yield from batch.to_pylist()


def _separated(path: Path, columns: Sequence[str], option: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # an image in base64 is one field
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, delimiter=_delimiter(path))
        check_columns(rows.fieldnames or [], columns, path, option)
        pointed_at = _pointed_at(path) if "image" in columns and path.suffix.lower() == ".tsv" else set()
        images: dict[str, str] = {}
        for row in rows:
            image = row.get("image") or ""
            if row.get("index") in pointed_at:
                images[row["index"]] = image
            if image and len(image) <= _LONGEST_POINTER:
                row["image"] = images.get(image, "")
            yield row


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _pointed_at(path: Path) -> set[str]:
    """Indices of the rows whose images others share: only those are kept in memory."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        images = (row.get("image") or "" for row in csv.DictReader(file, delimiter="\t"))
        return {image for image in images if image and len(image) <= _LONGEST_POINTER}


def _json(path: Path, columns: Sequence[str], option: str) -> Iterator[dict[str, Any]]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise OptionError(option, path, "is not a list of records", "give a copy of the published file")
    for row in rows:
        check_columns(list(row), columns, path, option)
        yield row
