"""The processes that write shards."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from nemo_vopd.errors import RunError
from nemo_vopd.tools.prepare.rows import Chunk
from nemo_vopd.tools.prepare.shards import ShardJob, write_chunk

_REPORT_SECONDS = 0.2
_ENDED = "a process that writes shards ended; give the same command again to continue"
_records: Any = None
"""Shared counter of records, in a process of the pool."""


def write_chunks(
    jobs: Iterable[tuple[ShardJob, Chunk]],
    processes: int,
    advance: Callable[[int], object],
    in_process: bool,
    write: Callable[[ShardJob, Chunk, Callable[[int], object]], None] = write_chunk,
) -> None:
    """Call `write` for all `jobs`, in `processes` processes or, `in_process`, one after the other here.

    `advance` is told how many records are done. Raises OSError when a file cannot be written (disk full), OptionError
    when the source is damaged, RunError when a process ends.
    """
    if in_process:
        for job, chunk in jobs:
            write(job, chunk, advance)
        return
    context = multiprocessing.get_context("spawn")  # forked ones would hold what this process has, torch among it
    records, told, others = context.Value("q", 0), 0, set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, context, _begin, (records,))
    try:
        with _no_main_module():
            waiting = {pool.submit(_write, write, job, chunk) for job, chunk in jobs}
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


def _write(write: Callable, job: ShardJob, chunk: Chunk) -> None:
    write(job, chunk, _count)


def _count(num: int) -> None:
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        os._exit(1)  # the next start has this chunk already
    with _records.get_lock():
        _records.value += num
