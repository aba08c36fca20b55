"""A run: process groups, Lightning's trainer, NeMo's experiment manager, the model, fit."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import logging
import os
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import MLFlowLogger
from megatron.core.process_groups_config import ProcessGroupCollection
from nemo.utils import logging as nemo_logging
from nemo.utils.exp_manager import ExpManagerConfig, exp_manager
from omegaconf import OmegaConf

from nemo_vopd.cli import quiet_announcements
from nemo_vopd.config import Config
from nemo_vopd.data.dataset import require_dataset
from nemo_vopd.errors import EngineLost, OptionError, printable
from nemo_vopd.mcore import parallel
from nemo_vopd.mcore.strategy import MegatronStrategy
from nemo_vopd.model import VisionOPDModel
from nemo_vopd.training.checkpoint import Checkpointer, check_same_run
from nemo_vopd.training.environment import describe, write_facts
from nemo_vopd.training.manifest import step_of
from nemo_vopd.training.metrics import ProgressBar
from nemo_vopd.training.run_lock import RunLock
from nemo_vopd.training.signals import StopSignals
from nemo_vopd.training.stopping import RunControl
from nemo_vopd.vlm.build import check_model, shape_of
from nemo_vopd.watchdog import watched


class Evaluation(Protocol):
    """Measures a run between its steps; recipes pass `tools.during_training` in."""

    def begin(self) -> None:
        """Forget what an earlier run left in the folder: this one starts at step 0."""
        ...

    def measure(self, model: VisionOPDModel, step: int) -> dict[str, float]:
        """Accuracies in [0, 1] by name after `step` steps; collective."""
        ...

    def finish(self, model: VisionOPDModel) -> None:
        """Called after the last step; collective."""
        ...


def train(config: Config, signals: StopSignals | None = None, evaluation: Evaluation | None = None) -> VisionOPDModel:
    """Train as `config` says and return the model; everything is written to `exp_manager.exp_dir`.

    `signals` may listen already: one that came while the program was loading ends the run before its first step.
    `evaluation` measures the model where `config.evaluation` asks for it.
    """
    assert evaluation is not None or config.evaluation.path is None, "nobody measures what evaluation.path asks for"
    _check_names(config.exp_manager)
    check_model(config)
    _check_support(config.distill.top_k, shape_of(config).vocab_size)
    require_dataset(config.data.path)
    if config.evaluation.path is not None:
        require_dataset(config.evaluation.path, "evaluation.path")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its hardware list; `describe` tells more
    _make_folder(config)
    groups = parallel.initialize(config.parallel, seed=config.seed)
    lock = RunLock(Path(config.exp_manager["exp_dir"]))
    parallel.on_rank_zero(lock.acquire)
    try:
        with watched(config.parallel.timeout_minutes):
            return _run(config, groups, signals, evaluation)
    finally:
        lock.release()


def _run(
    config: Config, groups: ProcessGroupCollection, signals: StopSignals | None, evaluation: Evaluation | None
) -> VisionOPDModel:
    """The run in its locked folder."""
    folder = Checkpointer(config).folder
    if config.exp_manager["resume_if_exists"]:
        # refused before anything in the folder changes
        parallel.on_rank_zero(lambda: check_same_run(folder, config, shape_of(config)))
    elif (aside := parallel.on_rank_zero(folder.set_aside)) and parallel.is_rank_zero():
        print(f"the checkpoints of an earlier run are in {aside} now", flush=True)
    parallel.on_rank_zero(folder.repair)
    seed_everything(config.seed, verbose=False)
    trainer = build_trainer(config)
    start_experiment(trainer, config)
    control, newest = RunControl(config), next(reversed(folder.complete()), None)
    # what an earlier start left must not be taken for this one
    control.write_status("running", step_of(newest) if newest else 0, newest)
    try:
        if parallel.is_rank_zero():
            write_facts(config, dist.get_world_size())
            print(f"writing to {config.exp_manager['exp_dir']}\n{describe(config, dist.get_world_size())}", flush=True)
        # exp_manager has found checkpoints/last; the model reads it itself, sharded tensors do not pass Lightning
        last, trainer.ckpt_path = trainer.ckpt_path, None
        model = VisionOPDModel(config, groups, trainer, None if evaluation is None else evaluation.measure)
        model.control.signals = signals or model.control.signals
        with model.control.signals:
            step = 0 if last is None else model.checkpointer.restore(model, Path(last))
            if evaluation is not None and not step:
                evaluation.begin()
            if parallel.is_rank_zero() and step:
                print(f"resuming after step {step} from {model.checkpointer.last}", flush=True)
            if reason := model.control.stop_reason(step):
                model.control.write_status(reason, step, model.checkpointer.last)
            else:
                trainer.fit(model)
                if evaluation is not None:
                    evaluation.finish(model)
    except BaseException:
        control.write_error()
        raise
    _tell_end(model)
    return model


class SaveLostStep(Callback):
    """Saves the run as the last step left it when its rollout engine is lost in the middle of the next one."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called on every rank, since the loss of an engine is raised on every rank, before Lightning tears down."""
        if isinstance(pl_module, VisionOPDModel) and isinstance(exception, EngineLost) and trainer.global_step > 0:
            pl_module.checkpointer.save(pl_module, wait=True)
            # a signal to the job may end a server that the run started before the step is over
            reason = pl_module.control.signals.received or "engine_lost"
            pl_module.control.write_status(reason, trainer.global_step, pl_module.checkpointer.last)


