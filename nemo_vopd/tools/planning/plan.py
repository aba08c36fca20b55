"""A whole plan: counts, memory and time of one configuration on one kind of GPU."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_vopd.config import Config
from nemo_vopd.tools.planning.assumptions import Assumptions, Gpu
from nemo_vopd.tools.planning.compute import Timing, timing
from nemo_vopd.tools.planning.count import ModelCount, architecture, count_model
from nemo_vopd.tools.planning.memory import StageMemory, host_bytes, stage_memory
from nemo_vopd.tools.planning.workload import Workload, workload


@dataclass(frozen=True)
class Plan:
    """One configuration on one kind of GPU."""

    config: Config
    gpu: Gpu
    world_size: int
    assume: Assumptions
    model: ModelCount
    work: Workload
    stages: list[StageMemory]
    host: dict[str, int]
    timing: Timing

    @property
    def fits(self) -> bool:
        """Whether every stage fits its GPUs."""
        return self.fullest.total <= self.gpu.memory_bytes

    @property
    def fullest(self) -> StageMemory:
        """The stage that needs the most memory."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def gpu_hours(self) -> float:
        """Of the whole run."""
        return self.timing.step_seconds * self.config.trainer.max_steps * self.world_size / 3600


def make_plan(config: Config, gpu: Gpu, gpus_per_node: int, assume: Assumptions) -> Plan:
    """Plan `config`. Raises OptionError when its sizes do not divide."""
    hf = architecture(config)
    world_size = config.num_nodes * gpus_per_node
    model = count_model(config, hf, world_size)
    work = workload(config, hf, model.data_parallel, assume)
    stages = [stage_memory(config, hf, model, i, work, gpu, assume) for i in range(len(model.stages))]
    host = host_bytes(config, hf, model, work, gpus_per_node, assume)
    time = timing(config, hf, model, work, gpu, assume)
    return Plan(config, gpu, world_size, assume, model, work, stages, host, time)
