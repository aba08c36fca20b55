"""A whole plan of one configuration on one kind of GPU, as text and JSON, and the change that makes one work."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any

from nemo_vopd.errors import OptionError
from nemo_vopd.tools.planning.assumptions import GIB, GPUS, PlanConfig
from nemo_vopd.tools.planning.compute import Timing
from nemo_vopd.tools.planning.memory import StageMemory, host_bytes
from nemo_vopd.tools.planning.workload import Case


class Plan(Case):
    """A case with its memory and time."""

    def __init__(self, config: PlanConfig) -> None:
        """Raises OptionError when sizes do not divide."""
        super().__init__(config)
        self.stages = [StageMemory(self, number) for number in range(len(self.model.stages))]
        self.fullest = max(self.stages, key=lambda stage: stage.total)
        """The stage that needs the most memory."""
        self.fits = self.fullest.total <= self.gpu.memory_bytes
        self.host, self.timing = host_bytes(self), Timing(self)
        """Bytes by kind of a node's host memory; operations and seconds of a step."""
        self.hours = self.timing.step_seconds * config.trainer.max_steps / 3600
        """Hours of the whole run by the clock, saves and measurements left out."""
        self.gpu_hours = self.hours * config.world_size


_MOST_NODES = 8
"""Factor up to which more nodes are proposed."""


def verdict(plan: Plan) -> str:
    """The answer in one line: whether it fits, and how long it takes."""
    need, have = plan.fullest.total / GIB, plan.gpu.memory_bytes / GIB
    fits = f"{'fits' if plan.fits else 'does not fit'}: {need:.1f} of {have:.1f} GiB on the fullest GPU"
    step, steps = plan.timing.step_seconds, plan.config.trainer.max_steps
    return f"{fits}; {step:.3g} s a step, {plan.hours:.2g} hours for {steps} steps ({plan.gpu_hours:.2g} GPU-hours)"


def remedy_for(plan: Plan) -> str:
    """One line for a `plan` that does not fit: what is too much, and the change."""
    number = plan.stages.index(plan.fullest)
    phase = max(plan.fullest.phases, key=lambda name: plan.fullest.phases[name])
    need, have = plan.fullest.total / GIB, plan.gpu.memory_bytes / GIB
    problem = f"does not fit: pipeline stage {number} needs {need:.1f} of {have:.1f} GiB in the {phase} phase"
    for change in (*_changes(plan, phase), *_layouts(plan.config)):
        if _fits(plan.config, change):
            return f"{problem}; {_say(plan.config, change)}"
    return f"{problem}; no layout on up to {_MOST_NODES} times as many nodes does: use gpu=h200 or a smaller model"


