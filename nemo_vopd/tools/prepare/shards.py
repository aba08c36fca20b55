"""Chunks of a source to shards, in processes: from each chunk one shard of each split, and a note of what was kept.

A record is stored as `<place>.image` (the file's bytes as they are), optionally `<place>.crop`, and `<place>.json`
(id, question, bbox, answer). Everything a later view may need is kept; nothing is resized or re-encoded.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import signal
import sys
import tarfile
import threading
import types
import uuid
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import batched
from pathlib import Path
from typing import Any

from nemo_vopd.errors import RunError
from nemo_vopd.images import UnusableSample
from nemo_vopd.tools.prepare.index import sha256
from nemo_vopd.tools.prepare.intake import TRAITS, Prepared, read_record
from nemo_vopd.tools.prepare.options import PrepareOptions
from nemo_vopd.tools.prepare.rows import Chunk, Row, Source

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
    crop: dict[str, Any] | None = None
    """Options of `crop_box` by which crops are judged."""

    @property
    def note(self) -> Path:
        """The note of the chunk; where it is, the chunk is done."""
        return self.notes / f"{self.chunk.index:06d}.json"

    @property
    def dropped(self) -> Path:
        """A line for each record of the chunk that is dropped, in order."""
        return self.notes / f"{self.chunk.index:06d}.dropped.jsonl"

    def is_done(self) -> bool:
        """Whether the note is there, and the shards it names with their sizes."""
        try:
            entries = json.loads(self.note.read_bytes())["shards"]
            return all((self.folders[s] / e["shard"]).stat().st_size == e["bytes"] for s, (e,) in entries.items())
        except (OSError, ValueError, KeyError, TypeError):
            return False


@dataclass
class Statistics:
    """What was kept, dropped and measured: in one chunk, in a source, or in several."""

    shards: dict[str, list[dict]] = field(default_factory=dict)
    """Split -> {"shard", "records", "bytes", "sha256"} of each shard."""
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """Reason -> the first record that was dropped for it."""
    having: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TRAITS, 0))
    """Number of records with each trait."""
    megapixels: array[float] = field(default_factory=lambda: array("d"))
    relative_area: array[float] = field(default_factory=lambda: array("d"))

    @property
    def kept(self) -> int:
        """Records that were stored."""
        return sum(self.splits().values())

    def splits(self) -> dict[str, int]:
        """Records of each split."""
        return {name: sum(entry["records"] for entry in entries) for name, entries in sorted(self.shards.items())}

    def drop(self, place: str, unusable: UnusableSample) -> None:
        """Count the record at `place`, which cannot be used."""
        self.dropped[unusable.reason] += 1
        self.examples.setdefault(unusable.reason, f"{place}: {unusable.detail or unusable.reason}"[:200])

    def keep(self, record: Prepared) -> None:
        """Count a record that is stored."""
        for trait in record.traits:
            self.having[trait] += 1
        self.megapixels.append(float(f"{math.prod(record.facts.size) / 1e6:.6g}"))
        area = record.relative_area()
        if area is not None:
            self.relative_area.append(float(f"{area:.6g}"))

    def add(self, later: Statistics) -> None:
        """Add what comes later in the order of the records: of the examples, the earlier ones stay."""
        for split, entries in later.shards.items():
            self.shards.setdefault(split, []).extend(entries)
        self.dropped.update(later.dropped)
        self.examples = {**later.examples, **self.examples}
        self.having = {name: count + later.having[name] for name, count in self.having.items()}
        self.megapixels.extend(later.megapixels)
        self.relative_area.extend(later.relative_area)


def total(parts: Iterable[Statistics]) -> Statistics:
    """The sum of `parts`, given in order."""
    whole = Statistics()
    for part in parts:
        whole.add(part)
    return whole


def write_chunk(job: ShardJob, threads: int, advance: Callable[[int], object]) -> None:
    """Read, check and write the records of the chunk with `threads`; `advance` is told of records done.

    Leaves shards (none of a split without records) and the note, each under its name only when whole.
    """
    tars: dict[str, tarfile.TarFile] = {}
    note, dropped = Statistics(), []
    for (place, row), result in _checked(job, threads):
        if isinstance(result, UnusableSample):
            note.drop(f"{job.source.unit} {row.number}", result)
            place_of = {"source": str(job.source.path), job.source.unit: row.number}
            dropped.append(json.dumps({**place_of, "reason": result.reason, "detail": result.detail}) + "\n")
        else:
            note.keep(result)
            if result.split not in tars:
                path = job.scratch / f"{uuid.uuid4().hex}.tar"
                tars[result.split] = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)
            _add(tars[result.split], f"{place:09d}", result)
        advance(1)
    for split, tar in tars.items():
        num_records = sum(name.endswith(".json") for name in tar.getnames())
        tar.close()
        path = Path(str(tar.name))
        entry = {"shard": f"shard-{job.chunk.index:06d}.tar", "records": num_records, "bytes": path.stat().st_size}
        note.shards[split] = [{**entry, "sha256": sha256(path)}]
        os.replace(path, job.folders[split] / entry["shard"])
    temporary = job.scratch / f"{uuid.uuid4().hex}.json"
    job.dropped.write_text("".join(dropped))
    temporary.write_text(json.dumps(vars(note), default=list))
    os.replace(temporary, job.note)


def _add(tar: tarfile.TarFile, key: str, record: Prepared) -> None:
    """Append the parts of `record`; without times and owners, which would make the same data other bytes."""
    answer = record.answers if len(record.answers) > 1 else next(iter(record.answers), None)
    meta = {"id": record.id, "question": record.question, "bbox": record.bbox, "answer": answer}
    parts = {"image": record.image, "crop": record.crop, "json": json.dumps(meta, ensure_ascii=False).encode()}
    for name, data in parts.items():
        if data is not None:
            info = tarfile.TarInfo(f"{key}.{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _checked(job: ShardJob, threads: int) -> Iterator[tuple[tuple[int, Row], Prepared | UnusableSample]]:
    """The records in order, a few of them checked at once: decoding releases the interpreter lock."""

    def check(record: tuple[int, Row]) -> Prepared | UnusableSample:
        place, row = record
        try:
            if place in job.chunk.duplicates:
                raise UnusableSample("duplicate_id", "an earlier record has the same id")
            return read_record(row, job.source, job.options, job.prefix, job.crop)
        except UnusableSample as unusable:
            return unusable

    with ThreadPoolExecutor(threads) as pool:
        for records in batched(job.source.chunk_rows(job.chunk, job.options.columns), 4 * threads):
            yield from zip(records, pool.map(check, records), strict=True)


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
    # spawned processes import the main module again, which is a recipe with all that it imports
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        waiting = {pool.submit(_write, write, job, workers // processes) for job in jobs}
    finally:
        sys.modules["__main__"] = main
    started = set(multiprocessing.active_children()) - others
    try:
        while waiting:
            # the pool watches the processes it knew when it last woke up, so it can miss the end of the newest one
            all_alive = all(process.is_alive() for process in started)
            done, waiting = wait(waiting, _REPORT_SECONDS, FIRST_EXCEPTION)
            now = records.get_obj().value  # without its lock, which a process that was killed may hold
            advance(now - told)
            told = now
            if errors := [error for error in (future.exception() for future in done) if error is not None]:
                # a process that ended breaks the pool, and another may have had a reason to tell just before
                raise next((e for e in errors if not isinstance(e, BrokenProcessPool)), RunError(_ENDED))
            if waiting and not all_alive:
                raise RunError(_ENDED)
    finally:
        for process in started:
            process.kill()  # a shard under way is left to the next start
        pool.shutdown(cancel_futures=True)


def _begin(records: Any) -> None:
    """Set a new process up: Ctrl-C is for the parent, and without a parent this process ends."""
    global _records
    _records = records
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _write(write: Callable, job: ShardJob, threads: int) -> None:
    def count(num: int) -> None:
        with _records.get_lock():
            _records.value += num

    write(job, threads, count)
