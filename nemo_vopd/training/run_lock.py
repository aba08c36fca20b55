"""One run at a time in a folder: a lock file that lives as long as its process, and is taken over from a dead one."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from nemo_vopd.errors import OptionError

BEAT_SECONDS = 5.0
"""Time between two signs of life of the holder, which are changes of the file's time."""
DEAD_SECONDS = 30.0
"""Time without a sign of life after which a holder on another machine counts as dead."""


class RunLock:
    """The lock of one run's folder, held by the process that writes there (rank 0)."""

    def __init__(self, folder: Path) -> None:
        """Lock `folder`, which exists."""
        self.path = folder / "run.lock"
        self._mine = {**_process(), "token": uuid.uuid4().hex}
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Take the lock, from a dead process if need be.

        Raises OptionError (exp_manager.exp_dir) while a living process holds it.
        """
        while not self._create():
            holder = _read(self.path)
            if holder is not None and not self._is_dead(holder):
                who = f"process {holder.get('pid')} on {holder.get('host')}"
                job = f", job {holder['job']}" if holder.get("job") else ""
                rule = f"is in use by another run ({who}{job})"
                remedy = "wait for its end, or name another folder"
                raise OptionError("exp_manager.exp_dir", self.path.parent, rule, remedy)
            self._remove(holder)
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Give the lock back."""
        self._ended.set()
        if (_read(self.path) or {}).get("token") == self._mine["token"]:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Make the file; False if there is one."""
        try:
            with self.path.open("x") as file:
                file.write(json.dumps(self._mine) + "\n")
            return True
        except FileExistsError:
            return False

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        if all(holder.get(key) == self._mine[key] for key in ("boot", "pid_namespace")):  # this machine can tell
            begun = _started(holder.get("pid"))
            # the clock that start times are read from may be set meanwhile
            return begun is None or abs(begun - float(holder.get("started") or 0)) > 2
        last, end = self._time(), time.monotonic() + DEAD_SECONDS
        print(f"{self.path} is of {holder.get('host')}: looking whether that run is alive", flush=True)
        while time.monotonic() < end:
            time.sleep(BEAT_SECONDS / 5)
            if self._time() != last:
                return False
        return True

    def _time(self) -> int | None:
        """Time of the last sign of life; the file is opened, because network file systems look again only then."""
        try:
            with self.path.open("rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def _remove(self, holder: dict[str, Any] | None) -> None:
        """Take the file of the dead `holder` away, unless another process was faster and has made one of its own."""
        aside = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, aside)
            if holder is not None and _read(aside) != holder:
                os.rename(aside, self.path)
            else:
                aside.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _read(path: Path) -> dict[str, Any] | None:
    """What a lock says; None when it has just gone, {} when it is no lock of this program."""
    try:
        content = json.loads(path.read_bytes())
        return content if isinstance(content, dict) else {}
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _process() -> dict[str, Any]:
    """What tells this process from every other one, on this machine and elsewhere."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else None,
        "pid_namespace": os.stat(namespace).st_ino if namespace.exists() else None,
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
    }


def _started(pid: Any) -> float | None:
    """When process `pid` of this machine was started, in seconds since 1970; None if there is none, or it has ended."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (psutil.Error, TypeError, ValueError):
        return None
