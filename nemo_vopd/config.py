"""Every option of a run as dataclasses: Hydra fills them, unknown keys and wrong types fail at the start.

The defaults are the published run (docs/algorithm.md section 2). `validate` checks values and never changes one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from nemo_vopd.errors import OptionError


@dataclass
class ModelConfig:
    """Which vision-language model is trained."""

    hf_path: str = "???"
    """Hugging Face directory: config.json, *.safetensors, tokenizer, preprocessor."""
    layer_spec: str = "auto"
    """auto | local | transformer_engine: which implementation serves the language layers."""


@dataclass
class ParallelConfig:
    """How the model is split; the data-parallel size follows from the world size."""

    tensor: int = 1
    """Tensor-parallel size (attention heads, feed-forward columns and vocabulary are divided)."""
    pipeline: int = 1
    """Pipeline-parallel size (layers are divided)."""
    virtual_pipeline: int = 1
    """Chunks of layers on each pipeline stage (Megatron's interleaved schedule): smaller bubbles, more messages."""
    pipeline_layout: list[int] | None = None
    """Language layers of each pipeline stage (of each chunk, in order of depth, with virtual_pipeline); null divides
    them evenly. The first stage also holds the vision tower."""
    context: int = 1
    """Context-parallel size; only 1 is supported."""
    sequence: bool = False
    """Megatron sequence parallelism: norms and residuals are split along the sequence within a tensor group."""


@dataclass
class PixelConfig:
    """Image resizing of one view, in pixels of the resized image (Qwen's smart resize)."""

    min_pixels: int = 3136
    max_pixels: int = 1003520


@dataclass
class CropConfig:
    """How the teacher's evidence-centred crop follows from the box."""

    scale: float = 2.0
    """Side of the crop over the longer side of the box."""
    min_side: int = 28
    """Smallest crop side in pixels of the full image."""
    square: bool = True
    """Square crops; false keeps the aspect of the box."""


@dataclass
class DataConfig:
    """The prompts: an Energon data set written by recipes/prepare_data.py."""

    path: str = "???"
    """Directory of the Energon data set."""
    batch_size: int = 96
    """Prompts of one optimizer step, over all data-parallel ranks."""
    max_prompt_length: int = 8192
    """Longer prompts (in tokens, either view) are dropped and counted."""
    full: PixelConfig = field(default_factory=PixelConfig)
    crop_pixels: PixelConfig = field(default_factory=PixelConfig)
    crop: CropConfig = field(default_factory=CropConfig)
    draw_box: bool = False
    """Draw the evidence box on the student's full image (a data option, docs/algorithm.md section 4)."""
    question_hint: str = ""
    """Text appended to the question in both views, verbatim."""
    shuffle_buffer_size: int = 1000
    num_workers: int = 2
    """Loader processes of each rank; part of the sample order, so keep it fixed within a run."""


@dataclass
class RolloutConfig:
    """How responses are produced."""

    engine: str = "megatron"
    """megatron | replay"""
    n: int = 8
    """Responses for each prompt."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_response_length: int = 1024
    max_batch_tokens: int = 65536
    """Prompt and response tokens decoded together on one rank: bounds the KV cache."""
    path: str | None = None
    """Replay: the file that `rollout.dump_path` wrote."""
    dump_path: str | None = None
    """Write every rollout of the run to this JSONL file."""


@dataclass
class TeacherConfig:
    """Which weights score the crop view."""

    kind: str = "ema"
    """ema | fixed | current | periodic | trust_region (docs/algorithm.md section 6)"""
    rate: float = 0.05
    """ema: update rate a step: teacher += rate * (student - teacher)."""
    every: int = 10
    """periodic: the teacher becomes a copy of the student every so many steps."""
    mix: float = 0.1
    """trust_region: share of the student's logits in the teacher's."""
    offload: bool = False
    """Keep the teacher's hidden states in host memory between the two passes."""


@dataclass
class ImportanceConfig:
    """Truncated importance weights between the rollout engine and the trainer."""

    max_weight: float | None = 2.0
    """Upper bound of a token's weight; null turns the weights off (the published run)."""


@dataclass
class DistillConfig:
    """The divergence and the teacher."""

    alpha: float = 0.5
    """Weight of the teacher in the generalised Jensen-Shannon divergence: 0 forward KL, 1 reverse KL."""
    top_k: int | None = 100
    """Size of the student's support; null uses the full vocabulary."""
    add_tail: bool = True
    """Append the remaining mass as one class; false renormalises over the support."""
    teacher_view: str = "crop"
    """crop | full | full_and_crop | boxed"""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    chunk_tokens: int | None = None
    """Response tokens whose logits exist at one time; null takes what fits 160 MiB of float32 logits on a rank."""


@dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 2e-6
    min_lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    warmup_steps: int = 10
    """Step k of the warm-up has lr * (k + 1) / warmup_steps, so the first update is not empty."""
    schedule: str = "constant"
    """constant | cosine (to min_lr at trainer.max_steps)"""


@dataclass
class PrecisionConfig:
    """Number formats."""

    dtype: str = "bf16"
    """bf16 | fp32: weights and activations; main weights, gradients and the EMA are always float32."""


@dataclass
class EvaluationConfig:
    """Accuracy on both views while training; needs answers, which training itself never reads."""

    path: str | None = None
    """Energon data set with answers."""
    every_n_steps: int = 0
    """Measure before the first step and every so many steps; 0 never measures."""
    num_samples: int = 256


@dataclass
class TrainerConfig:
    """Length of the run and Lightning's trainer."""

    max_steps: int = 65
    max_tokens_per_microbatch: int = 16384
    """Padded tokens of one microbatch; the wider of the two views counts."""
    log_every_n_steps: int = 1
    enable_progress_bar: bool = True


@dataclass
class Config:
    """A whole run."""

    seed: int = 1
    num_nodes: int = 1
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: dict[str, Any] = field(
        default_factory=lambda: {
            "exp_dir": "runs/vopd",
            "create_tensorboard_logger": True,
            "create_wandb_logger": False,
            "create_checkpoint_callback": False,
            "create_preemption_callback": False,
            "log_step_timing": False,
            "log_tflops_per_sec_per_gpu": False,
            "seconds_to_sleep": 0,
        }
    )
    """NeMo's exp_manager options, plus `exp_dir`: the folder everything of this run is written to."""


ConfigT = TypeVar("ConfigT", bound=Config)
ConfigStore.instance().store(name="nemo_vopd", node=Config)


def from_hydra(cfg: DictConfig, schema: type[ConfigT] = Config) -> ConfigT:  # type: ignore[assignment]
    """The typed configuration of a composed Hydra config, validated. `schema` may extend `Config`."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise OptionError(missing[0], "???", "has no default", f"give it on the command line: {missing[0]}=...")
    config: ConfigT = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), cfg))  # type: ignore[assignment]
    validate(config)
    return config


def _require(ok: bool, option: str, value: object, rule: str, remedy: str) -> None:
    if not ok:
        raise OptionError(option, value, rule, remedy)


def _at_least(minimum: float, **options: float) -> None:
    for name, value in options.items():
        option = name.replace("__", ".")
        _require(value >= minimum, option, value, f"must be at least {minimum}", f"set {option}={minimum} or more")


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, option, value, f"must be one of {', '.join(choices)}", f"set {option}={choices[0]}")


def validate(config: Config) -> None:
    """Check ranges and choices that need neither the model nor the world size. Raises OptionError."""
    rollout, distill, data, optimizer = config.rollout, config.distill, config.data, config.optimizer
    _one_of("model.layer_spec", config.model.layer_spec, ("auto", "local", "transformer_engine"))
    _one_of("rollout.engine", rollout.engine, ("megatron", "replay"))
    _one_of("distill.teacher_view", distill.teacher_view, ("crop", "full", "full_and_crop", "boxed"))
    _one_of("distill.teacher.kind", distill.teacher.kind, ("ema", "fixed", "current", "periodic", "trust_region"))
    _one_of("optimizer.schedule", optimizer.schedule, ("constant", "cosine"))
    _one_of("precision.dtype", config.precision.dtype, ("bf16", "fp32"))
    _at_least(
        1,
        num_nodes=config.num_nodes,
        parallel__tensor=config.parallel.tensor,
        parallel__pipeline=config.parallel.pipeline,
        parallel__virtual_pipeline=config.parallel.virtual_pipeline,
        data__batch_size=data.batch_size,
        data__max_prompt_length=data.max_prompt_length,
        data__shuffle_buffer_size=data.shuffle_buffer_size,
        data__crop__scale=data.crop.scale,
        data__crop__min_side=data.crop.min_side,
        rollout__n=rollout.n,
        rollout__max_response_length=rollout.max_response_length,
        rollout__max_batch_tokens=rollout.max_batch_tokens,
        distill__chunk_tokens=distill.chunk_tokens or 1,
        distill__teacher__every=distill.teacher.every,
        trainer__max_steps=config.trainer.max_steps,
        trainer__max_tokens_per_microbatch=config.trainer.max_tokens_per_microbatch,
        trainer__log_every_n_steps=config.trainer.log_every_n_steps,
    )
    _at_least(
        0,
        seed=config.seed,
        data__num_workers=data.num_workers,
        optimizer__lr=optimizer.lr,
        optimizer__min_lr=optimizer.min_lr,
        optimizer__weight_decay=optimizer.weight_decay,
        optimizer__clip_grad=optimizer.clip_grad,
        optimizer__warmup_steps=optimizer.warmup_steps,
        evaluation__every_n_steps=config.evaluation.every_n_steps,
        evaluation__num_samples=config.evaluation.num_samples,
    )
    for name, view in (("full", data.full), ("crop_pixels", data.crop_pixels)):
        _require(
            1 <= view.min_pixels <= view.max_pixels,
            f"data.{name}.min_pixels",
            view.min_pixels,
            f"must lie between 1 and data.{name}.max_pixels={view.max_pixels}",
            f"lower it or raise data.{name}.max_pixels",
        )
    _require(rollout.temperature > 0, "rollout.temperature", rollout.temperature, "must be positive", "set it to 1.0")
    _require(0 < rollout.top_p <= 1, "rollout.top_p", rollout.top_p, "must lie in (0, 1]", "set it to 1.0")
    _require(0 <= distill.alpha <= 1, "distill.alpha", distill.alpha, "must lie in [0, 1]", "set it to 0.5")
    if distill.top_k is not None:
        _at_least(1, distill__top_k=distill.top_k)
    for name, value in (("rate", distill.teacher.rate), ("mix", distill.teacher.mix)):
        _require(0 <= value <= 1, f"distill.teacher.{name}", value, "must lie in [0, 1]", "set it to 0.05")
    if distill.importance.max_weight is not None:
        weight = distill.importance.max_weight
        _require(weight > 0, "distill.importance.max_weight", weight, "must be positive or null", "set it to 2.0")
    _require(
        not config.exp_manager.get("create_checkpoint_callback", False),
        "exp_manager.create_checkpoint_callback",
        True,
        "checkpoints are not written yet",
        "set exp_manager.create_checkpoint_callback=false",
    )
    if rollout.engine == "replay":
        _require(
            rollout.path is not None,
            "rollout.path",
            rollout.path,
            "rollout=replay reads responses from a file",
            "give rollout.path=FILE, a file that rollout.dump_path wrote",
        )
    _require(
        config.parallel.context == 1,
        "parallel.context",
        config.parallel.context,
        "a sequence is not split over ranks: attention here is causal over whole right-padded sequences",
        "set parallel.context=1 and divide with parallel.tensor, parallel.sequence and parallel.pipeline",
    )
    _require(
        config.parallel.virtual_pipeline == 1 or config.parallel.pipeline > 2,
        "parallel.virtual_pipeline",
        config.parallel.virtual_pipeline,
        # Megatron's P2PCommunicator sends lengths to and receives them from both neighbours in one batch of
        # operations, which cannot be told apart when both are the same process
        "the interleaved schedule needs at least 3 stages: with 2, a stage's two neighbours are one process",
        "set parallel.virtual_pipeline=1 or parallel.pipeline=3 or more",
    )
    _require(
        config.evaluation.every_n_steps == 0 or config.evaluation.path is not None,
        "evaluation.path",
        config.evaluation.path,
        "accuracy while training needs a data set with answers",
        "give evaluation.path=DIRECTORY or set evaluation.every_n_steps=0",
    )
    sequence_ok = not config.parallel.sequence or config.parallel.tensor > 1
    _require(
        sequence_ok,
        "parallel.sequence",
        config.parallel.sequence,
        "sequence parallelism splits along a tensor-parallel group, and parallel.tensor=1",
        "set parallel.sequence=false or parallel.tensor=2 or more",
    )
