"""Directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_vopd.errors import OptionError


@contextmanager
def whole_directory(output: Path, *, option: str, replace: bool = False) -> Iterator[Path]:
    """A temporary directory beside `output` that takes its name when the block ends without an error.

    `replace` removes an existing `output` first. Raises FileExistsError when `output` exists by then (another
    process was faster) and OptionError, about `option`, when the place cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise OptionError(option, output, f"cannot be written ({error})", "choose another place") from None
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes private directories; ranks of other users read this one
        if replace and output.is_dir():
            shutil.rmtree(output)
        if output.exists():  # rename would silently take the place of an empty directory
            raise FileExistsError(output)
        try:
            os.rename(temporary, output)
        except OSError as error:
            raise FileExistsError(output) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    # the only portable way to read it is to set it
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
