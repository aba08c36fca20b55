"""A whole plan of one configuration on one kind of GPU, and the first change that makes one work which does not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemo_vopd.config import Config
from nemo_vopd.errors import OptionError
from nemo_vopd.tools.planning.assumptions import GIB, Assumptions, Gpu
from nemo_vopd.tools.planning.compute import Timing, timing
from nemo_vopd.tools.planning.count import architecture, count_model
from nemo_vopd.tools.planning.memory import StageMemory, host_bytes, stage_memory
from nemo_vopd.tools.planning.workload import Case, workload


@dataclass(frozen=True)
class Plan(Case):
    """A case with its memory and time."""

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
        """GPU-hours of the whole run."""
        return self.timing.step_seconds * self.config.trainer.max_steps * self.world_size / 3600


def make_plan(config: Config, gpu: Gpu, gpus_per_node: int, assume: Assumptions) -> Plan:
    """Plan `config`. Raises OptionError when its sizes do not divide."""
    hf = architecture(config)
    world_size = config.num_nodes * gpus_per_node
    model = count_model(config, hf, world_size)
    work = workload(config, hf, model.data_parallel, assume)
    case = Case(config, hf, gpu, assume, world_size, model, work)
    stages = [stage_memory(case, number) for number in range(len(model.stages))]
    return Plan(**vars(case), stages=stages, host=host_bytes(case, gpus_per_node), timing=timing(case))


def remedy_for(plan: Plan, gpus_per_node: int) -> str:
    """One line for a `plan` that does not fit: what is too much, and the change."""
    number = plan.stages.index(plan.fullest)
    phase = max(plan.fullest.phases, key=lambda name: plan.fullest.phases[name])
    need, have = plan.fullest.total / GIB, plan.gpu.memory_bytes / GIB
    problem = f"does not fit: pipeline stage {number} needs {need:.1f} of {have:.1f} GiB in the {phase} phase"
    for change in _changes(plan, phase):
        if _fits(plan.config, change, plan.gpu, gpus_per_node, plan.assume):
            return f"{problem}; {_say(change)}"
    return f"{problem}; no single option mends that: add nodes and raise parallel.pipeline, or use gpu=h200"


def divide_remedy(error: OptionError, config: Config, gpu: Gpu, gpus_per_node: int, assume: Assumptions) -> str:
    """One line for sizes that do not divide: the rule of `error`, and a change."""
    size = config.parallel.tensor * config.parallel.pipeline
    world_size = config.num_nodes * gpus_per_node
    if world_size % size == 0:
        return str(error)
    rule = (
        f"num_nodes={config.num_nodes}: {world_size} GPUs are no multiple of parallel.tensor * parallel.pipeline = "
        f"{config.parallel.tensor} * {config.parallel.pipeline}"
    )
    for nodes in range(1, 4 * max(config.num_nodes, -(-size // gpus_per_node)) + 1):
        change = {"num_nodes": nodes}
        if nodes * gpus_per_node % size == 0 and _fits(config, change, gpu, gpus_per_node, assume):
            return f"{rule}; {_say(change)}"
    return f"{rule}; choose a smaller parallel.tensor or parallel.pipeline"


def _changes(plan: Plan, phase: str) -> Iterator[dict[str, Any]]:
    """Changes to try, from those that cost least."""
    config, work = plan.config, plan.work
    widest = max(work.longest_prompt.num_tokens, work.longest_teacher_prompt.num_tokens) + work.longest_response
    if phase == "rollout":
        tokens = config.rollout.max_batch_tokens
        while tokens > widest:
            tokens //= 2
            yield {"rollout.max_batch_tokens": tokens}
    budget = config.trainer.max_tokens_per_microbatch
    while budget > widest:
        budget = max(widest, budget * 3 // 4)
        yield {"trainer.max_tokens_per_microbatch": budget}
    if not config.distill.teacher.offload:
        yield {"distill.teacher.offload": True}
    if config.parallel.tensor > 1 and not config.parallel.sequence:
        yield {"parallel.sequence": True}
    if phase == "student":
        vision, layers = {"trainer.recompute_vision": True}, {"trainer.recompute": "layers"}
        yield from (vision, {"trainer.recompute": "mlp"}, layers, vision | layers)
    more_nodes = {factor: {"num_nodes": config.num_nodes * factor} for factor in (2, 3, 4, 8)}
    yield from more_nodes.values()
    split = {"parallel.tensor": config.parallel.tensor * 2, "parallel.sequence": True}
    yield from (split, more_nodes[2] | split, more_nodes[4] | split)


def _fits(config: Config, change: dict[str, Any], gpu: Gpu, gpus_per_node: int, assume: Assumptions) -> bool:
    changed = copy.deepcopy(config)
    for option, value in change.items():
        *path, name = option.split(".")
        group: Any = changed
        for part in path:
            group = getattr(group, part)
        setattr(group, name, value)
    try:
        return make_plan(changed, gpu, gpus_per_node, assume).fits
    except OptionError:  # this change does not divide: the next one may
        return False


def _say(change: dict[str, Any]) -> str:
    return "set " + " and ".join(f"{option}={str(value).lower()}" for option, value in change.items())
