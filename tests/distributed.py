"""Run functions and recipes in processes of their own, with real Megatron-Core on gloo.

Processes are forked from a server that has imported the package once, so a case costs a fraction of a second, not the
ten seconds of the imports, and a fault in one case cannot reach the next. There is a server for each module that is
to be imported (`preload`). Each group has a time limit, which is there for hangs and not for slow machines, and is
ended by its own process ids.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import queue
import resource
import runpy
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
HANG = 900.0
"""Seconds after which a process counts as hung; even a busy machine needs a tenth of that."""

_CONTEXT = multiprocessing.get_context("forkserver")
_SERVERS: dict[str, forkserver.ForkServer] = {}


def _start(process: Any, preload: str) -> None:
    """Start `process` from the server of `preload`; multiprocessing by itself has one server for all."""
    if preload not in _SERVERS:
        _SERVERS[preload] = forkserver.ForkServer()
        _SERVERS[preload].set_forkserver_preload([preload])
    with mock.patch.object(forkserver, "connect_to_new_process", _SERVERS[preload].connect_to_new_process):
        process.start()


def start_distributed(
    function: Callable, world_size: int, *args: Any, results: Any = None, preload: str = "tests.preload"
) -> list[Any]:
    """Start `function(*args)` on ranks 0 .. world_size-1 and return the processes, for tests that end them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = results or _CONTEXT.Queue()
    # not daemonic: loaders and checkpoint writers are child processes
    ranks = [
        _CONTEXT.Process(target=_rank, args=(function, args, rank, world_size, port, results))
        for rank in range(world_size)
    ]
    for process in ranks:
        _start(process, preload)
        process.results = results  # its semaphores live as long as this process knows the queue
    return ranks


def run_distributed(
    function: Callable, world_size: int, *args: Any, timeout: float = HANG, preload: str = "tests.preload"
) -> list[Any]:
    """Call `function(*args)` on ranks 0 .. world_size-1 and return their results in the order of the ranks.

    `function` is a top-level function of an importable module; results are pickled. An exception in any rank
    raises here with that rank's traceback; after `timeout` seconds the group is killed and TimeoutError raised.
    """
    results = _CONTEXT.Queue()
    ranks = start_distributed(function, world_size, *args, results=results, preload=preload)
    outcome: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(outcome) < world_size:
            try:
                rank, value, error = results.get(timeout=1)
            except queue.Empty:
                dead = [r for r, p in enumerate(ranks) if p.exitcode not in (None, 0) and r not in outcome]
                if dead:
                    raise RuntimeError(f"rank {dead[0]} ended with code {ranks[dead[0]].exitcode}") from None
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__} on {world_size} ranks took over {timeout} s") from None
                continue
            if error is not None:
                raise RuntimeError(f"rank {rank}:\n{error}")
            outcome[rank] = pickle.loads(value)
    finally:
        _end(ranks, patience=5)
    return [outcome[rank] for rank in range(world_size)]


@dataclass
class Finished:
    """What a recipe left behind."""

    returncode: int
    """That of the first rank that failed, else 0."""
    stdout: str
    stderr: str
    peak_gib: float
    """Largest resident memory of a rank."""


def run_recipe(
    script: str, *arguments: str, nproc: int = 1, cwd: Path = ROOT, timeout: float = HANG, **environment: str
) -> Finished:
    """Run `python script arguments` as its own program, or `nproc` of them with the variables that torchrun sets.

    A rank that fails ends the others, as torchrun would.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = start_distributed(_recipe, nproc, script, arguments, str(cwd), environment, folder)
        deadline, codes = time.monotonic() + timeout, [None] * nproc
        try:
            while None in codes and not any(codes):
                time.sleep(0.02)
                codes = [rank.exitcode for rank in ranks]
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{script} {' '.join(arguments)} took over {timeout} s")
        finally:
            _end(ranks, patience=3)
        out, err, peak = (
            [(Path(folder) / f"{rank}.{name}").read_text() for rank in range(nproc)] for name in ("out", "err", "peak")
        )
        code = next((code for code in codes if code), 0)
        return Finished(code, "".join(out), "".join(err), max(float(kib or 0) for kib in peak) / 2**20)


def _recipe(script: str, arguments: tuple[str, ...], cwd: str, environment: dict[str, str], folder: str) -> None:
    """What `python script arguments` does, in a process that has the imports already."""
    rank = os.environ["RANK"]
    for number, name in enumerate(("out", "err"), 1):
        file = os.open(f"{folder}/{rank}.{name}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, number)
    peak = open(f"{folder}/{rank}.peak", "w")
    if os.environ["WORLD_SIZE"] == "1":  # a program that nobody launched has none of these
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv[:] = [script, *arguments]
    code: Any = 0
    try:
        runpy.run_path(str(Path(ROOT, script)), run_name="__main__")
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    peak.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    peak.close()
    os._exit(code or 0)


def _end(ranks: list[Any], patience: float) -> None:
    """Wait a little for the processes to end, then kill them."""
    deadline = time.monotonic() + patience
    for process in ranks:
        process.join(timeout=max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _rank(function: Callable, args: tuple, rank: int, world_size: int, port: int, results: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    torch.set_num_threads(1)
    try:
        # pickled by value: torch would share tensors through file descriptors that end with this process
        results.put((rank, pickle.dumps(function(*args)), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()
    # skip interpreter exit: gloo's threads may wait for ranks that have gone already
    os._exit(0)
