"""A process that writes shards, and the pool of them.

Jobs come in on standard input and progress goes out on standard output, one JSON value a line. A process of its own
command imports what a shard needs and no more (a forked or spawned one would hold or import what its parent has, torch
and Megatron among it), and one whose parent was killed finds its pipe closed and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import Empty, SimpleQueue

from nemo_vopd.errors import OptionError, RunError
from nemo_vopd.tools.prepare.rows import Chunk
from nemo_vopd.tools.prepare.shards import ShardJob, write_chunk

_REPORT_SECONDS = 0.2
_ENDED = "a process that writes shards ended; give the same command again to continue"


def write_chunks(
    jobs: Iterable[tuple[ShardJob, Chunk]], processes: int, advance: Callable[[int], object], in_process: bool
) -> None:
    """`write_chunk` of all `jobs`, by `processes` processes or, `in_process`, one after the other here.

    Raises OSError when a file cannot be written (disk full), OptionError when the source is damaged, RunError when a
    worker dies.
    """
    if in_process:
        for job, chunk in jobs:
            write_chunk(job, chunk, advance)
        return
    queue: SimpleQueue[tuple[ShardJob, Chunk]] = SimpleQueue()
    for item in jobs:
        queue.put(item)
    errors: list[Exception] = []  # in order of time
    pool = [_Worker(queue, advance, errors) for _ in range(processes)]
    try:
        for worker in pool:
            worker.start()
        while any(worker.is_alive() for worker in pool):
            # short waits: a Ctrl-C must get through, and the first failure ends all
            for worker in pool:
                worker.join(0.05)
            if errors:
                break
    finally:
        for worker in pool:
            worker.stop()
    if errors:
        # ending the others makes errors of its own, and one may have had a reason to tell just before
        raise next((error for error in errors if not isinstance(error, RunError)), errors[0])


class _Worker(threading.Thread):
    """Feeds one process and listens to it."""

    def __init__(
        self, queue: SimpleQueue[tuple[ShardJob, Chunk]], advance: Callable[[int], object], errors: list[Exception]
    ) -> None:
        super().__init__(daemon=True)
        self._queue, self._advance, self._errors = queue, advance, errors
        package = str(Path(__file__).resolve().parents[3])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [package, os.getenv("PYTHONPATH")]))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nemo_vopd.tools.prepare.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which then ends this process
        )

    def run(self) -> None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            while True:
                try:
                    item = self._queue.get_nowait()
                except Empty:
                    return
                data = pickle.dumps(item)
                # where the process has ended, what it said before is still to be read
                with contextlib.suppress(BrokenPipeError):
                    stdin.write(len(data).to_bytes(8, "big") + data)
                    stdin.flush()
                while True:
                    line = stdout.readline()
                    if not line:
                        raise RunError(_ENDED)
                    report = json.loads(line)
                    if "error" in report:
                        number, text = report["error"]
                        raise OSError(number, text)
                    if "refused" in report:
                        raise OptionError(*report["refused"])
                    if "done" in report:
                        break
                    self._advance(report["advance"])
        except Exception as error:  # told by the main thread
            self._errors.append(error)

    def stop(self) -> None:
        """End the process; a shard it is at is left to the next start."""
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Serve one parent until it closes standard input."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library that prints must not break the protocol

    while header := sys.stdin.buffer.read(8):
        job, chunk = pickle.loads(sys.stdin.buffer.read(int.from_bytes(header, "big")))
        report = _Reporter(lambda count: print(json.dumps({"advance": count}), file=out))
        try:
            write_chunk(job, chunk, report)
        except BrokenPipeError:
            return
        except OSError as error:
            print(json.dumps({"error": [error.errno, error.strerror]}), file=out)
            continue
        except OptionError as error:
            refused = [error.option, str(error.value), error.rule, error.remedy]
            print(json.dumps({"refused": refused}), file=out)
            continue
        report.flush()
        print(json.dumps({"done": chunk.index}), file=out)


class _Reporter:
    """Gathers progress and passes it on a few times a second."""

    def __init__(self, send: Callable[[int], object]) -> None:
        self._send, self._count, self._last = send, 0, time.monotonic()

    def __call__(self, count: int) -> None:
        self._count += count
        if count == 0 or time.monotonic() - self._last > _REPORT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send what has gathered."""
        self._send(self._count)
        self._count, self._last = 0, time.monotonic()


if __name__ == "__main__":
    main()