def _check_names(exp_manager_options: dict[str, Any]) -> None:
    """Raise OptionError for an option that NeMo's exp_manager does not have."""
    known = {field.name for field in dataclasses.fields(ExpManagerConfig)}
    for name, value in exp_manager_options.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3) or sorted(known)
            remedy = f"did you mean {' or '.join(close[:3])}?"
            raise OptionError(f"exp_manager.{name}", value, "no such option of NeMo's exp_manager", remedy)


def _check_support(top_k: int | None, vocab_size: int) -> None:
    if top_k is not None and top_k > vocab_size:
        rule = f"must not exceed the vocabulary size, {vocab_size}"
        raise OptionError("distill.top_k", top_k, rule, "lower it or set distill.top_k=null for the full vocabulary")


def _make_folder(config: Config) -> None:
    """Raise OptionError now, not after the model was read, when the run's folder cannot be written."""
    folder = Path(config.exp_manager["exp_dir"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError("exp_manager.exp_dir", folder, f"cannot be made ({error.strerror})", "name another") from None


def _tell_end(model: VisionOPDModel) -> None:
    status = json.loads(model.control.status_file.read_text()) if parallel.is_rank_zero() else None
    if status is None:
        return
    last = status["checkpoint"]
    current = last is not None and last.endswith(f"step-{status['step']:08d}")
    saved = f"; saved as {last}" if current else f"; its last checkpoint is {last}" if last else "; nothing was saved"
    again = "" if status["finished"] else "; the same command resumes it"
    print(f"ended after step {status['step']} of {status['max_steps']}: {status['reason']}{saved}{again}", flush=True)


def build_trainer(config: Config) -> Trainer:
    """Lightning's trainer over the existing process group."""
    world, nodes = dist.get_world_size(), config.num_nodes
    if world % nodes:
        rule = f"must divide the number of processes, {world}"
        raise OptionError("num_nodes", nodes, rule, "set it to the number of nodes of the job")
    callbacks = [SaveLostStep(), *([ProgressBar()] if config.trainer.enable_progress_bar else [])]
    return Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=world // nodes,
        num_nodes=nodes,
        strategy=MegatronStrategy(world // nodes),
        max_steps=config.trainer.max_steps,
        limit_train_batches=config.trainer.max_steps,
        log_every_n_steps=config.trainer.log_every_n_steps,
        enable_progress_bar=config.trainer.enable_progress_bar,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        logger=False,
        callbacks=callbacks,  # type: ignore[arg-type]
    )


def start_experiment(trainer: Trainer, config: Config) -> None:
    """Hand logging over to NeMo's exp_manager, in `exp_dir`/logs: it moves the files it finds in its folder away.

    Raises OptionError when a logger cannot start.
    """
    options = copy.deepcopy(config.exp_manager)
    folder = Path(options.pop("exp_dir"))
    options["explicit_log_dir"] = str(folder / "logs")
    options["checkpoint_callback_params"] = {"dirpath": str(folder / "checkpoints")}  # where exp_manager looks
    name = {"project": "nemo_vopd", "name": folder.absolute().name}
    options["wandb_logger_kwargs"] = {**name, **(options.get("wandb_logger_kwargs") or {})}
    with_mlflow, mlflow = options.pop("create_mlflow_logger", False), options.pop("mlflow_logger_kwargs", None) or {}
    level = nemo_logging.getEffectiveLevel()
    nemo_logging.setLevel(nemo_logging.ERROR)  # exp_manager prints its whole schema
    try:
        exp_manager(trainer, OmegaConf.create(options))  # type: ignore[arg-type]
        if with_mlflow and parallel.is_rank_zero():  # NeMo 3.0 gives its own logger the name twice
            named: dict[str, Any] = {"experiment_name": "nemo_vopd", "run_name": name["name"]}
            named |= {"tracking_uri": os.environ.get("MLFLOW_TRACKING_URI"), **mlflow}
            trainer.loggers = [*trainer.loggers, MLFlowLogger(**named)]
        for logger in trainer.loggers:
            getattr(logger, "experiment", None)  # starts it: a missing key is told before the model is read
    except Exception as error:  # each logger has errors of its own
        wanted = [key for key in ("create_wandb_logger", "create_mlflow_logger") if config.exp_manager.get(key)]
        if not wanted:
            raise
        remedy = "install it, log in, or set WANDB_MODE=offline or MLFLOW_TRACKING_URI (docs/logging.md)"
        rule = f"cannot start ({printable(error)[:200]})"
        raise OptionError(f"exp_manager.{wanted[0]}", True, rule, remedy) from None
    nemo_logging.setLevel(level)
    # exp_manager routes Megatron's INFO records, hundreds of parameter names, to the console
    logging.getLogger("megatron").setLevel(logging.WARNING)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("megatron."):
            logging.getLogger(name).setLevel(logging.WARNING)
    quiet_announcements()
