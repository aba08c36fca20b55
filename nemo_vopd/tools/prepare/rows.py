"""The records of a source as rows: read from any place on, and planned in chunks that are read independently.

Images stay the bytes that they are in the file: nothing decodes them on the way.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from nemo_vopd.data.record_fields import check_id
from nemo_vopd.errors import OptionError
from nemo_vopd.images import UnusableSample
from nemo_vopd.tools.prepare.options import Columns

MAX_LINE_BYTES = 16 << 20
"""Longer lines are dropped without being held in memory: a file that is no JSONL can be one line."""
_MAX_COLUMNS = 1000
_PARQUET_BATCH = 8
"""Number of rows decoded together: with images of megabytes in them, a batch must stay small."""
_READ_BYTES = 1 << 20
_BEGINNING, _BETWEEN = re.compile(r"\ufeff?\s*\[\s*"), re.compile(r"[, \t\r\n]*")
"""What stands before the first record of a list, and between the others."""


class Row(NamedTuple):
    """One record, its images not read yet where it names files."""

    offset: int
    """Place that `Source.rows` reads it from: byte of the file (JSONL) or index of the row (tables)."""
    number: int
    """Line of the file, or row of the tables, from 1."""
    values: dict | UnusableSample


@dataclass
class Chunk:
    """Consecutive records, which become one shard (of each split)."""

    index: int
    start: int
    """Place of the first record among those of the source, from 0."""
    count: int
    offset: int
    """`Row.offset` of the first record."""
    number: int
    """`Row.number` of the first record."""
    duplicates: frozenset[int] = frozenset()
    """Places of the records whose id an earlier record has."""


@dataclass
class Source:
    """Records on disk: a JSONL file, or tables. A source is small and can be pickled: workers open it again."""

    path: Path
    """Path as the user gave it."""
    files: list[Path]
    """Files that hold the records, in order."""
    root: Path
    """Folder that image paths are relative to and must not leave."""
    stem: str
    """Beginning of the ids of records without one."""
    layout: str
    """Name of the form that it was found to have."""
    tabular: bool
    """Whether the files are tables, parquet or arrow (`save_to_disk` of `datasets`), in which images may be bytes."""

    @property
    def unit(self) -> str:
        """Name of what `Row.number` counts."""
        return "row" if self.tabular else "line"

    @cached_property
    def _headers(self) -> list[tuple[int, pa.Schema]]:
        """Number of rows and schema of each table; read once, workers get them with the source."""
        return [_header(file) for file in self.files]

    def size(self) -> int:
        """The end of `Row.offset`. Raises OptionError when a table cannot be read."""
        return sum(num_rows for num_rows, _ in self._headers) if self.tabular else self.files[0].stat().st_size

    def outlines(self) -> list[dict]:
        """For each schema a record without values; none of JSONL, where each record has its own keys."""
        return [_outline(schema) for _, schema in self._headers] if self.tabular else []

    def rows(self, names: set[str], offset: int = 0, number: int = 1) -> Iterator[Row]:
        """The rows from `offset` on, the first of which is called `number`; of tables only the columns `names`.

        Raises OptionError when a table is damaged.
        """
        if not self.tabular:
            read = _json_list if _holds_list(self.files[0]) else _json_lines
            yield from read(self.files[0], offset, number)
            return
        first = 0
        for file, (num_rows, schema) in zip(self.files, self._headers, strict=True):
            if offset < first + num_rows:
                columns = [name for name in schema.names if name in names]
                for values in _table_values(file, offset - first, columns):
                    yield Row(offset, offset + 1, values)
                    offset += 1
            first += num_rows

    def chunk_rows(self, chunk: Chunk, columns: Columns) -> Iterator[tuple[int, Row]]:
        """(place, row) of the records of `chunk`."""
        rows = self.rows(columns.top_level(), chunk.offset, chunk.number)
        for place in range(chunk.start, chunk.start + chunk.count):
            yield place, next(rows)


def _json_lines(path: Path, offset: int, number: int) -> Iterator[Row]:
    """The lines that are not blank; what is no JSON object becomes UnusableSample.

    pyarrow and `datasets` would refuse a file for one malformed line; here that costs one record.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        while line := file.readline(MAX_LINE_BYTES + 1):
            start, piece = offset, line
            offset += len(line)
            while len(piece) > MAX_LINE_BYTES and not piece.endswith(b"\n"):
                piece = file.readline(MAX_LINE_BYTES + 1)
                offset += len(piece)
            if line.removeprefix(codecs.BOM_UTF8).strip() or len(line) > MAX_LINE_BYTES:
                yield Row(start, number, _parse(line))
            number += 1


