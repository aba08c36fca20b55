"""The folder of checkpoints: complete or not there, the newest found, the oldest deleted, foreign ones refused.

    checkpoints/step-00000010/   manifest.json, state.pt, and Megatron's torch_dist files
    checkpoints/last             link to the newest; NeMo's exp_manager resumes from it

A checkpoint is written under a hidden name and renamed when every rank has finished, so any folder named step-* is
complete, whatever moment a crash chose.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch

from nemo_vopd.errors import OptionError

FORMAT = "nemo_vopd checkpoint 1"
_NAME = re.compile(r"step-\d{8}")
_PARTIAL = ".partial-"


class CheckpointFolder:
    """Names, completeness and age of the checkpoints of one run. Only rank 0 changes anything."""

    def __init__(self, path: Path, keep_last: int) -> None:
        """`keep_last` complete checkpoints stay in `path`."""
        self.path, self.keep_last = Path(path), keep_last

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.path.is_dir():
            return []
        return sorted(p for p in self.path.iterdir() if _NAME.fullmatch(p.name) and (p / "manifest.json").is_file())

    def repair(self) -> None:
        """Clean up after a crash: remove what is not complete and let `last` point at the newest."""
        if not self.path.is_dir():
            return
        for leftover in self.path.iterdir():
            if leftover.name.startswith(_PARTIAL):
                shutil.rmtree(leftover, ignore_errors=True)
        complete = self.complete()
        link = self.path / "last"
        if complete:
            self._point_at(complete[-1])
        elif link.is_symlink():
            link.unlink()

    def set_aside(self) -> Path | None:
        """Give the checkpoints of an earlier run another folder, which is returned; None if there are none."""
        if not self.complete():
            return None
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.previous-{number}")).exists():
            number += 1
        os.rename(self.path, aside)
        return aside

    def begin(self) -> Path:
        """A new hidden folder to write into; its name is never used twice, so a dead run's writers cannot spoil it."""
        partial = self.path / f"{_PARTIAL}{uuid.uuid4().hex}"
        partial.mkdir(parents=True)
        return partial

    def commit(self, partial: Path, manifest: dict[str, Any]) -> Path:
        """Give the finished `partial` its name, point `last` at it, and delete the oldest ones."""
        write_manifest(partial, manifest)
        final = self.path / f"step-{manifest['step']:08d}"
        if final.exists():  # the same step again, after a resume that changed nothing
            shutil.rmtree(final)
        os.rename(partial, final)
        _sync_folder(self.path)
        self._point_at(final)
        while len(self.complete()) > self.keep_last:
            self.drop_oldest()
        return final

    def drop_oldest(self) -> bool:
        """Delete the oldest complete checkpoint, but never the only one; False when there is nothing to delete."""
        complete = self.complete()
        if len(complete) < 2:
            return False
        # out of sight first: a half-deleted checkpoint must not look like one
        doomed = self.path / f"{_PARTIAL}{complete[0].name}"
        os.rename(complete[0], doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        return True

    def _point_at(self, checkpoint: Path) -> None:
        temporary = self.path / ".last"
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        temporary.symlink_to(checkpoint.name)
        os.replace(temporary, self.path / "last")


def write_manifest(partial: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest`, with the format and the size of every file in `partial`, as the last file there."""
    sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    with open(partial / "manifest.json", "w") as file:
        file.write(json.dumps({"format": FORMAT, **manifest, "files": sizes}, indent=1))
        file.flush()
        os.fsync(file.fileno())


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of `checkpoint`. Raises OptionError when the folder is foreign or files are missing or cut off."""
    remedy = "take another checkpoint (a run resumes from the one before when this one is deleted)"
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}, not {FORMAT!r}")
        sizes = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError("checkpoint", checkpoint, f"is not a checkpoint of this program ({error})", remedy) from None
    for name, size in sizes.items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            rule = f"{name} is missing" if found is None else f"{name} has {found} bytes of {size}"
            raise OptionError("checkpoint", checkpoint, f"is damaged: {rule}", remedy)
    return manifest


def write_state(partial: Path, content: dict[str, Any]) -> None:
    """Everything that is not a sharded tensor, as `state.pt`."""
    with open(partial / "state.pt", "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `write_state` wrote: plain values and tensors, nothing that could run (OptionError otherwise)."""
    try:
        return torch.load(checkpoint / "state.pt", weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        rule = f"state.pt cannot be read ({str(error).splitlines()[0]})"
        remedy = "take another checkpoint (a run resumes from the one before when this one is deleted)"
        raise OptionError("checkpoint", checkpoint, rule, remedy) from None


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
