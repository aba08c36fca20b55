"""A plan as one JSON object and as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nemo_vopd.config import Config
from nemo_vopd.tools.planning.assumptions import GIB, Assumptions, Gpu
from nemo_vopd.tools.planning.plan import Plan


def layout_of(config: Config, data_parallel: int | None) -> dict[str, Any]:
    """The sizes of `config.parallel`."""
    names = ("tensor", "pipeline", "virtual_pipeline", "pipeline_layout", "sequence")
    return {name: getattr(config.parallel, name) for name in names} | {"data": data_parallel}


def refusal_json(config: Config, gpu: Gpu, world_size: int, assume: Assumptions, remedy: str) -> dict[str, Any]:
    """The object for sizes that do not divide: nothing could be counted."""
    empty = dict.fromkeys(("parameters", "batch", "flops", "phase_seconds", "step_seconds", "gpu_hours", "host_bytes"))
    return {
        **empty,
        "stages": [],
        "gpu": vars(gpu),
        "world_size": world_size,
        "layout": layout_of(config, None),
        "assumptions": vars(assume),
        "fits": False,
        "remedy": remedy,
    }


def plan_json(plan: Plan, remedy: str | None) -> dict[str, Any]:
    """All numbers of a plan: bytes, seconds, operations."""
    work, model, timing = plan.work, plan.model, plan.timing
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
        "gpu": vars(plan.gpu),
        "world_size": plan.world_size,
        "layout": layout_of(plan.config, model.data_parallel),
        "batch": {
            "prompts": plan.config.data.batch_size,
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
        "gpu_hours": plan.gpu_hours,
        "assumptions": vars(plan.assume),
        "fits": plan.fits,
        "remedy": remedy,
    }


def plan_text(plan: Plan) -> str:
    """Tables for people: GiB and seconds."""
    data = plan_json(plan, None)
    layout, batch, parameters = data["layout"], data["batch"], data["parameters"]
    dtype, recipe = "bf16" if plan.model.megatron.bf16 else "fp32", plan.config.precision.fp8.recipe
    dtype += f" and FP8 ({recipe})" if recipe else ""
    uneven = f", layers {layout['pipeline_layout']}" if layout["pipeline_layout"] else ""
    virtual = f" x {layout['virtual_pipeline']} chunks" if layout["virtual_pipeline"] > 1 else ""
    lines = [
        f"{plan.config.model.hf_path}: {parameters['total'] / 1e9:.2f} billion parameters "
        f"({parameters['text'] / 1e9:.2f} text, {parameters['vision'] / 1e9:.2f} vision), {dtype}",
        f"{plan.world_size} x {plan.gpu.name}: tensor {layout['tensor']}{' + sequence' if layout['sequence'] else ''}, "
        f"pipeline {layout['pipeline']}{virtual}, data {layout['data']}{uneven}",
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
        *_time_table(plan),
        "",
        "assumed (change with assume.NAME=VALUE):",
        *(f"  {name}={'largest image' if value is None else value}" for name, value in vars(plan.assume).items()),
    ]
    return "\n".join(lines)


def _memory_table(plan: Plan) -> list[str]:
    stages, counts = plan.stages, plan.model.stages

    def row(name: str, cells: Iterable[object]) -> str:
        return f"{name:<23}" + "".join(f"{f'{c:.2f}' if isinstance(c, float) else c:>10}" for c in cells)

    return [
        row("GiB on each GPU", [f"stage {i}" for i in range(len(stages))]),
        row("parameters, billion", [c.num_parameters / 1e9 for c in counts]),
        row("language layers", [sum(c.chunk_layers) for c in counts]),
        *(row(kind, [s.kinds[kind] / GIB for s in stages]) for kind in stages[0].kinds),
        *(row(f"= {phase} phase", [s.phases[phase] / GIB for s in stages]) for phase in stages[0].phases),
        row("fullest phase", [s.total / GIB for s in stages]) + f"  of {plan.gpu.memory_bytes / GIB:.1f}",
    ]


def _time_table(plan: Plan) -> list[str]:
    timing = plan.timing
    flops = {phase: f"{number / 1e15:.0f}" for phase, number in timing.flops.items()}
    stages = ", ".join(f"{seconds * 1e3:.0f}" for seconds in timing.stage_seconds)
    return [
        f"{'phase':<12}{'PFLOP':>10}{'seconds':>10}",
        *(f"{phase:<12}{flops.get(phase, ''):>10}{seconds:>10.1f}" for phase, seconds in timing.seconds.items()),
        f"{'step':<12}{sum(timing.flops.values()) / 1e15:>10.0f}{timing.step_seconds:>10.1f}",
        f"student pass of one microbatch by stage, milliseconds: {stages}",
        f"{plan.config.trainer.max_steps} steps: {plan.gpu_hours:.0f} GPU-hours",
    ]
