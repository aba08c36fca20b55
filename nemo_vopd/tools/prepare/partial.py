"""The folder of an unfinished preparation, beside its output: locked, and continued by the same options only."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_vopd.errors import OptionError

_OPTIONS = "options.json"
_TRIES = 100


def partial_path(output: Path) -> Path:
    """Where the unfinished preparation of `output` is kept."""
    return output.with_name(f".{output.name}.partial")


@contextmanager
def partial_folder(output: Path, options: dict[str, object], *, discard: bool) -> Iterator[Path]:
    """The folder for the unfinished parts of `output`, which only this process works in.

    `options` (JSON values) are what the parts depend on. A folder that was left behind is continued when they are
    the same; with others it is refused, or with `discard` begun anew. Waits for another process that is at it. The
    folder goes away when the block ends or raises OptionError; any other end leaves it to be continued.

    Raises OptionError: the first option that differs, or output where it cannot be written.
    """
    folder = partial_path(output)
    lock = _lock(folder, output)
    try:
        _same_options(folder, options, discard)
        try:
            yield folder
        except OptionError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _lock(folder: Path, output: Path) -> int:
    """A descriptor that holds the lock of `folder`, made where it is missing."""
    while True:
        descriptor = _open_lock(folder, output)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prepares {output}", file=sys.stderr, flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:  # network file systems can be mounted without locks
            print(f"no lock on {folder} ({error.strerror}): start one process only", file=sys.stderr, flush=True)
            return descriptor
        try:
            current = os.stat(folder / "lock").st_ino
        except FileNotFoundError:
            current = None
        if current == os.fstat(descriptor).st_ino:
            return descriptor
        os.close(descriptor)  # it was the lock of a folder that is gone


def _open_lock(folder: Path, output: Path) -> int:
    """The lock file of `folder`, both made where they are missing. Raises OptionError (output)."""
    for attempt in range(_TRIES):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            # not found: another process has just finished and removed the folder, or (as in /proc) none can be made
            if not isinstance(error, FileNotFoundError) or attempt == _TRIES - 1:
                raise OptionError("output", output, f"cannot be written ({error})", "choose another place") from None
        time.sleep(0.01)
    raise AssertionError("the last attempt returns or raises")


def _same_options(folder: Path, options: dict[str, object], discard: bool) -> None:
    options = json.loads(json.dumps(options))
    file = folder / _OPTIONS
    if file.is_file():
        begun = json.loads(file.read_text())
        different = [name for name in sorted({*begun, *options}) if begun.get(name) != options.get(name)]
        if not different:
            return
        if not discard:
            name = different[0]
            rule = f"the unfinished preparation {folder} was begun with {_short(begun.get(name))}"
            remedy = "give the same options to continue it, or overwrite=true to begin anew"
            if name == "files":
                where = _short(options.get("source"))
                raise OptionError("source", where, f"has changed since {folder} was begun", "set overwrite=true")
            raise OptionError(name, _short(options.get(name)), rule, remedy)
        print(f"begins anew: {folder} was begun with another {different[0]}")
    for entry in folder.iterdir():
        if entry.name != "lock":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    temporary = folder / f"{_OPTIONS}.{os.getpid()}"
    temporary.write_text(json.dumps(options))
    os.replace(temporary, file)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
