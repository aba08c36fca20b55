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

_DELIMITERS = {".tsv": "\t", ".csv": ","}
_ROWS_AT_ONCE = 8  # of a parquet file: an image of HR-Bench 8K takes 10 MB
_LONGEST_POINTER = 64
"""VLMEvalKit's TSV files store an image once; rows that share it hold the index of that row in its place."""


def read_rows(path: Path, columns: Sequence[str], option: str = "data.path") -> Iterator[dict[str, Any]]:
    """The rows of `path` with at least `columns`; TSV images that point to an earlier row are filled in.

    Raises OptionError, naming `option`, when the file cannot be read, has other columns or is no table at all.
    """
    with _told(path, option):
        if (ending := path.suffix.lower()) == ".parquet":
            # buffered: else a whole row group, often a thousand images, is in memory at once
            with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
                check_columns(file.schema_arrow.names, columns, path, option)
                for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                    yield from batch.to_pylist()
        elif ending in _DELIMITERS:
            with _separated(path) as rows:
                check_columns(rows.fieldnames or [], columns, path, option)
                yield from _with_images(rows, path) if ending == ".tsv" and "image" in columns else rows
        elif ending == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise OptionError(option, path, "is not a list of records", "give a copy of the published file")
            for row in rows:
                check_columns(list(row), columns, path, option)
                yield row
        else:
            endings = ", ".join((".parquet", *_DELIMITERS, ".json"))
            raise OptionError(option, path, "is no benchmark file", f"give one that ends in {endings}")


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
    with _told(path, option):
        if path.suffix.lower() == ".parquet":
            return pq.read_schema(path).names
        if path.suffix.lower() in _DELIMITERS:
            with _separated(path) as rows:
                return list(rows.fieldnames or [])
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


@contextlib.contextmanager
def _separated(path: Path) -> Iterator[csv.DictReader]:
    csv.field_size_limit(sys.maxsize)  # an image in base64 is one field
    with open(path, newline="", encoding="utf-8-sig") as file:
        yield csv.DictReader(file, delimiter=_DELIMITERS[path.suffix.lower()])


def _with_images(rows: csv.DictReader, path: Path) -> Iterator[dict[str, Any]]:
    """`rows` with pointers replaced by images; only those that others point at are kept in memory."""
    with _separated(path) as first_time:
        pointers = {image for row in first_time if 0 < len(image := row.get("image") or "") <= _LONGEST_POINTER}
    images: dict[str, str] = {}
    for row in rows:
        image = row.get("image") or ""
        if row.get("index") in pointers:
            images[row["index"]] = image
        if image and len(image) <= _LONGEST_POINTER:
            row["image"] = images.get(image, "")
        yield row
