"""The records of a source as rows: numbered, planned in chunks that can be read independently of each other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from nemo_vopd.data.records import check_id
from nemo_vopd.tools.prepare.columns import Columns
from nemo_vopd.views import UnusableSample


@dataclass
class Row:
    """One record, its images not read yet where it names files."""

    ordinal: int
    """Place among the records of the source, from 0."""
    number: int
    """Line of the file, or row of the table, from 1."""
    values: dict | UnusableSample


@dataclass
class Chunk:
    """Consecutive records, which become one shard (of each split)."""

    index: int
    start: int
    """Ordinal of the first record."""
    count: int
    offset: int = 0
    """Byte of the file at which the first record stands (JSONL)."""
    number: int = 1
    """Its line or row, from 1."""
    duplicates: frozenset[int] = frozenset()
    """Ordinals of records whose id an earlier record has."""


@dataclass
class Plan:
    """What the first pass over a source finds; memory: 16 bytes for each record."""

    chunks: list[Chunk] = field(default_factory=list)
    columns: set[str] = field(default_factory=set)
    given: set[str] = field(default_factory=set)
    """Those of the names that the user gives (`a.b`: inside a struct) that are there."""
    num_records: int = 0


class Source(Protocol):
    """Records on disk. A source is small and can be pickled: workers open it again."""

    @property
    def path(self) -> Path:
        """As the user gave it."""
        ...

    @property
    def root(self) -> Path:
        """Folder that image paths are relative to and must not leave."""
        ...

    @property
    def layout(self) -> str:
        """What it was found to be, for people."""
        ...

    @property
    def tabular(self) -> bool:
        """Typed columns (parquet, arrow), whose images may be bytes."""
        ...

    @property
    def unit(self) -> str:
        """line | row: what `Row.number` counts."""
        ...

    @property
    def stem(self) -> str:
        """Beginning of the ids of records without one."""
        ...

    def files(self) -> list[Path]:
        """The files that hold the records."""
        ...

    def plan(self, chunk_size: int, columns: Columns, advance: Callable[[int], object]) -> Plan:
        """Count the records and find duplicate ids without reading images; `advance` is told bytes or rows done.

        Raises OptionError when a file cannot be read.
        """
        ...

    def total(self) -> int:
        """What the calls of `advance` add up to."""
        ...

    def rows(self, chunk: Chunk, columns: Columns) -> Iterator[Row]:
        """The records of `chunk` in order."""
        ...


class IdLedger:
    """Ids seen so far, 16 bytes each, and which records repeat an earlier one."""

    def __init__(self) -> None:
        self._hashes = bytearray()

    def add(self, sample_id: str | None) -> None:
        """Note the id of the next record; None: it has none that could be repeated."""
        text = f"\0{len(self._hashes)}" if sample_id is None else sample_id
        self._hashes += hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def duplicates(self) -> np.ndarray:
        """Ordinals of the records whose id an earlier one has, ascending."""
        hashes = np.frombuffer(self._hashes, dtype=np.uint64).reshape(-1, 2)
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: of equal ids the first record stays first
        repeated = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
        return np.sort(order[1:][repeated])


def own_id(values: dict, columns: Columns) -> str | None:
    """The id that a record brings along, if it is one. Raises nothing: a wrong id is found when it is checked."""
    try:
        value = columns.find("id", values)[1]
        return None if value is None else check_id(value)
    except UnusableSample:
        return None


def record_id(values: dict, columns: Columns, default: str) -> str:
    """The id of a record; `default` where it has no such field. Raises UnusableSample (malformed_record)."""
    name, value = columns.find("id", values)
    return check_id(value if name else default)


def default_id(stem: str, number: int) -> str:
    """Id of a record that brings none."""
    return f"{stem}-{number:08d}"


def mark_duplicates(chunks: Iterable[Chunk], ledger: IdLedger) -> None:
    """Tell each chunk which of its records are duplicates."""
    duplicates = ledger.duplicates()
    for chunk in chunks:
        low, high = np.searchsorted(duplicates, [chunk.start, chunk.start + chunk.count])
        chunk.duplicates = frozenset(duplicates[low:high].tolist())
