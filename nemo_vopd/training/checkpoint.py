"""Saves a run and brings it back: sharded tensors through Megatron, the rest in one small file."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.process_groups_config import ProcessGroupCollection
from nemo.utils import logging
from torch.distributed.checkpoint.api import CheckpointException

from nemo_vopd.config import Config
from nemo_vopd.data.dataset import fingerprint
from nemo_vopd.errors import OptionError, RunError
from nemo_vopd.mcore import cpu, parallel, sharded_state
from nemo_vopd.mcore.rng import restore_rng, rng_state
from nemo_vopd.mcore.stage import Stage
from nemo_vopd.training.environment import versions
from nemo_vopd.training.manifest import (
    CheckpointFolder,
    check_digests,
    own_digests,
    read_manifest,
    read_state,
    write_state,
)
from nemo_vopd.vlm.layout import ModelShape
from nemo_vopd.watchdog import beat


class Resumable(Protocol):
    """What a checkpoint holds of a run, and what is needed to divide it among ranks."""

    student: Stage
    groups: ProcessGroupCollection
    shape: ModelShape

    @property
    def global_step(self) -> int:
        """Number of steps done."""
        ...

    def sharded_state(self) -> dict[str, sharded_state.Shards]:
        """The float32 tensors by kind, live: saving reads them and loading fills them."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything else, in plain values and tensors; collective."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state` and from what was loaded into `sharded_state`."""
        ...


class Checkpointer:
    """Writes complete checkpoints into `<exp_dir>/checkpoints`, at once or in the background."""

    def __init__(self, config: Config) -> None:
        """See `CheckpointConfig`."""
        self.config, self.options = config, config.checkpoint
        self.folder = CheckpointFolder(Path(config.exp_manager["exp_dir"]) / "checkpoints", self.options.keep_last)
        self.last: Path | None = None
        """The newest complete checkpoint that this process knows of."""
        self._background = AsyncCallsQueue()

    def due(self, step: int) -> bool:
        """Whether `checkpoint.every_n_steps` asks for one after `step` steps."""
        return self.options.every_n_steps > 0 and step % self.options.every_n_steps == 0

    def save(self, run: Resumable, *, wait: bool) -> None:
        """Save `run` as it stands between two steps; all ranks call it. With `wait`, not in the background.

        Raises RunError when it cannot be written; complete checkpoints stay as they are.
        """
        self.finish(wait=True)
        beat()
        step = run.global_step
        if self.last is not None and self.last.name == f"step-{step:08d}":
            return
        tensors, state = run.sharded_state(), run.state()
        states: list = [None] * dist.get_world_size()
        dist.all_gather_object(states, rng_state())
        try:
            self._make_room(tensors)
            partial = parallel.on_rank_zero(lambda: self.folder.begin())
            request = sharded_state.save_request(tensors, run.student, run.groups, partial)
            manifest = _manifest(self.config, run.shape, step)
            request.add_finalize_fn(lambda: self._commit(partial, manifest, {**state, "rng": states}))
            if self.options.asynchronous and not wait:
                self._background.schedule_async_request(request)
            else:
                request.execute_sync()
        except (CheckpointException, CheckpointingException, OSError) as error:
            self._failed(step, error)

    def finish(self, *, wait: bool) -> None:
        """Complete background saves whose writers are done on every rank; `wait` for them if asked."""
        try:
            self._background.maybe_finalize_async_calls(blocking=wait)
        except (CheckpointException, CheckpointingException, OSError) as error:
            self._failed(None, error)

    def _commit(self, partial: Path, manifest: dict[str, Any], state: dict[str, Any]) -> None:
        """The last thing of a save, when every rank's files are on disk."""

        parallel.on_rank_zero(lambda: write_state(partial, state))
        digests = parallel.gather_all(own_digests(partial), dist.group.WORLD)  # type: ignore[arg-type]
        self.last = parallel.on_rank_zero(lambda: self.folder.commit(partial, manifest, dict(digests)))

    def _make_room(self, tensors: dict[str, sharded_state.Shards]) -> None:
        """Raise OSError early, and on every rank, where the disk cannot take the checkpoint; older ones go first."""
        numel = sum(flat.numel() for shards in tensors.values() for flat, _ in shards.values())
        total = torch.tensor(4.0 * numel, dtype=torch.float64, device=cpu.device())
        dist.all_reduce(total)  # replicas count twice: a little room to spare

        def check() -> OSError | None:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            while (free := shutil.disk_usage(self.folder.path).free) < float(total):
                if not self.folder.drop_oldest():
                    return OSError(f"{float(total) / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB are free")
            return None

        error = parallel.on_rank_zero(check)
        if error is not None:
            raise error

    def _failed(self, step: int | None, error: BaseException) -> None:
        if parallel.is_rank_zero():
            self.folder.repair()  # make room again
        what = "a background checkpoint" if step is None else f"the checkpoint of step {step}"
        reason = str(error).strip().splitlines()[-1]
        kept = f"{self.last} is complete" if self.last else "there is none before it"
        raise RunError(
            f"{what} could not be written to {self.folder.path}: {reason}; {kept}; "
            "free space there or choose another exp_manager.exp_dir, then run the same command again"
        ) from error

    def restore(self, run: Resumable, path: Path) -> int:
        """Bring `run` to the state saved in `path`, under any layout; returns the number of steps done.

        Raises OptionError when that cannot be.
        """
        path = path.resolve()
        manifest = parallel.on_rank_zero(lambda: read_manifest(path))
        _check_manifest(path, manifest, self.config, run.shape)
        check_digests(path, manifest)
        remedy = "delete it to resume from the one before it"
        try:
            state = _in_todays_order(read_state(path), manifest)
            generators, step = state["rng"], state["step"]
            beat()
            sharded_state.check_metadata(path)
            sharded_state.load(run.sharded_state(), run.student, run.groups, path)
            run.restore(state)
        except (CheckpointException, CheckpointingException, pickle.UnpicklingError, OSError, KeyError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise OptionError("checkpoint", path, f"cannot be read ({reason})", remedy) from None
        if manifest["layout"] == _layout(self.config):
            restore_rng(generators[dist.get_rank()])
        else:  # draws depend on seed, prompt and response alone; no generator is used in a step
            logging.info("resuming in another layout: generators start from the seed")
        self.last = path
        return step


def _layout(config: Config) -> dict[str, Any]:
    division = dataclasses.asdict(config.parallel)
    del division["timeout_minutes"]
    return {"world_size": dist.get_world_size(), **division}


def _manifest(config: Config, shape: ModelShape, step: int) -> dict[str, Any]:
    return {
        "step": step,
        "versions": versions(),
        "layout": _layout(config),
        "model": dataclasses.asdict(shape),
        "data": fingerprint(config.data.path),
        "config": dataclasses.asdict(config),
    }


def _in_todays_order(state: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    """`state` with the number of prompts read, which checkpoints of version 0.1 lack.

    Those hold the position of Energon's shuffle buffer, which is no place in an order of whole epochs: the run goes on
    after as many prompts as it has trained on, so the current epoch may repeat some records and miss others.
    """
    if "prompts" in state:
        return state
    prompts = state["step"] * manifest["config"]["data"]["batch_size"]
    logging.warning("the checkpoint is of version 0.1: prompts go on in the new order of whole epochs, at %d", prompts)
    return {**state, "prompts": prompts, "ahead": []}


def check_same_run(folder: CheckpointFolder, config: Config, shape: ModelShape) -> None:
    """Raise OptionError where the options contradict the newest checkpoint in `folder`, if there is one."""
    if complete := folder.complete():
        _check_manifest(complete[-1], read_manifest(complete[-1]), config, shape)


def _check_manifest(path: Path, manifest: dict[str, Any], config: Config, shape: ModelShape) -> None:
    """Raise OptionError where the options contradict what the checkpoint `path` was written with."""
    if "state.pt" not in manifest["files"]:
        rule = "holds weights alone, no run to resume"
        raise OptionError("checkpoint", path, rule, "give its model as model.hf_path instead")
    anew = "or start anew in another exp_manager.exp_dir"
    was = manifest["model"]
    differs = [f"{key} {was.get(key)}" for key, value in dataclasses.asdict(shape).items() if value != was.get(key)]
    if differs:
        rule = f"is another model than the checkpoint's, which has {', '.join(differs)}"
        raise OptionError("model.hf_path", config.model.hf_path, rule, f"give the model of the first run, {anew}")
    was = manifest["config"]
    if config.seed != was["seed"]:
        rule = f"the run to resume has {was['seed']}, and the order of prompts depends on it"
        raise OptionError("seed", config.seed, rule, f"set seed={was['seed']}, {anew}")
    if manifest["data"] != fingerprint(config.data.path):
        rule = "is another data set than that of the run to resume, whose position in it was saved"
        raise OptionError("data.path", config.data.path, rule, f"give the same one (or a copy), {anew}")
    frozen = dataclasses.asdict(config.model.freeze)
    if frozen != was["model"]["freeze"]:
        rule = f"the run to resume has {was['model']['freeze']}"
        raise OptionError("model.freeze", frozen, rule, f"freeze the same parts, {anew}")
    if was["distill"]["teacher"]["kind"] == "current" != config.distill.teacher.kind:
        rule = "the run to resume saved no teacher weights (kind=current)"
        raise OptionError("distill.teacher.kind", config.distill.teacher.kind, rule, f"keep kind=current, {anew}")
