"""Process groups: the only module that touches Megatron's `parallel_state`."""

from __future__ import annotations

import ctypes
import datetime
import os
import signal
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from nemo_vopd.config import ParallelConfig
from nemo_vopd.errors import OptionError
from nemo_vopd.mcore import cpu


def initialize(parallel: ParallelConfig, *, seed: int) -> ProcessGroupCollection:
    """Start torch.distributed if needed (torchrun, Slurm or a single process) and build Megatron's groups.

    Returns the process groups every other part takes as an argument. Calling it again with the same sizes returns
    them again. Raises OptionError when the sizes do not divide the world.
    """
    cpu.activate()
    if not dist.is_initialized():
        if sys.platform == "linux":
            os.register_at_fork(after_in_child=_end_with_parent)
        rank, world, local = _environment()
        if torch.cuda.is_available():
            _choose_gpu(local)
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        store = None
        if world == 1:  # no rendezvous, no port: any number of single-process runs can share a machine
            store = dist.HashStore()
        # no device_id: with it NCCL gives a group one stream, and stages that send to each other in a ring would wait
        dist.init_process_group(
            cpu.backend(),
            rank=rank,
            world_size=world,
            store=store,
            timeout=datetime.timedelta(minutes=parallel.timeout_minutes),
        )
    check_world(parallel, dist.get_world_size())
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            distributed_timeout_minutes=parallel.timeout_minutes,  # type: ignore[arg-type]  # it becomes a timedelta
            create_gloo_process_groups=False,
        )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return ProcessGroupCollection.use_mpu_process_groups()


def _choose_gpu(local: int) -> None:
    """Take GPU number `local` of this node. Raises OptionError when this process does not see so many."""
    num = torch.cuda.device_count()
    if local >= num:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        rule = f"shows {num} GPU to process {local} of this node, which counts on GPU {local}"
        remedy = "show every process all GPUs of its node (Slurm: --gpus-per-node, not --gpus-per-task or --gpu-bind)"
        raise OptionError("CUDA_VISIBLE_DEVICES", visible, rule, remedy)
    torch.cuda.set_device(local)


def _end_with_parent() -> None:
    """In a loader or checkpoint process: ask Linux to end it with its rank, also when that is killed.

    Otherwise it would stay, and with it the rank's open connections: the other ranks would wait for a dead one.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def check_world(parallel: ParallelConfig, world_size: int) -> None:
    """Raise OptionError unless tensor * pipeline divides the number of processes."""
    size = parallel.tensor * parallel.pipeline
    if world_size % size:
        raise OptionError(
            "parallel.tensor",
            parallel.tensor,
            f"times parallel.pipeline={parallel.pipeline} must divide the number of processes, {world_size}",
            f"start a multiple of {size} processes or choose a smaller parallel.tensor or parallel.pipeline",
        )


def world_size() -> int:
    """Number of processes that torchrun, Slurm or nobody started."""
    return _environment()[1]


def forget_layout() -> None:
    """Take Megatron's groups down and keep the processes, so that another layout can be built."""
    parallel_state.destroy_model_parallel()


def destroy() -> None:
    """Take all groups down."""
    forget_layout()
    if dist.is_initialized():
        dist.destroy_process_group()


def _environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's or Slurm's variables, or a single process."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in env:
        # srun tells ranks but no meeting point: the first node of the step, a port of its own for each job
        nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "127.0.0.1"))
        env.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
        env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_LOCALID", 0))
    return 0, 1, 0


def gather_all(items: list, group: dist.ProcessGroup) -> list:
    """The `items` of all ranks of `group`, in the order of the ranks; collective."""
    gathered: list = [None] * group.size()
    dist.all_gather_object(gathered, items, group=group)
    return [item for part in gathered for item in part]


def on_rank_zero[ResultT](function: Callable[[], ResultT]) -> ResultT:
    """`function()` of rank 0 on every rank; an exception there is raised everywhere. Collective."""
    box: list = [None, None]
    if is_rank_zero():
        try:
            box = [function(), None]
        except Exception as error:
            box = [None, error]
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def is_first_stage(groups: ProcessGroupCollection) -> bool:
    """Whether this rank holds the embedding and the vision tower."""
    return groups.pp.rank() == 0


def is_last_stage(groups: ProcessGroupCollection) -> bool:
    """Whether this rank holds the final norm and the head."""
    return groups.pp.rank() == groups.pp.size() - 1


def is_rank_zero() -> bool:
    """Whether this process writes logs and files of the whole run."""
    return not dist.is_initialized() or dist.get_rank() == 0
