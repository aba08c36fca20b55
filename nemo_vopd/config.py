"""Every option of a run as dataclasses: Hydra fills them, unknown keys and wrong types fail at the start.

The defaults are the published run (docs/algorithm.md section 2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore


@dataclass
class FreezeConfig:
    """Parts that are not trained: they need no gradient, no optimizer state and no second copy for the teacher."""

    vision: bool = False
    """The vision tower, but for its projector."""
    projector: bool = False
    """What maps vision features into the language model (Hugging Face: visual.merger)."""
    language: bool = False
    """The language model, embedding and head included."""


@dataclass
class ModelConfig:
    """Which vision-language model is trained."""

    hf_path: str = "???"
    """Hugging Face directory: config.json, *.safetensors, tokenizer, preprocessor."""
    layer_spec: str = "auto"
    """auto | local | transformer_engine: what serves the language layers; auto: the last, for bf16 on a GPU."""
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    architecture: dict[str, Any] | None = None
    """Contents of the model's config.json, for recipes/plan.py where `hf_path` is not at hand."""


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
    timeout_minutes: int = 10
    """The longest wait for another rank in an exchange of any process group; then the run ends."""


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
    margin: int = 0
    """Pixels of the full image added at each edge, after `scale`."""
    max_upscale: float | None = None
    """The crop grows until resizing it up to crop_pixels.min_pixels lengthens its sides at most so many times."""
    max_aspect: float | None = None
    """With square=false: the shorter side grows until longer / shorter is at most this."""


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
    max_dropped_fraction: float = 0.1
    """The run ends when more than this share of the records it has read could not be used (and more than two)."""
    num_workers: int = 2
    """Loader processes of each rank; 0 reads in the training process."""


@dataclass
class VLLMConfig:
    """Servers of rollout.engine=vllm (docs/rollouts.md)."""

    urls: list[str] = field(default_factory=list)
    """http://HOST:PORT of each server, shared out among the data-parallel ranks; empty: the run starts one itself."""
    python: str = ".venv-vllm/bin/python"
    """Interpreter of vLLM's environment, for a server that the run starts."""
    arguments: list[str] = field(default_factory=list)
    """Further options of `vllm serve` for it."""
    port: int = 0
    """Its port on this machine; 0 takes a free one."""
    start_seconds: float = 600.0
    """How long it may take to answer."""
    sync: str = "folder"
    """folder | nccl | none: how the student's weights reach the servers after each step."""
    sync_folder: str | None = None
    """On storage that all ranks and servers share; null: `rollout_weights` in `exp_manager.exp_dir`."""
    timeout_seconds: float = 600.0
    """Of one request."""
    retries: int = 3
    """How often a request is tried again before the run ends, with pauses of 1, 2, 4 ... seconds."""
    max_concurrent_requests: int = 64


@dataclass
class RolloutConfig:
    """How responses are produced."""

    engine: str = "megatron"
    """megatron | replay | vllm"""
    n: int = 8
    """Responses for each prompt."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_response_length: int = 1024
    stop: list[str] = field(default_factory=list)
    """Texts that end a response, besides the model's end tokens; the token that completes one is kept."""
    max_batch_tokens: int = 65536
    """Prompt and response tokens decoded together on one rank: bounds the KV cache."""
    max_mismatch: float | None = None
    """The run ends when the engine's log-probs are on average this many nats off the trainer's; null never does."""
    path: str | None = None
    """Replay: the file that `rollout.dump_path` wrote."""
    ahead: bool = False
    """Sample the next step's responses while this one trains (vllm): one step off-policy, corrected by
    distill.importance."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
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
class EarlyStopConfig:
    """End the run when a monitored number leaves its range (late collapse, docs/troubleshooting.md)."""

    metric: str | None = None
    """entropy | mean_response_length | distinct_2 | student_topk_mass | full_accuracy | crop_accuracy; null: off."""
    min: float | None = None
    max: float | None = None
    patience: int = 3
    """Measurements in a row outside [min, max] before the run ends."""


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
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)
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
class FP8Config:
    """FP8 matrix products of the language layers in both passes (Transformer Engine); sampling stays in bf16."""

    recipe: str | None = None
    """null | delayed | tensorwise | blockwise: where the scales come from."""
    format: str = "hybrid"
    """hybrid (e4m3 forward, e5m2 for gradients) | e4m3"""
    amax_history: int = 1024
    """delayed: microbatches whose largest values are remembered."""
    amax_algorithm: str = "max"
    """delayed: max | most_recent of them decides the scale."""
    first_layers_bf16: int = 0
    """tensorwise, blockwise: so many layers at the start of the model stay in bf16."""
    last_layers_bf16: int = 0


@dataclass
class PrecisionConfig:
    """Number formats."""

    dtype: str = "bf16"
    """bf16 | fp32 | auto (what config.json says): weights and activations; main weights, gradients and the EMA are
    always float32."""
    fp8: FP8Config = field(default_factory=FP8Config)


@dataclass
class EvaluationConfig:
    """Accuracy on both views while training; needs answers, which training itself never reads."""

    path: str | None = None
    """Energon data set with answers."""
    every_n_steps: int = 0
    """Measure before the first step and every so many steps; 0 never measures."""
    num_samples: int = 256
    num_traces: int = 4
    """Responses that the report of the finished run shows token by token, student beside teacher."""


@dataclass
class CheckpointConfig:
    """Student, teacher, optimizer, loader position and counters, in `<exp_manager.exp_dir>/checkpoints`."""

    every_n_steps: int = 10
    """Save every so many steps and at the end; 0 saves only when a signal or trainer.max_time ends the run."""
    keep_last: int = 2
    """Complete checkpoints that stay; older ones are deleted."""
    asynchronous: bool = False
    """Write in the background while training goes on (needs host memory for a copy of the state)."""


@dataclass
class TrainerConfig:
    """Length of the run and Lightning's trainer."""

    max_steps: int = 65
    max_tokens_per_microbatch: int = 16384
    """Most tokens of one microbatch in either view, unless one sequence has more."""
    recompute: str = "none"
    """none | mlp | layers: what the backward pass of the language layers computes again instead of keeping it."""
    recompute_vision: bool = False
    """Compute the blocks of the vision tower again instead of keeping 10 GB for an image of a million pixels."""
    max_time: str | None = None
    """Wall-clock limit DD:HH:MM:SS: no step is begun that would end after it; the run saves and can be resumed."""
    max_skipped_updates: int = 10
    """The run ends after so many updates in a row with a gradient that is not finite."""
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
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: dict[str, Any] = field(
        default_factory=lambda: {
            "exp_dir": "runs/vopd",
            "resume_if_exists": True,
            "resume_ignore_no_checkpoint": True,
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


ConfigStore.instance().store(name="nemo_vopd", node=Config)
