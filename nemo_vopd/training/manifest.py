"""The folder of checkpoints: complete or not there, the newest found, the oldest deleted, foreign ones refused.

    checkpoints/step-00000010/   manifest.json, state.pt, and Megatron's torch_dist files
    checkpoints/last             link to the newest; NeMo's exp_manager resumes from it

A checkpoint is written under a hidden name and renamed when every rank has finished, so any folder named step-* is
complete, whatever moment a crash chose.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_vopd.errors import OptionError
from nemo_vopd.watchdog import beat

FORMAT = "nemo_vopd checkpoint 1"
_NAME = re.compile(r"step-\d{8}")
_PARTIAL = ".partial-"
_HASHED_AT_ONCE = 4
_REMEDY = "take another checkpoint (a run resumes from the one before when this one is deleted)"


def step_of(checkpoint: Path) -> int:
    """Number of steps before a complete `checkpoint` was written."""
    return int(checkpoint.name.removeprefix("step-"))


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

    def commit(self, partial: Path, manifest: dict[str, Any], digests: dict[str, str]) -> Path:
        """Give the finished `partial` its name, point `last` at it, and delete the oldest ones."""
        write_manifest(partial, manifest, digests)
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
        link = self.path / "last"
        if link.is_dir() and not link.is_symlink():
            rule = "is a folder where the link to the newest checkpoint belongs"
            raise OptionError("exp_manager.exp_dir", link, rule, "rename it: step-NNNNNNNN if it is a checkpoint")
        os.replace(temporary, link)


def own_digests(partial: Path) -> list[tuple[str, str]]:
    """(name, SHA-256) of the files that this rank wrote into `partial`: fresh, they are read from memory.

    Megatron puts the rank of the writer into the names of its files; rank 0 wrote those without one.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    return list(_digests([file for file in sorted(partial.iterdir()) if _writer(file.name) == rank]).items())


def check_digests(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Read every file once, each by one rank, and compare it with what was written. Raises OptionError; collective.

    In the layout of the save each rank reads the files it is about to load.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    digests = manifest.get("sha256", {})  # version 0.1 wrote none
    found = _digests([checkpoint / name for name in sorted(digests) if _writer(name) % size == rank])
    wrong = [name for name, digest in found.items() if digest != digests[name]]
    if size > 1:
        gathered: list = [None] * size
        dist.all_gather_object(gathered, wrong)
        wrong = [name for names in gathered for name in names]
    if wrong:
        raise OptionError("checkpoint", checkpoint, f"is damaged: {wrong[0]} is not what was written", _REMEDY)


def _digests(files: list[Path]) -> dict[str, str]:
    """Name -> SHA-256 of `files`, several at a time: hashing releases the interpreter lock."""

    def digest(file: Path) -> str:
        beat()
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        return dict(zip((file.name for file in files), pool.map(digest, files), strict=True))


def _writer(name: str) -> int:
    """The rank that wrote the file `name` of a checkpoint."""
    found = re.fullmatch(r"__(\d+)_\d+\.distcp", name)
    return int(found[1]) if found else 0


def write_manifest(partial: Path, manifest: dict[str, Any], digests: dict[str, str]) -> None:
    """Write `manifest`, with the format, size and digest of every file in `partial`, as the last file there."""
    sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    assert sizes.keys() == digests.keys(), "a file of the checkpoint was written by nobody"
    with open(partial / "manifest.json", "w") as file:
        file.write(json.dumps({"format": FORMAT, **manifest, "files": sizes, "sha256": digests}, indent=1))
        file.flush()
        os.fsync(file.fileno())


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of `checkpoint`. Raises OptionError when the folder is foreign or files are missing or cut off."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        if (found := manifest.get("format")) != FORMAT:
            raise ValueError(f"its format is {found!r}, not {FORMAT!r}")
        sizes, config = dict(manifest["files"]), manifest["config"]
        for value, kind in ((manifest["step"], int), (manifest["model"], dict), (config["model"]["freeze"], dict)):
            if not isinstance(value, kind):
                raise TypeError(f"{value!r} is no {kind.__name__}")
        if manifest["step"] < 0:
            raise ValueError(f"it is of step {manifest['step']}")
        if "state.pt" in sizes:  # what a run is continued from
            _ = manifest["data"], manifest["layout"], config["seed"], config["distill"]["teacher"]["kind"]
    except KeyError as error:
        raise OptionError("checkpoint", checkpoint, f"is damaged: manifest.json lacks {error}", _REMEDY) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise OptionError("checkpoint", checkpoint, f"is not a checkpoint of this program ({error})", _REMEDY) from None
    for name, size in sizes.items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() and Path(name).name == name else None
        if found != size:
            rule = f"{name} is missing" if found is None else f"{name} has {found} bytes of {size}"
            raise OptionError("checkpoint", checkpoint, f"is damaged: {rule}", _REMEDY)
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
        raise OptionError("checkpoint", checkpoint, rule, _REMEDY) from None


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
