"""Parquet files and arrow files (what `save_to_disk` of Hugging Face's `datasets` writes) as a source.

Images stay the bytes that they are in the file: arrow is read directly, nothing decodes them on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_vopd.errors import OptionError
from nemo_vopd.tools.prepare.columns import Columns
from nemo_vopd.tools.prepare.rows import Chunk, IdLedger, Plan, Row, default_id, mark_duplicates, own_id

_PARQUET_BATCH = 8
"""Rows decoded together: with images of megabytes in them, a batch must stay small."""
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class TableSource:
    """The rows of files of one schema, in order."""

    path: Path
    tables: tuple[Path, ...]
    root: Path
    stem: str
    layout: str
    tabular: bool = True
    unit: str = "row"

    def files(self) -> list[Path]:
        """All tables."""
        return list(self.tables)

    def total(self) -> int:
        """Rows of all tables. Raises OptionError when one cannot be read."""
        total = 0
        for table in self.tables:
            with _readable(table):
                total += _num_rows(table)
        return total

    def plan(self, chunk_size: int, columns: Columns, advance: Callable[[int], object]) -> Plan:
        """Read the ids alone."""
        plan, ledger = Plan(), IdLedger()
        for table in self.tables:
            with _readable(table):
                schema = _schema(table)
                names = set(schema.names)
                plan.columns |= names
                plan.given |= {name for name in columns.given().values() if _has(schema, name)}
                for values in _values(table, 0, _num_rows(table), columns.top_level("id") & names):
                    if plan.num_records % chunk_size == 0:
                        start = plan.num_records
                        plan.chunks.append(Chunk(len(plan.chunks), start, 0, number=start + 1))
                    plan.num_records += 1
                    plan.chunks[-1].count += 1
                    named = columns.find("id", values)[0]
                    default = default_id(self.stem, plan.num_records)
                    ledger.add(own_id(values, columns) if named else default)
                    advance(1)
        mark_duplicates(plan.chunks, ledger)
        return plan

    def rows(self, chunk: Chunk, columns: Columns) -> Iterator[Row]:
        """The rows of `chunk`. Raises OptionError when a table is damaged."""
        ordinal, stop, first = chunk.start, chunk.start + chunk.count, 0
        for table in self.tables:
            last = first + _num_rows(table)
            low, high = max(ordinal, first), min(stop, last)
            if low < high:
                wanted = columns.top_level() & set(_schema(table).names)
                values = _values(table, low - first, high - first, wanted)
                for _ in range(low, high):
                    with _readable(table):
                        row = next(values)
                    yield Row(ordinal, ordinal + 1, row)
                    ordinal += 1
            first = last


@contextmanager
def _readable(table: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OptionError("source", table, f"cannot be read ({reason})", "copy the file again") from None


def _is_parquet(table: Path) -> bool:
    return table.suffix == ".parquet"


def _num_rows(table: Path) -> int:
    return _counted(table, table.stat().st_mtime_ns)


@cache
def _counted(table: Path, _mtime_ns: int) -> int:
    if _is_parquet(table):
        with pq.ParquetFile(table) as file:
            return file.metadata.num_rows
    return sum(batch.num_rows for batch in _arrow_batches(table))


def _schema(table: Path) -> pa.Schema:
    if _is_parquet(table):
        with pq.ParquetFile(table) as file:
            return file.schema_arrow
    with pa.memory_map(str(table)) as file:
        return pa.ipc.open_stream(file).schema


def _has(schema: pa.Schema, name: str) -> bool:
    """Whether `name`, whose dots lead into structs, is a column."""
    place: pa.DataType = pa.struct(list(schema))
    for part in name.split("."):
        if not isinstance(place, pa.StructType) or place.get_field_index(part) < 0:
            return False
        place = place.field(part).type
    return True


def _arrow_batches(table: Path) -> Iterator[pa.RecordBatch]:
    """Views into the mapped file: what is not looked at is not read."""
    with pa.memory_map(str(table)) as file, pa.ipc.open_stream(file) as stream:
        yield from stream


def _parquet_batches(table: Path, start: int, stop: int, columns: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(row of the file, batch) of the row groups that hold some of the rows from `start` to `stop`."""
    # buffered and not read ahead: else a row group, which may be gigabytes, would be in memory as a whole
    with pq.ParquetFile(table, buffer_size=_READ_BYTES, pre_buffer=False) as file:
        first = 0
        for group in range(file.num_row_groups):
            last = first + file.metadata.row_group(group).num_rows
            if first < stop and last > start:
                row = first
                for batch in file.iter_batches(_PARQUET_BATCH, [group], columns, use_threads=False):
                    yield row, batch
                    row += batch.num_rows
                    if row >= stop:
                        return
            first = last


def _values(table: Path, start: int, stop: int, columns: set[str]) -> Iterator[dict]:
    """The rows from `start` to `stop` of one file as dictionaries of `columns`."""
    names = sorted(columns)
    if not names:
        yield from ({} for _ in range(start, stop))
        return
    if _is_parquet(table):
        numbered = _parquet_batches(table, start, stop, names)
    else:
        numbered = _numbered(_arrow_batches(table), names)
    for row, batch in numbered:
        for place in range(max(start - row, 0), min(stop - row, batch.num_rows)):
            yield batch.slice(place, 1).to_pylist()[0]
        if row + batch.num_rows >= stop:
            return


def _numbered(batches: Iterator[pa.RecordBatch], names: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    row = 0
    for batch in batches:
        yield row, batch.select(names)
        row += batch.num_rows
