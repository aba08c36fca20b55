"""Lightning around Megatron: the process group exists already, the stages wrap themselves, Lightning only loops."""

from __future__ import annotations

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy

from nemo_vopd.mcore import cpu


class MegatronEnvironment(ClusterEnvironment):
    """Ranks as `mcore.parallel.initialize` found them (torchrun, Slurm or a single process)."""

    def __init__(self, local_size: int) -> None:
        """`local_size` is the number of processes on each node."""
        super().__init__()
        self.local_size = local_size

    @property
    def creates_processes_externally(self) -> bool:
        """Lightning must not start processes."""
        return True

    @property
    def main_address(self) -> str:
        """Unused: the process group exists already."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """Unused: the process group exists already."""
        return 0

    @staticmethod
    def detect() -> bool:
        """Never chosen automatically."""
        return False

    def world_size(self) -> int:
        """Number of processes of the run."""
        return dist.get_world_size()

    def set_world_size(self, size: int) -> None:
        """Lightning's count must agree with the process group."""
        assert size == dist.get_world_size(), f"Lightning counts {size} processes, there are {dist.get_world_size()}"

    def global_rank(self) -> int:
        """Rank among all processes."""
        return dist.get_rank()

    def set_global_rank(self, rank: int) -> None:
        """Lightning's rank must agree with the process group."""
        assert rank == dist.get_rank()

    def local_rank(self) -> int:
        """Rank on this node."""
        return dist.get_rank() % self.local_size

    def node_rank(self) -> int:
        """Number of this node."""
        return dist.get_rank() // self.local_size


def count_from(trainer: Trainer, step: int) -> None:
    """Let `trainer.global_step`, and the steps that loggers see, go on from `step`."""
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = step
    steps = loop.manual_optimization.optim_step_progress.total
    steps.ready = steps.completed = step


class MegatronStrategy(DDPStrategy):
    """Lightning's DDP bookkeeping (ranks, barriers, loggers) with Megatron's own parallelism underneath."""

    def __init__(self, local_size: int) -> None:
        """`local_size` is the number of processes on each node."""
        super().__init__(cluster_environment=MegatronEnvironment(local_size), process_group_backend=cpu.backend())

    def _setup_model(self, model):
        return model

    def configure_ddp(self) -> None:
        """Megatron's DistributedDataParallel wraps the pipeline stages, not Lightning's."""

    def teardown(self) -> None:
        """Lightning would move the model to the CPU; examples of what it has learned are made after the fit."""
        assert self.accelerator is not None
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()
