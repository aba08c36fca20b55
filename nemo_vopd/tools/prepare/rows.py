"""The records of a source as rows: read from any place on, and planned in chunks that are read independently.

Images stay the bytes that they are in the file: nothing decodes them on the way.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from nemo_vopd.data.records import check_id
from nemo_vopd.errors import OptionError
from nemo_vopd.tools.prepare.options import Columns
from nemo_vopd.views import UnusableSample

MAX_LINE_BYTES = 16 << 20
"""Longer lines are dropped without being held in memory: a file that is no JSONL can be one line."""
_MAX_COLUMNS = 1000
_PARQUET_BATCH = 8
"""Number of rows decoded together: with images of megabytes in them, a batch must stay small."""
_READ_BYTES = 1 << 20


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
class Source(ABC):
    """Records on disk. A source is small and can be pickled: workers open it again."""

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
    tabular: ClassVar[bool] = False
    """Whether columns are typed (parquet, arrow) and images may be bytes."""
    unit: ClassVar[str] = "line"
    """line | row: what `Row.number` counts."""

    @abstractmethod
    def size(self) -> int:
        """The end of `Row.offset`. Raises OptionError when a file cannot be read."""

    @abstractmethod
    def outlines(self) -> list[dict]:
        """For each schema a record without values; none where each record has its own keys."""

    @abstractmethod
    def rows(self, names: set[str], offset: int = 0, number: int = 1) -> Iterator[Row]:
        """The rows from `offset` on, the first of which is called `number`; tables read the columns `names` alone.

        Raises OptionError when a file is damaged.
        """

    def chunk_rows(self, chunk: Chunk, columns: Columns) -> Iterator[tuple[int, Row]]:
        """(place, row) of the records of `chunk`."""
        rows = self.rows(columns.top_level(), chunk.offset, chunk.number)
        for place in range(chunk.start, chunk.start + chunk.count):
            yield place, next(rows)


class JsonlSource(Source):
    """One JSON object a line.

    pyarrow and `datasets` would refuse a file for one malformed line; here that costs one record.
    """

    def size(self) -> int:
        """Bytes of the file."""
        return self.files[0].stat().st_size

    def outlines(self) -> list[dict]:
        """None: lines may differ in their keys."""
        return []

    def rows(self, names: set[str], offset: int = 0, number: int = 1) -> Iterator[Row]:
        """The lines that are not blank, whole; what is no JSON object becomes UnusableSample."""
        with open(self.files[0], "rb") as file:
            file.seek(offset)
            while line := file.readline(MAX_LINE_BYTES + 1):
                start, piece = offset, line
                offset += len(line)
                while len(piece) > MAX_LINE_BYTES and not piece.endswith(b"\n"):
                    piece = file.readline(MAX_LINE_BYTES + 1)
                    offset += len(piece)
                if line.strip() or len(line) > MAX_LINE_BYTES:
                    yield Row(start, number, _parse(line))
                number += 1


def _parse(line: bytes) -> dict | UnusableSample:
    if len(line) > MAX_LINE_BYTES:
        return UnusableSample("malformed_record", f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return UnusableSample("malformed_record", f"not JSON: {error}")
    return record if isinstance(record, dict) else UnusableSample("malformed_record", "not a JSON object")


class TableSource(Source):
    """The rows of parquet files, or of arrow files, which `save_to_disk` of Hugging Face's `datasets` writes."""

    tabular: ClassVar[bool] = True
    unit: ClassVar[str] = "row"

    @cached_property
    def _sizes(self) -> list[int]:
        """Number of rows of each file; counted once, workers get it with the source."""
        sizes = []
        for file in self.files:
            with _readable(file):
                if _is_parquet(file):
                    sizes.append(pq.read_metadata(file).num_rows)
                else:
                    sizes.append(sum(batch.num_rows for batch in _arrow_batches(file)))
        return sizes

    def size(self) -> int:
        """Rows of all files."""
        return sum(self._sizes)

    def outlines(self) -> list[dict]:
        """The schema of each file as nested dictionaries."""
        found = []
        for file in self.files:
            with _readable(file):
                found.append(_outline(pa.struct(list(_schema(file)))))
        return found

    def rows(self, names: set[str], offset: int = 0, number: int = 1) -> Iterator[Row]:
        """The rows of all files, one after the other."""
        first = 0
        for file, size in zip(self.files, self._sizes, strict=True):
            if offset < first + size:
                with _readable(file):
                    present = sorted(names & set(_schema(file).names))
                    for values in _values(file, offset - first, size, present):
                        yield Row(offset, number, values)
                        offset, number = offset + 1, number + 1
            first += size


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OptionError("source", file, f"cannot be read ({reason})", "copy the file again") from None


def _is_parquet(file: Path) -> bool:
    return file.suffix == ".parquet"


def _schema(file: Path) -> pa.Schema:
    if _is_parquet(file):
        return pq.read_schema(file)
    with pa.memory_map(str(file)) as mapped:
        return pa.ipc.open_stream(mapped).schema


def _outline(kind: pa.DataType) -> dict | None:
    return {one.name: _outline(one.type) for one in kind.fields} if isinstance(kind, pa.StructType) else None


def _values(file: Path, start: int, stop: int, names: list[str]) -> Iterator[dict]:
    """The rows from `start` to `stop`, the end of the file, as dictionaries of the columns `names`."""
    if not names:
        yield from ({} for _ in range(start, stop))
        return
    first, batches = _parquet_batches(file, start, names) if _is_parquet(file) else (0, _arrow_batches(file))
    for batch in batches:
        for place in range(max(start - first, 0), batch.num_rows):
            # one row at a time becomes Python objects: that copies its images
            yield batch.select(names).slice(place, 1).to_pylist()[0]
        first += batch.num_rows


def _arrow_batches(file: Path) -> Iterator[pa.RecordBatch]:
    """Views into the mapped file: what is not looked at is not read."""
    with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
        yield from stream


def _parquet_batches(file: Path, start: int, names: list[str]) -> tuple[int, Iterator[pa.RecordBatch]]:
    """The row that the row group with row `start` begins with, and batches from there on."""
    # Buffered and not read ahead, which a pyarrow.dataset cannot do: else a row group, which may be gigabytes, would
    # be in memory as a whole.
    table = pq.ParquetFile(file, buffer_size=_READ_BYTES, pre_buffer=False)
    ends = np.cumsum([table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)])
    group = int(np.searchsorted(ends, start, side="right"))
    groups = list(range(group, len(ends)))
    return int(ends[group - 1]) if group else 0, table.iter_batches(_PARQUET_BATCH, groups, names, use_threads=False)


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
    unit = "B" if source.unit == "line" else "row"
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
