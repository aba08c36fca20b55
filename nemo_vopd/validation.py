"""From Hydra to a checked `Config`: unknown keys, types, ranges and combinations. Values are never changed."""

from __future__ import annotations

import math
from typing import TypeVar

from omegaconf import DictConfig, OmegaConf

from nemo_vopd.config import Config, CropConfig
from nemo_vopd.errors import OptionError

AnyT = TypeVar("AnyT")
ConfigT = TypeVar("ConfigT", bound=Config)


def typed[AnyT](cfg: DictConfig, schema: type[AnyT]) -> AnyT:
    """The composed Hydra config as a `schema` dataclass. Raises OptionError when a value is missing."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise OptionError(missing[0], "???", "has no default", f"give it on the command line: {missing[0]}=...")
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), cfg))  # type: ignore[return-value]


def from_hydra[ConfigT: Config](cfg: DictConfig, schema: type[ConfigT] = Config) -> ConfigT:  # type: ignore[assignment]
    """The typed configuration of a composed Hydra config, validated. `schema` may extend `Config`."""
    config = typed(cfg, schema)
    validate(config)
    return config


def _require(ok: bool, option: str, value: object, rule: str, remedy: str) -> None:
    if not ok:
        raise OptionError(option, value, rule, remedy)


def _at_least(minimum: float, **options: float) -> None:
    for name, value in options.items():
        option = name.replace("__", ".")
        _require(math.isfinite(value), option, value, "must be a finite number", f"set {option}={minimum} or more")
        _require(value >= minimum, option, value, f"must be at least {minimum}", f"set {option}={minimum} or more")


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, option, value, f"must be one of {', '.join(choices)}", f"set {option}={choices[0]}")


def _check_fp8(config: Config) -> None:
    options = config.precision.fp8
    if options.recipe is None:
        return
    _one_of("precision.fp8.recipe", options.recipe, ("delayed", "tensorwise", "blockwise"))
    _one_of("precision.fp8.format", options.format, ("hybrid", "e4m3"))
    _one_of("precision.fp8.amax_algorithm", options.amax_algorithm, ("max", "most_recent"))
    _at_least(1, precision__fp8__amax_history=options.amax_history)
    first, last = options.first_layers_bf16, options.last_layers_bf16
    _at_least(0, precision__fp8__first_layers_bf16=first, precision__fp8__last_layers_bf16=last)
    rule = "needs bf16 weights"
    _require(config.precision.dtype != "fp32", "precision.dtype", "fp32", f"precision.fp8 {rule}", "set it to bf16")
    remedy = "set it to auto or choose precision=bf16"
    local = config.model.layer_spec == "local"
    _require(not local, "model.layer_spec", "local", "has no FP8: precision.fp8 needs Transformer Engine", remedy)
    rule = "delayed scaling follows all layers of a pass together; none can stay in bf16"
    remedy = "set first_layers_bf16 and last_layers_bf16 to 0, or precision=fp8_tensorwise"
    _require(options.recipe != "delayed" or not (first or last), "precision.fp8.recipe", "delayed", rule, remedy)


def validate(config: Config) -> None:
    """Check ranges and choices that need neither the model nor the world size. Raises OptionError."""
    rollout, distill, data, optimizer = config.rollout, config.distill, config.data, config.optimizer
    _one_of("model.layer_spec", config.model.layer_spec, ("auto", "local", "transformer_engine"))
    _one_of("rollout.engine", rollout.engine, ("megatron", "replay", "vllm"))
    _one_of("rollout.vllm.sync", rollout.vllm.sync, ("folder", "nccl", "none"))
    _one_of("distill.teacher_view", distill.teacher_view, ("crop", "full", "full_and_crop", "boxed"))
    _one_of("distill.teacher.kind", distill.teacher.kind, ("ema", "fixed", "current", "periodic", "trust_region"))
    _one_of("optimizer.schedule", optimizer.schedule, ("constant", "cosine"))
    _one_of("precision.dtype", config.precision.dtype, ("bf16", "fp32", "auto"))
    _one_of("trainer.recompute", config.trainer.recompute, ("none", "mlp", "layers"))
    _check_fp8(config)
    check_crop(data.crop, "data.crop")
    _at_least(
        1,
        num_nodes=config.num_nodes,
        parallel__tensor=config.parallel.tensor,
        parallel__pipeline=config.parallel.pipeline,
        parallel__virtual_pipeline=config.parallel.virtual_pipeline,
        parallel__timeout_minutes=config.parallel.timeout_minutes,
        data__batch_size=data.batch_size,
        data__max_prompt_length=data.max_prompt_length,
        rollout__n=rollout.n,
        rollout__max_response_length=rollout.max_response_length,
        rollout__max_batch_tokens=rollout.max_batch_tokens,
        rollout__vllm__timeout_seconds=rollout.vllm.timeout_seconds,
        rollout__vllm__start_seconds=rollout.vllm.start_seconds,
        rollout__vllm__max_concurrent_requests=rollout.vllm.max_concurrent_requests,
        distill__chunk_tokens=distill.chunk_tokens or 1,
        distill__teacher__every=distill.teacher.every,
        trainer__max_steps=config.trainer.max_steps,
        trainer__max_tokens_per_microbatch=config.trainer.max_tokens_per_microbatch,
        trainer__max_skipped_updates=config.trainer.max_skipped_updates,
        trainer__log_every_n_steps=config.trainer.log_every_n_steps,
        evaluation__num_samples=config.evaluation.num_samples,
        checkpoint__keep_last=config.checkpoint.keep_last,
        distill__early_stop__patience=distill.early_stop.patience,
    )
    _at_least(
        0,
        seed=config.seed,
        data__num_workers=data.num_workers,
        rollout__vllm__port=rollout.vllm.port,
        rollout__vllm__retries=rollout.vllm.retries,
        optimizer__lr=optimizer.lr,
        optimizer__min_lr=optimizer.min_lr,
        optimizer__weight_decay=optimizer.weight_decay,
        optimizer__clip_grad=optimizer.clip_grad,
        optimizer__warmup_steps=optimizer.warmup_steps,
        checkpoint__every_n_steps=config.checkpoint.every_n_steps,
        evaluation__every_n_steps=config.evaluation.every_n_steps,
        evaluation__num_traces=config.evaluation.num_traces,
        optimizer__eps=optimizer.eps,
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
    fraction = data.max_dropped_fraction
    _require(0 <= fraction <= 1, "data.max_dropped_fraction", fraction, "must lie in [0, 1]", "set it to 0.1")
    seconds(config.trainer.max_time)
    _check_early_stop(config)
    _require(0 <= distill.alpha <= 1, "distill.alpha", distill.alpha, "must lie in [0, 1]", "set it to 0.5")
    if distill.top_k is not None:
        _at_least(1, distill__top_k=distill.top_k)
    for name, value, default in (("rate", distill.teacher.rate, 0.05), ("mix", distill.teacher.mix, 0.1)):
        _require(0 <= value <= 1, f"distill.teacher.{name}", value, "must lie in [0, 1]", f"set it to {default}")
    for name, value in (("beta1", optimizer.beta1), ("beta2", optimizer.beta2)):
        _require(0 <= value < 1, f"optimizer.{name}", value, "must lie in [0, 1)", "set it to 0.9 or 0.999")
    if distill.importance.max_weight is not None:
        weight = distill.importance.max_weight
        _require(weight > 0, "distill.importance.max_weight", weight, "must be positive or null", "set it to 2.0")
    _require(
        not config.exp_manager.get("create_checkpoint_callback", False),
        "exp_manager.create_checkpoint_callback",
        True,
        "NeMo's callback knows neither the teacher nor the loader; checkpoints are written by this program",
        "set exp_manager.create_checkpoint_callback=false and checkpoint.every_n_steps",
    )
    _require(all(rollout.stop), "rollout.stop", rollout.stop, "holds an empty text, which ends everything", "remove it")
    limit = rollout.max_mismatch
    _require(limit is None or limit > 0, "rollout.max_mismatch", limit, "must be positive or null", "set it to 0.1")
    if rollout.engine == "replay":
        _require(
            rollout.path is not None,
            "rollout.path",
            rollout.path,
            "rollout=replay reads responses from a file",
            "give rollout.path=FILE, a file that rollout.dump_path wrote",
        )
    _require(
        not rollout.ahead or (rollout.engine == "vllm" and distill.importance.max_weight is not None),
        "rollout.ahead",
        rollout.ahead,
        "needs an engine that works in the background, and importance weights for what is one step off-policy",
        "set rollout=vllm and distill.importance.max_weight=2.0, or rollout.ahead=false",
    )
    _require(
        config.parallel.context == 1,
        "parallel.context",
        config.parallel.context,
        "a sequence is not split over ranks",
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


def check_crop(crop: CropConfig, option: str) -> None:
    """Check the crop policy that stands at `option` (data.crop, in prepare_data.py crop). Raises OptionError."""
    for name, value, least in (("scale", crop.scale, 1), ("min_side", crop.min_side, 1), ("margin", crop.margin, 0)):
        remedy = f"set {option}.{name}={least} or more"
        _require(math.isfinite(value), f"{option}.{name}", value, "must be a finite number", remedy)
        _require(value >= least, f"{option}.{name}", value, f"must be at least {least}", remedy)
    for name, limit in (("max_upscale", crop.max_upscale), ("max_aspect", crop.max_aspect)):
        ok = limit is None or (math.isfinite(limit) and limit >= 1)
        rule, remedy = "must be at least 1 or null", f"set {option}.{name}=2 or null"
        _require(ok, f"{option}.{name}", limit, rule, remedy)
    _require(
        crop.max_aspect is None or not crop.square,
        f"{option}.max_aspect",
        crop.max_aspect,
        f"has no effect on square crops, and {option}.square=true",
        f"set {option}.square=false or {option}.max_aspect=null",
    )


MONITORS = ("entropy", "mean_response_length", "distinct_2", "student_topk_mass", "full_accuracy", "crop_accuracy")


def _check_early_stop(config: Config) -> None:
    rule = config.distill.early_stop
    if rule.metric is None:
        return
    _one_of("distill.early_stop.metric", rule.metric, MONITORS)
    _require(
        rule.min is not None or rule.max is not None,
        "distill.early_stop.metric",
        rule.metric,
        "has no limit to compare with",
        "give distill.early_stop.min or distill.early_stop.max",
    )
    _require(
        not rule.metric.endswith("_accuracy") or config.evaluation.every_n_steps > 0,
        "distill.early_stop.metric",
        rule.metric,
        "is not measured in this run",
        "give evaluation.path and evaluation.every_n_steps",
    )


def seconds(max_time: str | None) -> float | None:
    """Seconds of `trainer.max_time` (DD:HH:MM:SS). Raises OptionError."""
    if max_time is None:
        return None
    parts = max_time.split(":")
    ok = len(parts) == 4 and all(part.isdigit() for part in parts)
    _require(ok, "trainer.max_time", max_time, "must be DD:HH:MM:SS", "write 00:03:45:00 for 3 hours 45 minutes")
    days, hours, minutes, rest = map(int, parts)
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)
