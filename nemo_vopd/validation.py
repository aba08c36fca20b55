"""From Hydra to a checked `Config`: bounds (config.py has them) and combinations. Values are never changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_vopd.bounds import check_bounds
from nemo_vopd.command_line import did_you_mean, options
from nemo_vopd.config import Config, CropConfig
from nemo_vopd.errors import OptionError


def typed[AnyT](cfg: DictConfig, schema: type[AnyT]) -> AnyT:
    """The composed Hydra config as a `schema`. Raises OptionError when a value is missing or out of bounds."""
    _check_names(cfg, schema)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise OptionError(missing[0], "???", "has no default", f"give it on the command line: {missing[0]}=...")
    config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), cfg))
    check_bounds(config)
    return config


def _check_names(cfg: DictConfig, schema: type) -> None:
    """Raise OptionError for an option that `schema` does not have, or whose value is taken from the environment.

    Hydra itself accepts unknown options that are written with a plus.
    """
    known = {option.name for option in options(schema)}
    free = {option.name for option in options(schema) if option.is_free}
    for name, value in _leaves(OmegaConf.to_container(cfg), known):  # type: ignore[arg-type]
        parents = {name.rsplit(".", i)[0] for i in range(name.count(".") + 1)}
        if name not in known and not parents & free:
            raise OptionError(name, value, "no such option", did_you_mean(name, schema))
        variable = re.search(r"\$\{oc\.env:(?!NEMO_VOPD_)([^,}]*)", str(value))
        if variable:
            rule = f"would write the environment variable {variable[1]} into config.yaml and every checkpoint"
            raise OptionError(name, value, rule, "write the value itself; libraries read keys from the environment")


def _leaves(values: dict, known: set[str], prefix: str = "") -> Iterator[tuple[str, object]]:
    """(full name, value as it is written) of every option."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in known:
            yield from _leaves(value, known, f"{name}.")
        else:
            yield name, value


def from_hydra[ConfigT: Config](cfg: DictConfig, schema: type[ConfigT] = Config) -> ConfigT:  # type: ignore[assignment]
    """The typed configuration of a composed Hydra config, validated. `schema` may extend `Config`."""
    config = typed(cfg, schema)
    validate(config)
    return config


def _require(ok: bool, option: str, value: object, rule: str, remedy: str) -> None:
    if not ok:
        raise OptionError(option, value, rule, remedy)


def _check_fp8(config: Config) -> None:
    options = config.precision.fp8
    if options.recipe is None:
        return
    first, last = options.first_layers_bf16, options.last_layers_bf16
    rule = "needs bf16 weights"
    _require(config.precision.dtype != "fp32", "precision.dtype", "fp32", f"precision.fp8 {rule}", "set it to bf16")
    remedy = "set it to auto or choose precision=bf16"
    local = config.model.layer_spec == "local"
    _require(not local, "model.layer_spec", "local", "has no FP8: precision.fp8 needs Transformer Engine", remedy)
    rule = "delayed scaling follows all layers of a pass together; none can stay in bf16"
    remedy = "set first_layers_bf16 and last_layers_bf16 to 0, or precision=fp8_tensorwise"
    _require(options.recipe != "delayed" or not (first or last), "precision.fp8.recipe", "delayed", rule, remedy)


def validate(config: Config) -> None:
    """Check combinations of options, as far as they need neither the model nor the world size. Raises OptionError."""
    rollout, distill, data = config.rollout, config.distill, config.data
    _check_fp8(config)
    check_crop(data.crop, "data.crop")
    for name, view in (("full", data.full), ("crop_pixels", data.crop_pixels)):
        _require(
            1 <= view.min_pixels <= view.max_pixels,
            f"data.{name}.min_pixels",
            view.min_pixels,
            f"must lie between 1 and data.{name}.max_pixels={view.max_pixels}",
            f"lower it or raise data.{name}.max_pixels",
        )
    seconds(config.trainer.max_time)
    _check_early_stop(config)
    _require(
        not config.exp_manager.get("create_checkpoint_callback", False),
        "exp_manager.create_checkpoint_callback",
        True,
        "NeMo's callback knows neither the teacher nor the loader; checkpoints are written by this program",
        "set exp_manager.create_checkpoint_callback=false and checkpoint.every_n_steps",
    )
    _require(all(rollout.stop), "rollout.stop", rollout.stop, "holds an empty text, which ends everything", "remove it")
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
        rollout.engine != "vllm" or rollout.vllm.timeout_seconds <= 60 * config.parallel.timeout_minutes,
        "rollout.vllm.timeout_seconds",
        rollout.vllm.timeout_seconds,
        f"is longer than a run may wait, parallel.timeout_minutes={config.parallel.timeout_minutes:g}",
        "lower it or raise parallel.timeout_minutes",
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
    _require(
        crop.max_aspect is None or not crop.square,
        f"{option}.max_aspect",
        crop.max_aspect,
        f"has no effect on square crops, and {option}.square=true",
        f"set {option}.square=false or {option}.max_aspect=null",
    )


def _check_early_stop(config: Config) -> None:
    rule = config.distill.early_stop
    if rule.metric is None:
        return
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
