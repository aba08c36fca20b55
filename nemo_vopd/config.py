"""Every option of a run as dataclasses: Hydra fills them, unknown keys and wrong types fail at the start.

The defaults are the published run (docs/algorithm.md section 2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

from nemo_vopd.bounds import bounded

MONITORS = ("entropy", "mean_response_length", "distinct_2", "student_topk_mass", "full_accuracy", "crop_accuracy")


@dataclass
class FreezeConfig:
    """Parts that are not trained: they need no gradient, no optimizer state and no second copy for the teacher."""

    vision: bool = False
    """Whether the vision tower without its projector stays as it is."""
    projector: bool = False
    """Whether the map from vision features into the language model stays as it is (Hugging Face: visual.merger)."""
    language: bool = False
    """Whether the language model with embedding and head stays as it is."""


@dataclass
class ModelConfig:
    """Which vision-language model is trained."""

    hf_path: str = "???"
    """Hugging Face directory with config.json, *.safetensors, tokenizer and preprocessor."""
    layer_spec: str = bounded("auto", one_of=("auto", "local", "transformer_engine"))
    """Implementation of the language layers; auto is Transformer Engine where it is installed and the dtype is bf16."""
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    architecture: dict[str, Any] | None = None
    """Contents of the model's config.json, for recipes/plan.py where `hf_path` is not at hand."""


@dataclass
class ParallelConfig:
    """How the model is split; the data-parallel size follows from the world size."""

    tensor: int = bounded(1, at_least=1)
    """Tensor-parallel size, which divides attention heads, feed-forward columns and the vocabulary."""
    pipeline: int = bounded(1, at_least=1)
    """Pipeline-parallel size, which divides the layers."""
    virtual_pipeline: int = bounded(1, at_least=1)
    """Number of chunks of layers on each pipeline stage (Megatron's interleaved schedule)."""
    pipeline_layout: list[int] | None = None
    """Number of language layers of each pipeline stage or chunk, in order of depth; null divides them evenly."""
    context: int = 1
    """Context-parallel size; only 1 is supported."""
    sequence: bool = False
    """Whether norms and residuals are split along the sequence within a tensor group (sequence parallelism)."""
    timeout_minutes: float = bounded(10.0, above=0)
    """Longest wait, in minutes, for another rank, the loader's processes or a sign of work; then the run ends."""


@dataclass
class PixelConfig:
    """Image resizing of one view, in pixels of the resized image (Qwen's smart resize)."""

    min_pixels: int = 3136
    max_pixels: int = 1003520


@dataclass
class CropConfig:
    """How the teacher's evidence-centred crop follows from the box."""

    scale: float = bounded(2.0, at_least=1)
    """Ratio of the crop's side to the longer side of the box."""
    min_side: int = bounded(28, at_least=1)
    """Smallest side of a crop in pixels of the full image."""
    square: bool = True
    """Whether crops are square; otherwise they keep the aspect of the box."""
    margin: int = bounded(0, at_least=0)
    """Number of pixels of the full image added at each edge, after `scale`."""
    max_upscale: float | None = bounded(None, at_least=1)
    """Largest factor by which resizing to crop_pixels.min_pixels may lengthen the sides; small crops grow for it."""
    max_aspect: float | None = bounded(None, at_least=1)
    """Largest ratio of the longer to the shorter side with square=false; the shorter side grows for it."""


@dataclass
class DataConfig:
    """The prompts: an Energon data set written by recipes/prepare_data.py."""

    path: str = "???"
    """Directory of the Energon data set."""
    batch_size: int = bounded(96, at_least=1)
    """Number of prompts of one optimizer step, over all data-parallel ranks."""
    max_prompt_length: int = bounded(8192, at_least=1)
    """Largest number of tokens of a prompt in either view; records with longer ones are dropped and counted."""
    full: PixelConfig = field(default_factory=PixelConfig)
    crop_pixels: PixelConfig = field(default_factory=PixelConfig)
    crop: CropConfig = field(default_factory=CropConfig)
    draw_box: bool = False
    """Whether the evidence box is drawn on the student's full image (docs/algorithm.md section 4)."""
    question_hint: str = ""
    """Text appended to the question in both views."""
    max_dropped_fraction: float = bounded(0.1, at_least=0, at_most=1)
    """Largest share of the records read so far that may be unusable (beyond the first two) before the run ends."""
    num_workers: int = bounded(2, at_least=0)
    """Number of loader processes of each rank; with 0 the training process reads."""


