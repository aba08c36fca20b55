"""JSONL files as a source."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nemo_vopd.tools.prepare.columns import Columns
from nemo_vopd.tools.prepare.rows import Chunk, IdLedger, Plan, Row, default_id, mark_duplicates, own_id
from nemo_vopd.views import UnusableSample

MAX_LINE_BYTES = 16 << 20
"""Longer lines are dropped without being held in memory: a file that is no JSONL can be one line."""
_MAX_COLUMNS = 1000


@dataclass(frozen=True)
class JsonlSource:
    """One JSON object a line; image paths are relative to `root`."""

    path: Path
    file: Path
    root: Path
    layout: str = "JSONL"
    tabular: bool = False
    unit: str = "line"

    @property
    def stem(self) -> str:
        """Beginning of the ids of records without one."""
        return self.file.stem

    def files(self) -> list[Path]:
        """The one file."""
        return [self.file]

    def total(self) -> int:
        """Bytes of the file."""
        return self.file.stat().st_size

    def plan(self, chunk_size: int, columns: Columns, advance: Callable[[int], object]) -> Plan:
        """Parse every line once."""
        plan, ledger, last = Plan(), IdLedger(), 0
        unseen = columns.given()
        with open(self.file, "rb") as file:
            for offset, number, line in _lines(file):
                if plan.num_records % chunk_size == 0:
                    plan.chunks.append(Chunk(len(plan.chunks), plan.num_records, 0, offset, number))
                    advance(offset - last)
                    last = offset
                plan.chunks[-1].count += 1
                plan.num_records += 1
                values = _parse(line)
                if isinstance(values, dict):
                    if len(plan.columns) < _MAX_COLUMNS:
                        plan.columns |= values.keys()
                    for field in [field for field in unseen if columns.find(field, values)[0]]:
                        plan.given.add(unseen.pop(field))
                    named = columns.find("id", values)[0]
                    ledger.add(own_id(values, columns) if named else default_id(self.stem, number))
                else:
                    ledger.add(None)
            advance(file.tell() - last)
        mark_duplicates(plan.chunks, ledger)
        return plan

    def rows(self, chunk: Chunk, columns: Columns) -> Iterator[Row]:
        """The lines of `chunk`; what is no JSON object becomes UnusableSample."""
        with open(self.file, "rb") as file:
            file.seek(chunk.offset)
            lines = _lines(file, chunk.number)
            for ordinal in range(chunk.start, chunk.start + chunk.count):
                _, number, line = next(lines)
                yield Row(ordinal, number, _parse(line))


def _lines(file: BinaryIO, first: int = 1) -> Iterator[tuple[int, int, bytes]]:
    """(offset, number, line) of the lines that are not blank; of an overlong one, its first MAX_LINE_BYTES + 1 bytes.

    `file` stands at the start of line `first`.
    """
    offset, number = file.tell(), first
    while line := file.readline(MAX_LINE_BYTES + 1):
        start, piece = offset, line
        offset += len(line)
        while len(piece) > MAX_LINE_BYTES and not piece.endswith(b"\n"):
            piece = file.readline(MAX_LINE_BYTES + 1)
            offset += len(piece)
        if line.strip() or len(line) > MAX_LINE_BYTES:
            yield start, number, line
        number += 1


def _parse(line: bytes) -> dict | UnusableSample:
    if len(line) > MAX_LINE_BYTES:
        return UnusableSample("malformed_record", f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return UnusableSample("malformed_record", f"not JSON: {error}")
    return record if isinstance(record, dict) else UnusableSample("malformed_record", "not a JSON object")
