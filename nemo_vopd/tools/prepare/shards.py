"""Chunks of a source to shards, in processes: from each chunk one shard of each split, and a note of what was kept.

A record is stored as `<place>.image` (the file's bytes as they are), optionally `<place>.crop`, and `<place>.json`
(id, question, bbox, answer). Everything a later view may need is kept; nothing is resized or re-encoded.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import sys
import tarfile
import threading
import types
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_vopd.errors import RunError
from nemo_vopd.tools.prepare.index import sha256
from nemo_vopd.tools.prepare.intake import Prepared, read_record
from nemo_vopd.tools.prepare.options import PrepareOptions
from nemo_vopd.tools.prepare.rows import Chunk, Row, Source
from nemo_vopd.tools.prepare.statistics import Statistics
from nemo_vopd.views import UnusableSample

_REPORT_SECONDS = 0.2
_ENDED = "a process that writes shards ended; give the same command again to continue"
_records: Any = None
"""Shared counter of records, in a process of the pool."""


@dataclass(frozen=True)
class ShardJob:
    """What `write_chunk` needs; can be pickled."""

    source: Source
    chunk: Chunk
    options: PrepareOptions
    prefix: str
    """Beginning of the ids, by which the sources of a blend are told apart."""
    folders: dict[str, Path]
    """Split -> where its shards go; the folders exist."""
    notes: Path
    """Folder of the notes."""
    scratch: Path
    """Where files lie until they are whole: on the same file system."""

    @property
    def note(self) -> Path:
        """The note of the chunk; where it is, the chunk is done."""
        return self.notes / f"{self.chunk.index:06d}.json"

    def is_done(self) -> bool:
        """Whether the note is there, and the shards it names with their sizes."""
        try:
            entries = json.loads(self.note.read_bytes())["shards"]
            return all((self.folders[s] / e["shard"]).stat().st_size == e["bytes"] for s, (e,) in entries.items())
        except (OSError, ValueError, KeyError, TypeError):
            return False


class ShardWriter:
    """A tar file (USTAR, no times, no owners) that takes its name when it is whole."""

    def __init__(self, path: Path, scratch: Path) -> None:
        self._path, self._num_records = path, 0
        self._temporary = scratch / f"{os.getpid()}-{uuid.uuid4().hex}.tar"
        self._tar = tarfile.open(self._temporary, "w", format=tarfile.USTAR_FORMAT)

    def add(self, key: str, record: Prepared) -> None:
        """Append the parts of `record`."""
        meta = {"id": record.id, "question": record.question, "bbox": record.bbox, "answer": record.answer}
        parts = {"image": record.image, "crop": record.crop, "json": json.dumps(meta, ensure_ascii=False).encode()}
        for name, data in parts.items():
            if data is not None:
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(data)
                self._tar.addfile(info, io.BytesIO(data))
        self._num_records += 1

    def finish(self) -> dict:
        """Close the file and give it its name; {"shard", "records", "bytes", "sha256"}."""
        self._tar.close()
        entry = {"shard": self._path.name, "records": self._num_records, "bytes": self._temporary.stat().st_size}
        digest = sha256(self._temporary)
        os.replace(self._temporary, self._path)
        return {**entry, "sha256": digest}


def write_chunk(job: ShardJob, threads: int, advance: Callable[[int], object]) -> None:
    """Read, check and write the records of the chunk with `threads`; `advance` is told of records done.

    Leaves shards (none of a split without records) and the note, each under its name only when whole.
    """
    name = f"shard-{job.chunk.index:06d}.tar"
    writers: dict[str, ShardWriter] = {}
    note = Statistics()
    for place, row, result in _checked(job, threads):
        if isinstance(result, UnusableSample):
            note.drop(f"{job.source.unit} {row.number}", result)
        else:
            note.keep(result)
            if result.split not in writers:
                writers[result.split] = ShardWriter(job.folders[result.split] / name, job.scratch)
            writers[result.split].add(f"{place:09d}", result)
        advance(1)
    note.shards = {split: [writer.finish()] for split, writer in writers.items()}
    temporary = job.scratch / f"{os.getpid()}-{job.note.name}"
    temporary.write_text(note.to_json())
    os.replace(temporary, job.note)


def _checked(job: ShardJob, threads: int) -> Iterator[tuple[int, Row, Prepared | UnusableSample]]:
    """The records in order, a few of them read ahead by threads: decoding releases the interpreter lock."""

    def check(place: int, row: Row) -> Prepared | UnusableSample:
        try:
            if place in job.chunk.duplicates:
                raise UnusableSample("duplicate_id", "an earlier record has the same id")
            return read_record(row, job.source, job.options, job.prefix)
        except UnusableSample as unusable:
            return unusable

    waiting: deque[tuple[int, Row, Future]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for place, row in job.source.chunk_rows(job.chunk, job.options.columns):
            waiting.append((place, row, pool.submit(check, place, row)))
            if len(waiting) > 2 * threads:
                done, its_row, future = waiting.popleft()
                yield done, its_row, future.result()
        for done, its_row, future in waiting:
            yield done, its_row, future.result()


def write_chunks(
    jobs: Sequence[ShardJob],
    workers: int,
    advance: Callable[[int], object],
    write: Callable[[ShardJob, int, Callable[[int], object]], None] = write_chunk,
) -> None:
    """Call `write` for all `jobs` in as many processes as there are `workers`; where jobs are few, these use threads.

    `advance` is told how many records are done. Raises OSError when a file cannot be written (disk full), OptionError
    when the source is damaged, RunError when a process ends.
    """
    processes = min(workers, len(jobs))
    if processes <= 1:  # a process that would have to be started does no better than this one
        for job in jobs:
            write(job, workers, advance)
        return
    context = multiprocessing.get_context("spawn")  # forked ones would hold what this process has, torch among it
    records, told, others = context.Value("q", 0), 0, set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, context, _begin, (records,))
    try:
        with _no_main_module():
            waiting = {pool.submit(_write, write, job, workers // processes) for job in jobs}
        while waiting:
            done, waiting = wait(waiting, _REPORT_SECONDS, FIRST_EXCEPTION)
            now = records.value
            advance(now - told)
            told = now
            if errors := [error for error in (future.exception() for future in done) if error is not None]:
                # a process that ended breaks the pool, and another may have had a reason to tell just before
                raise next((e for e in errors if not isinstance(e, BrokenProcessPool)), RunError(_ENDED))
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # a shard under way is left to the next start
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Hide the main module: spawned processes would import it again, which is a recipe with all that it imports."""
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _begin(records: Any) -> None:
    """Set a new process up: Ctrl-C is for the parent, and without a parent this process ends."""
    global _records
    _records = records
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _write(write: Callable, job: ShardJob, threads: int) -> None:
    write(job, threads, _count)


def _count(num: int) -> None:
    with _records.get_lock():
        _records.value += num
