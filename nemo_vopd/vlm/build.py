"""Builds this rank's stage of a vision-language model from its `config.json`, and fills in its weights."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_vopd.config import Config, FreezeConfig
from nemo_vopd.errors import OptionError
from nemo_vopd.hf_directory import read_config, refusal
from nemo_vopd.mcore import cpu, fp8, parallel
from nemo_vopd.mcore.layers import recompute_options
from nemo_vopd.mcore.stage import Stage
from nemo_vopd.vlm import qwen2_5_vl, qwen3_vl
from nemo_vopd.vlm.layout import ModelShape, check_layout
from nemo_vopd.vlm.served import check_served
from nemo_vopd.vlm.weights.names import is_frozen
from nemo_vopd.vlm.weights.reading import load_hf, open_weights

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_FAMILIES: dict[str, Any] = {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}
"""`model_type` of config.json -> module with `Model`, `model_shape` and `transformer_config`."""


def shape_of(config: Config) -> ModelShape:
    """Sizes of the model in `config.model.hf_path`. Raises OptionError when it is no model we know."""
    hf = hf_config(config)
    return _FAMILIES[hf.model_type].model_shape(hf)


def check_model(config: Config) -> None:
    """Raise OptionError when `config.model.hf_path` is no model we know or the layout cannot divide it."""
    check_layout(shape_of(config), config.parallel)


def hf_config(config: Config) -> Any:
    """The Hugging Face configuration of `config.model.hf_path`. Raises OptionError for what is not computed here."""
    path = config.model.hf_path
    hf = read_config(path)
    if hf.model_type not in _FAMILIES:
        raise refusal(path, f"holds a {hf.model_type} model", f"give a model of type {' or '.join(_FAMILIES)}")
    check_served(hf, path)
    return hf


def weights_dtype(config: Config) -> torch.dtype:
    """Number format of weights and activations; reads the model's directory only if `precision.dtype` is auto."""
    return dtype_of(hf_config(config) if config.precision.dtype == "auto" else None, config)


def dtype_of(hf: Any, config: Config) -> torch.dtype:
    """Number format of weights and activations; auto means float32 for a float32 directory, else bfloat16."""
    if config.precision.dtype == "auto":
        return torch.float32 if hf.dtype == torch.float32 else torch.bfloat16
    return DTYPES[config.precision.dtype]


def build_stage(hf: Any, config: Config, groups: ProcessGroupCollection, *, initialize: bool = False) -> Stage:
    """This rank's stage of a model with the Hugging Face configuration `hf`, its weights random or not filled in."""
    family = _FAMILIES[hf.model_type]
    options = {**fp8.megatron_options(config.precision.fp8), **recompute_options(config.trainer.recompute)}
    options["perform_initialization"] = initialize
    megatron = family.transformer_config(hf, config.parallel, dtype_of(hf, config), **options)
    fp8.check_sizes(config.precision.fp8, megatron)
    num_chunks = config.parallel.virtual_pipeline
    return Stage(
        [
            family.Model(
                hf,
                megatron,
                groups,
                layer_spec=config.model.layer_spec,
                recompute_vision=config.trainer.recompute_vision,
                pre_process=parallel.is_first_stage(groups) and index == 0,
                post_process=parallel.is_last_stage(groups) and index == num_chunks - 1,
                vp_stage=index if num_chunks > 1 else None,
            )
            for index in range(num_chunks)
        ]
    )


def freeze(stage: Stage, options: FreezeConfig) -> None:
    """Disable the gradients of the parts that `model.freeze` names.

    Raises OptionError when a stage has no parameter left to train.
    """
    for name, parameter in stage.named_parameters():
        parameter.requires_grad_(not is_frozen(stage.weight_rule(name).names[0], options))
    if not any(parameter.requires_grad for parameter in stage.parameters()):
        rule = "leaves nothing to train on a pipeline stage"
        remedy = "train more parts, or hold the whole model on one stage with parallel.pipeline=1"
        raise OptionError("model.freeze.language", options.language, rule, remedy)


def build_vlm(config: Config, groups: ProcessGroupCollection) -> Stage:
    """This rank's stage of the model in `config.model.hf_path`, with its weights, on this rank's device."""
    fp8.check_machine(config)
    hf = hf_config(config)
    weights = open_weights(config.model.hf_path, hf)  # before memory is allocated for the sizes in config.json
    stage = build_stage(hf, config, groups)
    load_hf(stage, weights, groups)
    return stage.to(cpu.device())


def build_twin(stage: Stage, config: Config, groups: ProcessGroupCollection) -> Stage:
    """A second stage like `stage`, from no file, its weights not filled in, on this rank's device."""
    with torch.device(cpu.device()):
        twin = build_stage(stage.chunks[0].hf, config, groups)
    return twin.to(cpu.device())
