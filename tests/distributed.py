"""Run a function in several processes with real Megatron-Core on gloo.

Processes are forked from a server that has imported the package once, so a case costs a fraction of a second, not
the ten seconds of the imports. Each group has a time limit and is ended by its own process ids.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preload"])


def start_distributed(function: Callable, world_size: int, *args: Any, results: Any = None) -> list[Any]:
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
        process.start()
        process.results = results  # its semaphores live as long as this process knows the queue
    return ranks


def run_distributed(function: Callable, world_size: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """Call `function(*args)` on ranks 0 .. world_size-1 and return their results in the order of the ranks.

    `function` is a top-level function of an importable module; results are pickled. An exception in any rank
    raises here with that rank's traceback; after `timeout` seconds the group is killed and TimeoutError raised.
    """
    results = _CONTEXT.Queue()
    ranks = start_distributed(function, world_size, *args, results=results)
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
        for process in ranks:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
    return [outcome[rank] for rank in range(world_size)]


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