@dataclass
class VLLMConfig:
    """Servers of rollout.engine=vllm (docs/rollouts.md)."""

    urls: list[str] = field(default_factory=list)
    """Addresses http://HOST:PORT, shared out among the data-parallel ranks; without any the run starts a server."""
    python: str = ".venv-vllm/bin/python"
    """Interpreter of vLLM's environment, for a server that the run starts."""
    arguments: list[str] = field(default_factory=list)
    """Further options of `vllm serve` for that server."""
    port: int = bounded(0, at_least=0, at_most=65535)
    """Port of that server; 0 takes a free one."""
    start_seconds: float = bounded(600.0, at_least=1)
    """Longest time until that server answers, in seconds."""
    sync: str = bounded("folder", one_of=("folder", "nccl", "none"))
    """Way of the student's weights to the servers after each step."""
    sync_folder: str | None = None
    """Folder for sync=folder, on storage that all ranks and servers share; null means one in `exp_manager.exp_dir`."""
    timeout_seconds: float = bounded(600.0, at_least=1)
    """Time limit of one request in seconds."""
    retries: int = bounded(3, at_least=0)
    """Number of times that a request is tried again before the run ends, with pauses of 1, 2, 4 ... seconds."""
    max_concurrent_requests: int = bounded(64, at_least=1)
    """Largest number of requests under way from one rank."""


@dataclass
class RolloutConfig:
    """How responses are produced."""

    engine: str = bounded("megatron", one_of=("megatron", "replay", "vllm"))
    """Source of responses: the training model itself, a file, or vLLM servers."""
    n: int = bounded(8, at_least=1)
    """Number of responses sampled for each prompt."""
    temperature: float = bounded(1.0, above=0)
    """Sampling temperature, which also divides the logits in the loss."""
    top_p: float = bounded(1.0, above=0, at_most=1)
    """Probability mass of the nucleus that tokens are drawn from."""
    max_response_length: int = bounded(1024, at_least=1)
    """Largest number of tokens of a response."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a response, besides the model's end tokens; the token that completes one is kept."""
    max_batch_tokens: int = bounded(65536, at_least=1)
    """Largest number of prompt and response tokens in the KV cache of one rank."""
    max_mismatch: float | None = bounded(None, above=0, suggest=0.1)
    """Largest mean difference between the log-probs of engine and trainer, in nats, before the run ends; null: none."""
    path: str | None = None
    """File of engine=replay, as `rollout.dump_path` wrote it."""
    ahead: bool = False
    """Whether vLLM samples one step off-policy, while the step before trains; distill.importance corrects for it."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    dump_path: str | None = None
    """JSONL file that every rollout of the run is written to."""


@dataclass
class TeacherConfig:
    """Which weights score the crop view."""

    kind: str = bounded("ema", one_of=("ema", "fixed", "current", "periodic", "trust_region"))
    """Rule by which the teacher follows the student (docs/algorithm.md section 6)."""
    rate: float = bounded(0.05, at_least=0, at_most=1)
    """Update rate of kind=ema: teacher += rate * (student - teacher) after each step."""
    every: int = bounded(10, at_least=1)
    """Number of steps after which kind=periodic copies the student."""
    mix: float = bounded(0.1, at_least=0, at_most=1)
    """Share of the student's logits in the teacher's with kind=trust_region."""
    offload: bool = False
    """Whether the teacher's hidden states wait in host memory between the two passes."""


@dataclass
class ImportanceConfig:
    """Truncated importance weights between the rollout engine and the trainer."""

    max_weight: float | None = bounded(2.0, above=0)
    """Upper bound of a token's weight; null turns the weights off (the published run)."""


@dataclass
class EarlyStopConfig:
    """End the run when a monitored number leaves its range (late collapse, docs/troubleshooting.md)."""

    metric: str | None = bounded(None, one_of=MONITORS)
    """Number that is watched; null watches none."""
    min: float | None = None
    max: float | None = None
    patience: int = bounded(3, at_least=1)
    """Number of measurements in a row outside the range before the run ends."""


