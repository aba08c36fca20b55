"""Folders that appear whole or not at all, and the one beside an output in which an unfinished preparation is kept."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_vopd.errors import OptionError

_OPTIONS = "options.json"
_TRIES = 100


@contextmanager
def whole_directory(output: Path) -> Iterator[Path]:
    """A temporary directory beside `output` that takes its name when the block ends without an error.

    Raises FileExistsError when `output` exists by then (another process was faster) and OptionError (output) when it
    exists already or the place cannot be written.
    """
    if output.exists():
        raise OptionError("output", output, "exists", "choose another directory or remove it")
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise _not_writable(output, error) from None
    try:
        yield temporary
        if output.exists():  # rename would silently take the place of an empty directory
            raise FileExistsError(output)
        try:
            os.rename(temporary, output)
        except OSError as error:
            raise FileExistsError(output) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _not_writable(output: Path, error: OSError) -> OptionError:
    return OptionError("output", output, f"cannot be written ({error})", "choose another place")


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
    """A descriptor that holds the lock of `folder`, both made where they are missing. Raises OptionError (output)."""
    failures = 0
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            # not found: another process has just finished and removed the folder, or (as in /proc) none can be made
            failures += 1
            if not isinstance(error, FileNotFoundError) or failures == _TRIES:
                raise _not_writable(output, error) from None
            time.sleep(0.01)
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prepares {output}", file=sys.stderr, flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:  # network file systems can be mounted without locks
            print(f"no lock on {folder} ({error.strerror}): start one process only", file=sys.stderr, flush=True)
            return descriptor
        try:
            if os.stat(folder / "lock").st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # it was the lock of a folder that is gone


def _same_options(folder: Path, options: dict[str, object], discard: bool) -> None:
    file = folder / _OPTIONS
    if file.is_file():
        begun = json.loads(file.read_text())
        different = [name for name in sorted({*begun, *options}) if begun.get(name) != options.get(name)]
        if not different:
            return
        name = different[0]
        if not discard and name == "files":
            where = _short(options.get("source"))
            raise OptionError("source", where, f"has changed since {folder} was begun", "set overwrite=true")
        if not discard:
            rule = f"the unfinished preparation {folder} was begun with {_short(begun.get(name))}"
            remedy = "give the same options to continue it, or overwrite=true to begin anew"
            raise OptionError(name, _short(options.get(name)), rule, remedy)
        print(f"begins anew: {folder} was begun with another {name}")
    for entry in folder.iterdir():
        if entry.name != "lock":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    temporary = folder / f"{_OPTIONS}.{os.getpid()}"
    temporary.write_text(json.dumps(options))
    os.replace(temporary, file)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
