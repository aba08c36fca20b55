"""One chunk of a source to one shard of each split, with a small note beside it: what was kept, dropped and measured.

A record is stored as `<ordinal>.image` (the file's bytes as they are), optionally `<ordinal>.crop`, and
`<ordinal>.json` (id, question, bbox, answer). Everything a later view may need is kept; nothing is resized or
re-encoded.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nemo_vopd.tools.prepare.intake import Prepared, RecordOptions, read_record
from nemo_vopd.tools.prepare.rows import Chunk, Row, Source
from nemo_vopd.tools.prepare.statistics import Statistics
from nemo_vopd.views import UnusableSample


@dataclass(frozen=True)
class ShardJob:
    """What `write_chunk` needs; can be pickled."""

    source: Source
    options: RecordOptions
    prefix: str
    """Beginning of the ids, by which the sources of a blend are told apart."""
    folders: dict[str, Path]
    """Split -> where its shards go; the folders exist."""
    notes: Path
    """Folder of the notes."""
    scratch: Path
    """Where files lie until they are whole: on the same file system."""
    threads: int


class ShardWriter:
    """A tar file (USTAR, no times, no owners) whose hash is known when it is closed. Takes its name last."""

    def __init__(self, path: Path, scratch: Path) -> None:
        self.path, self.num_records, self.num_bytes = path, 0, 0
        self._temporary = scratch / f"{os.getpid()}-{uuid.uuid4().hex}.tar"
        self._file = open(self._temporary, "wb")
        self._hash = hashlib.sha256()

    def add(self, key: str, record: Prepared) -> None:
        """Append the parts of `record`."""
        meta = {"id": record.id, "question": record.question, "bbox": record.bbox, "answer": record.answer}
        parts = {"image": record.image, "crop": record.crop, "json": json.dumps(meta, ensure_ascii=False).encode()}
        for name, data in parts.items():
            if data is not None:
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size, info.mode = len(data), 0o644
                self._write(info.tobuf(tarfile.USTAR_FORMAT))
                self._write(data)
                self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        self.num_records += 1

    def finish(self) -> dict:
        """Close the file, without its name yet; {"shard", "records", "bytes", "sha256"}."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self.num_bytes + end) % tarfile.RECORDSIZE))
        self._file.close()
        entry = {"shard": self.path.name, "records": self.num_records, "bytes": self.num_bytes}
        return {**entry, "sha256": self._hash.hexdigest()}

    def commit(self) -> None:
        """Take the name."""
        os.replace(self._temporary, self.path)

    def discard(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)


def note_path(notes: Path, index: int) -> Path:
    """The note of chunk `index`; where it is, the chunk is done."""
    return notes / f"{index:06d}.json"


def write_chunk(job: ShardJob, chunk: Chunk, advance: Callable[[int], object]) -> None:
    """Read, check and write the records of `chunk`; `advance` is told of records done.

    Leaves shards (none of a split without records) and the note, each under its name only when whole.
    """
    name = f"shard-{chunk.index:06d}.tar"
    writers: dict[str, ShardWriter] = {}
    note = Statistics()
    try:
        for row, result in _checked(job, chunk):
            if isinstance(result, UnusableSample):
                note.drop(f"{job.source.unit} {row.number}", result)
            else:
                note.keep(result)
                if result.split not in writers:
                    writers[result.split] = ShardWriter(job.folders[result.split] / name, job.scratch)
                writers[result.split].add(f"{row.ordinal:09d}", result)
            advance(1)
        note.shards = {split: [writer.finish()] for split, writer in writers.items()}
        advance(0)  # a worker whose parent is gone ends here, and gives no file its name
        for writer in writers.values():
            writer.commit()
    finally:
        for writer in writers.values():
            writer.discard()
    target = note_path(job.notes, chunk.index)
    temporary = job.scratch / f"{os.getpid()}-{target.name}"
    temporary.write_text(note.to_json())
    os.replace(temporary, target)


def _checked(job: ShardJob, chunk: Chunk) -> Iterator[tuple[Row, Prepared | UnusableSample]]:
    """The records in order, a few of them read ahead by threads: decoding releases the interpreter lock."""
    source, options = job.source, job.options

    def check(row: Row) -> Prepared | UnusableSample:
        try:
            if row.ordinal in chunk.duplicates:
                raise UnusableSample("duplicate_id", "an earlier record has the same id")
            return read_record(row, source, options, job.prefix)
        except UnusableSample as unusable:
            return unusable

    if job.threads == 1:
        for row in source.rows(chunk, options.columns):
            yield row, check(row)
        return
    waiting: deque[tuple[Row, Future]] = deque()
    with ThreadPoolExecutor(job.threads) as pool:
        for row in source.rows(chunk, options.columns):
            waiting.append((row, pool.submit(check, row)))
            if len(waiting) > 2 * job.threads:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()


def note_is_good(notes: Path, index: int, folders: dict[str, Path]) -> bool:
    """Whether chunk `index` is done: its note is there, and the shards it names with their sizes."""
    try:
        entries = json.loads(note_path(notes, index).read_bytes())["shards"]
        return all((folders[s] / e["shard"]).stat().st_size == e["bytes"] for s, (e,) in entries.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False