@dataclass
class DistillConfig:
    """The divergence and the teacher."""

    alpha: float = bounded(0.5, at_least=0, at_most=1)
    """Weight of the teacher in the generalised Jensen-Shannon divergence: 0 is forward KL, 1 is reverse KL."""
    top_k: int | None = bounded(100, at_least=1)
    """Size of the student's support; null uses the full vocabulary."""
    add_tail: bool = True
    """Whether the remaining mass is one more class; otherwise the support is renormalised."""
    teacher_view: str = bounded("crop", one_of=("crop", "full", "full_and_crop", "boxed"))
    """Images in the teacher's prompt."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    chunk_tokens: int | None = bounded(None, at_least=1)
    """Number of response tokens whose logits exist at one time; null chooses by the device."""


@dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = bounded(2e-6, at_least=0)
    """Learning rate after the warm-up."""
    min_lr: float = bounded(0.0, at_least=0)
    """Learning rate at the end of schedule=cosine."""
    beta1: float = bounded(0.9, at_least=0, below=1)
    beta2: float = bounded(0.999, at_least=0, below=1)
    eps: float = bounded(1e-8, at_least=0)
    """Term added to the root of the second moment."""
    weight_decay: float = bounded(0.01, at_least=0)
    """Decoupled weight decay of all parameters, vectors included."""
    clip_grad: float = bounded(1.0, at_least=0)
    """Largest global norm of the gradient; 0 does not clip."""
    warmup_steps: int = bounded(10, at_least=0)
    """Number of warm-up steps; step k has lr * (k + 1) / warmup_steps, so that the first update is not empty."""
    schedule: str = bounded("constant", one_of=("constant", "cosine"))
    """Learning rate after the warm-up: constant, or along a cosine to min_lr at trainer.max_steps."""


@dataclass
class FP8Config:
    """FP8 matrix products of the language layers in both passes (Transformer Engine); sampling stays in bf16."""

    recipe: str | None = bounded(None, one_of=("delayed", "tensorwise", "blockwise"))
    """Source of the scales; null computes in bf16."""
    format: str = bounded("hybrid", one_of=("hybrid", "e4m3"))
    """Number format; hybrid is e4m3 in the forward pass and e5m2 for gradients."""
    amax_history: int = bounded(1024, at_least=1)
    """Number of microbatches whose largest values recipe=delayed remembers."""
    amax_algorithm: str = bounded("max", one_of=("max", "most_recent"))
    """Choice among these values that decides the scale."""
    first_layers_bf16: int = bounded(0, at_least=0)
    """Number of layers at the start of the model that stay in bf16 (tensorwise, blockwise)."""
    last_layers_bf16: int = bounded(0, at_least=0)


@dataclass
class PrecisionConfig:
    """Number formats."""

    dtype: str = bounded("bf16", one_of=("bf16", "fp32", "auto"))
    """Format of weights and activations; auto follows config.json. Main weights and averages are always float32."""
    fp8: FP8Config = field(default_factory=FP8Config)


@dataclass
class EvaluationConfig:
    """Accuracy on both views while training; needs answers, which training itself never reads."""

    path: str | None = None
    """Energon data set with answers."""
    every_n_steps: int = bounded(0, at_least=0)
    """Number of steps between measurements, the first of which precedes the first step; 0 never measures."""
    num_samples: int = bounded(256, at_least=1)
    """Number of records that are asked about."""
    num_traces: int = bounded(4, at_least=0)
    """Number of responses that the report shows token by token, student beside teacher."""


@dataclass
class CheckpointConfig:
    """Student, teacher, optimizer, loader position and counters, in `<exp_manager.exp_dir>/checkpoints`."""

    every_n_steps: int = bounded(10, at_least=0)
    """Number of steps between saves; 0 saves only when a signal or trainer.max_time ends the run."""
    keep_last: int = bounded(2, at_least=1)
    """Number of complete checkpoints that stay; older ones are deleted."""
    asynchronous: bool = False
    """Whether files are written while training goes on, which needs host memory for a copy of the state."""


@dataclass
class TrainerConfig:
    """Length of the run and Lightning's trainer."""

    max_steps: int = bounded(65, at_least=1)
    max_tokens_per_microbatch: int = bounded(16384, at_least=1)
    """Largest number of tokens of a microbatch in either view, unless one sequence has more."""
    recompute: str = bounded("none", one_of=("none", "mlp", "layers"))
    """Part of the language layers that the backward pass computes again instead of keeping it."""
    recompute_vision: bool = False
    """Whether the backward pass computes the vision tower again instead of keeping 10 GB for a million pixels."""
    max_time: str | None = None
    """Wall-clock limit DD:HH:MM:SS; the run saves before a step would pass it, and can be resumed."""
    max_skipped_updates: int = bounded(10, at_least=1)
    """Number of updates in a row without a finite gradient after which the run ends."""
    log_every_n_steps: int = bounded(1, at_least=1)
    """Number of steps between lines in TensorBoard."""
    enable_progress_bar: bool = True
    """Whether one live line shows the step, the loss and the time left."""


@dataclass
class Config:
    """A whole run."""

    seed: int = bounded(1, at_least=0)
    """Seed of the order of prompts and of all draws."""
    num_nodes: int = bounded(1, at_least=1)
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
            **dict.fromkeys(("create_checkpoint_callback", "create_preemption_callback"), False),
            **dict.fromkeys(("log_step_timing", "log_tflops_per_sec_per_gpu"), False),
            "seconds_to_sleep": 0,
        }
    )
    """NeMo's exp_manager options, plus `exp_dir`: the folder everything of this run is written to."""


ConfigStore.instance().store(name="nemo_vopd", node=Config)