def divide_remedy(error: OptionError, config: PlanConfig) -> str:
    """One line for sizes that do not divide: the rule of `error`, and a change."""
    size = config.parallel.tensor * config.parallel.pipeline
    if config.world_size % size == 0:
        return str(error)
    rule = (
        f"num_nodes={config.num_nodes}: {config.world_size} GPUs are no multiple of parallel.tensor * parallel.pipeline"
        f" = {config.parallel.tensor} * {config.parallel.pipeline}"
    )
    for nodes in range(1, 4 * max(config.num_nodes, -(-size // config.gpus_per_node)) + 1):
        change = {"num_nodes": nodes}
        if nodes * config.gpus_per_node % size == 0 and _fits(config, change):
            return f"{rule}; {_say(config, change)}"
    fitting = next((change for change in _layouts(config) if _fits(config, change)), None)
    return f"{rule}; {_say(config, fitting) if fitting else 'no layout fits: add nodes, or use gpu=h200'}"


def _changes(plan: Plan, phase: str) -> Iterator[dict[str, Any]]:
    """Changes to try, from those that cost least."""
    config, widest = plan.config, plan.work.widest
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


def _layouts(config: PlanConfig) -> Iterator[dict[str, Any]]:
    """Other layouts with all that saves memory: few nodes first, and tensor parallelism within a node."""
    saving = {"trainer.recompute": "layers", "trainer.recompute_vision": True, "distill.teacher.offload": True}
    saving |= {"parallel.pipeline_layout": None, "parallel.virtual_pipeline": 1}
    for factor in range(1, _MOST_NODES + 1):
        world, tensor = config.world_size * factor, 1
        while tensor <= config.gpus_per_node:
            for pipeline in range(1, world // tensor + 1):
                if world % (tensor * pipeline) == 0:
                    layout = {"parallel.tensor": tensor, "parallel.sequence": tensor > 1, "parallel.pipeline": pipeline}
                    yield {"num_nodes": config.num_nodes * factor, **layout, **saving}
            tensor *= 2


def _fits(config: PlanConfig, change: dict[str, Any]) -> bool:
    changed = copy.deepcopy(config)
    for option, value in change.items():
        *path, name = option.split(".")
        group: Any = changed
        for part in path:
            group = getattr(group, part)
        setattr(group, name, value)
    try:
        return Plan(changed).fits
    except OptionError:  # this change does not divide: the next one may
        return False


def _say(config: PlanConfig, change: dict[str, Any]) -> str:
    """The `change` as it is typed, less what `config` has already."""
    new = {option: value for option, value in change.items() if attrgetter(option)(config) != value}
    written = {option: "null" if value is None else str(value).lower() for option, value in new.items()}
    return "set " + " and ".join(f"{option}={value}" for option, value in written.items())


def _machine(config: PlanConfig, data_parallel: int | None) -> dict[str, Any]:
    names = ("tensor", "pipeline", "virtual_pipeline", "pipeline_layout", "sequence")
    layout = {name: getattr(config.parallel, name) for name in names} | {"data": data_parallel}
    return {"gpu": vars(GPUS[config.gpu]), "world_size": config.world_size, "layout": layout}


def refusal_json(config: PlanConfig, remedy: str) -> dict[str, Any]:
    """The object for sizes that do not divide: nothing could be counted."""
    times = "phase_seconds", "step_seconds", "hours", "gpu_hours"
    empty = dict.fromkeys(("parameters", "batch", "flops", *times, "host_bytes"))
    assumed = {"assumptions": vars(config.assume), "fits": False, "remedy": remedy}
    return {**empty, "stages": [], **_machine(config, None), **assumed}


def plan_json(plan: Plan, remedy: str | None) -> dict[str, Any]:
    """All numbers of a plan: bytes, seconds, operations."""
    config, work, model, timing = plan.config, plan.work, plan.model, plan.timing
    sequence = {"student": work.student.num_tokens, "teacher": work.teacher.num_tokens}
    num_sequences = work.num_sequences * model.data_parallel
    return {
        "parameters": {"total": model.num_text + model.num_vision, "text": model.num_text, "vision": model.num_vision},
        "stages": [
            {
                "stage": number,
                "layers": list(count.chunk_layers),
                "parameters": count.num_parameters,
                "bytes": memory.kinds,
                "phase_bytes": memory.phases,
                "total_bytes": memory.total,
                "fits": memory.total <= plan.gpu.memory_bytes,
            }
            for number, (count, memory) in enumerate(zip(model.stages, plan.stages, strict=True))
        ],
        "host_bytes": {**plan.host, "total": sum(plan.host.values())},
        **_machine(config, model.data_parallel),
        "batch": {
            "prompts": config.data.batch_size,
            "responses_per_prompt": work.n,
            "sequences": num_sequences,
            "student_tokens": num_sequences * (sequence["student"] + work.response_tokens),
            "teacher_tokens": num_sequences * (sequence["teacher"] + work.response_tokens),
            "response_tokens": num_sequences * work.response_tokens,
            "prompt_tokens": sequence,
            "prompts_per_rank": work.num_prompts,
            "sequences_per_rank": work.num_sequences,
            "microbatches": work.num_microbatches,
            "largest_microbatch_tokens": work.student_most.num_tokens,
            "prompts_decoded_together": work.decoding.num_batches * work.decoding.num_prompts,
            "pipeline_bubble": timing.bubble,
        },
        "flops": {**timing.flops, "total": sum(timing.flops.values())},
        "phase_seconds": timing.seconds,
        "stage_seconds": timing.stage_seconds,
        "step_seconds": timing.step_seconds,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "assumptions": vars(config.assume),
        "fits": plan.fits,
        "remedy": remedy,
    }


def plan_text(plan: Plan) -> str:
    """Tables for people: GiB and seconds."""
    data, timing = plan_json(plan, None), plan.timing
    layout, batch, parameters, flops = data["layout"], data["batch"], data["parameters"], data["flops"]
    dtype, recipe = "bf16" if plan.model.megatron.bf16 else "fp32", plan.config.precision.fp8.recipe
    dtype += f" and FP8 ({recipe})" if recipe else ""
    uneven = f", layers {layout['pipeline_layout']}" if layout["pipeline_layout"] else ""
    virtual = f" x {layout['virtual_pipeline']} chunks" if layout["virtual_pipeline"] > 1 else ""
    stage_times = ", ".join(f"{seconds * 1e3:.0f}" for seconds in timing.stage_seconds)
    rows = [(phase, flops.get(phase), seconds) for phase, seconds in timing.seconds.items()]
    rows.append(("step", flops["total"], timing.step_seconds))
    lines = [
        verdict(plan),
        "",
        f"{plan.config.model.hf_path}: {parameters['total'] / 1e9:.2f} billion parameters "
        f"({parameters['text'] / 1e9:.2f} text, {parameters['vision'] / 1e9:.2f} vision), {dtype}",
        f"{data['world_size']} x {plan.gpu.name}: tensor {layout['tensor']}"
        f"{' + sequence' if layout['sequence'] else ''}, pipeline {layout['pipeline']}{virtual}, data {layout['data']}"
        f"{uneven}",
        "",
        *_memory_table(plan),
        "",
        f"host memory of a node: {data['host_bytes']['total'] / GIB:.0f} GiB ("
        + ", ".join(f"{kind} {number / GIB:.0f}" for kind, number in plan.host.items())
        + ")",
        f"a step: {batch['prompts']} prompts x {batch['responses_per_prompt']} responses = {batch['sequences']} "
        f"sequences; tokens: student {batch['student_tokens'] / 1e6:.2f}, teacher {batch['teacher_tokens'] / 1e6:.2f}, "
        f"responses {batch['response_tokens'] / 1e6:.2f} million",
        f"a data-parallel rank: {batch['prompts_per_rank']} prompts, "
        f"{min(batch['prompts_decoded_together'], batch['prompts_per_rank'])} decoded at a time, "
        f"{batch['microbatches']} microbatches; pipeline bubble {batch['pipeline_bubble']:.1%}",
        "",
        f"{'phase':<12}{'PFLOP':>10}{'seconds':>10}",
        *(f"{name:<12}{'' if num is None else f'{num / 1e15:.0f}':>10}{time:>10.1f}" for name, num, time in rows),
        f"student pass of one microbatch by stage, milliseconds: {stage_times}",
        "",
        "assumed (change with assume.NAME=VALUE):",
        *(f"  {name}={'largest image' if value is None else value}" for name, value in data["assumptions"].items()),
    ]
    return "\n".join(lines)


def _memory_table(plan: Plan) -> list[str]:
    stages, counts = plan.stages, plan.model.stages

    def row(name: str, cells: Iterable[object]) -> str:
        return f"{name:<23}" + "".join(f"{f'{c:.2f}' if isinstance(c, float) else c:>10}" for c in cells)

    return [
        row("GiB on each GPU", [f"stage {i}" for i in range(len(stages))]),
        row("parameters, billion", [count.num_parameters / 1e9 for count in counts]),
        row("language layers", [count.num_layers for count in counts]),
        *(row(kind, [s.kinds[kind] / GIB for s in stages]) for kind in stages[0].kinds),
        *(row(f"= {phase} phase", [s.phases[phase] / GIB for s in stages]) for phase in stages[0].phases),
        row("fullest phase", [s.total / GIB for s in stages]) + f"  of {plan.gpu.memory_bytes / GIB:.1f}",
    ]