def _holds_list(path: Path) -> bool:
    """Whether a JSON file is one list of records, as LLaVA and LLaMA-Factory write it, and not a record a line.

    Raises OptionError for a file in UTF-16 or UTF-32.
    """
    with open(path, "rb") as file:
        beginning = file.read(_READ_BYTES)
    # in UTF-8, JSON begins with neither the marks of the others nor a character and a zero
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or re.match(rb"\0*[\[{]\0|\0+[\[{]", beginning):
        raise OptionError("source", path, "is UTF-16 or UTF-32", "convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
    return re.match(rb"\s*\[\s*\{", beginning.removeprefix(codecs.BOM_UTF8)) is not None


def _json_list(path: Path, offset: int, number: int) -> Iterator[Row]:
    """The records of a file that is one list, read piece by piece. Raises OptionError where it is no JSON."""
    scan = json.JSONDecoder().raw_decode
    text, place, at_end = "", 0, False
    with open(path, "rb") as file:
        file.seek(offset)
        decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        while True:
            found = (_BETWEEN if offset else _BEGINNING).match(text, place)
            start = found.end() if found else place
            offset += len(text[place:start].encode("utf-8", "surrogateescape"))
            place, reason = start, "the list does not end"
            if text.startswith("]", place):
                while rest := text[place + 1 :] or decode(file.read(_READ_BYTES)):
                    if rest.strip():
                        rule = f"goes on after the end of its list (record {number}, byte {offset + 1})"
                        raise OptionError("source", path, rule, "write one list, or one record a line")
                    text = ""
                return
            try:
                record, end = scan(text, place)
            except (ValueError, RecursionError) as error:
                reason, end = str(error), len(text)
            if end < len(text):  # what reaches the end of a piece may go on
                usable = isinstance(record, dict)
                yield Row(offset, number, record if usable else UnusableSample("malformed_record", "not a JSON object"))
                offset += len(text[place:end].encode("utf-8", "surrogateescape"))
                place, number = end, number + 1
            elif at_end or len(text) - place > MAX_LINE_BYTES:
                rule = f"is no list of JSON records (record {number}, byte {offset}: {reason})"
                raise OptionError("source", path, rule, "mend the file, or write one record a line")
            else:
                piece = file.read(_READ_BYTES)
                at_end = not piece
                text, place = text[place:] + decode(piece, at_end), 0


def _parse(line: bytes) -> dict | UnusableSample:
    if len(line) > MAX_LINE_BYTES:
        return UnusableSample("malformed_record", f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return UnusableSample("malformed_record", f"not JSON: {error}")
    return record if isinstance(record, dict) else UnusableSample("malformed_record", "not a JSON object")


@contextmanager
def _opened(table: Path) -> Iterator[pq.ParquetFile | pa.Table]:
    """A table whose rows are not read yet. Raises OptionError, also for damage that the block comes upon."""
    try:
        if table.suffix == ".parquet":
            # Buffered and not read ahead, which a pyarrow.dataset cannot do: else a row group, which may be gigabytes,
            # would be in memory as a whole.
            with pq.ParquetFile(table, buffer_size=_READ_BYTES, pre_buffer=False) as file:
                yield file
        else:
            with pa.memory_map(str(table)) as file:
                yield pa.ipc.open_stream(file).read_all()  # views into the file: what is not looked at is not read
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OptionError("source", table, f"cannot be read ({reason})", "copy the file again") from None


def _header(table: Path) -> tuple[int, pa.Schema]:
    with _opened(table) as opened:
        if isinstance(opened, pq.ParquetFile):
            return opened.metadata.num_rows, opened.schema_arrow
        return opened.num_rows, opened.schema


def _outline(columns: Iterable[pa.Field]) -> dict:
    """The names of `columns`, and for structs the names in them."""
    return {one.name: _outline(one.type.fields) if isinstance(one.type, pa.StructType) else None for one in columns}


def _table_values(table: Path, start: int, columns: list[str]) -> Iterator[dict]:
    """The rows from `start` on as dictionaries of `columns`."""
    with _opened(table) as opened:
        for batch in _batches(opened, start, columns):
            for place in range(batch.num_rows):
                # one row at a time becomes Python objects: that copies its images
                yield batch.slice(place, 1).to_pylist()[0]


def _batches(opened: pq.ParquetFile | pa.Table, start: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    if isinstance(opened, pq.ParquetFile):
        ends = np.cumsum([opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)])
        group = int(np.searchsorted(ends, start, side="right"))
        start -= int(ends[group - 1]) if group else 0
        batches = opened.iter_batches(_PARQUET_BATCH, range(group, len(ends)), columns, use_threads=False)
    else:
        batches = opened.select(columns).to_batches()
    for batch in batches:
        yield batch.slice(start)
        start = max(start - batch.num_rows, 0)


def plan_chunks(source: Source, chunk_size: int, columns: Columns, progress: bool) -> list[Chunk]:
    """Read the ids of all records once, but no image; memory: 16 bytes for each record.

    Raises OptionError when a file cannot be read or lacks columns.
    """
    chunks: list[Chunk] = []
    hashes = bytearray()
    present: set[str] = set()
    found: set[str] = set()
    given = columns.given().keys()

    def look_at(values: dict) -> None:
        if len(present) < _MAX_COLUMNS:
            present.update(values)
        found.update(field for field in given - found if columns.find(field, values)[0])

    for outline in source.outlines():
        look_at(outline)
    unit = "row" if source.tabular else "B"
    with tqdm(
        total=source.size(), unit=unit, unit_scale=True, desc="records", disable=not progress, leave=False
    ) as bar:
        for place, row in enumerate(source.rows(columns.top_level("id"))):
            if place % chunk_size == 0:
                chunks.append(Chunk(len(chunks), place, 0, row.offset, row.number))
                bar.update(row.offset - bar.n)
            chunks[-1].count += 1
            if isinstance(row.values, dict):
                look_at(row.values)
            try:
                key = record_id(row, source, columns)
            except UnusableSample:
                key = f"\0{place}"  # it has no id that could be repeated
            hashes += hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    if present:
        columns.check(source.path, present, found)
    repeated = np.ones(len(hashes) // 16, dtype=bool)
    repeated[np.unique(np.frombuffer(hashes, dtype="V16"), return_index=True)[1]] = False
    for chunk in chunks:
        places = chunk.start + np.flatnonzero(repeated[chunk.start : chunk.start + chunk.count])
        chunk.duplicates = frozenset(places.tolist())
    return chunks


def record_id(row: Row, source: Source, columns: Columns) -> str:
    """The id that a record brings along, else one after its place. Raises UnusableSample (malformed_record)."""
    if isinstance(row.values, UnusableSample):
        raise row.values
    name, value = columns.find("id", row.values)
    return check_id(value if name else f"{source.stem}-{row.number:08d}")
