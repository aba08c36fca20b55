"""Vision-language models on Megatron-Core: one file for each family, weights in `hf_weights`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import AutoConfig

from nemo_vopd.config import Config
from nemo_vopd.errors import OptionError
from nemo_vopd.mcore import cpu, parallel
from nemo_vopd.mcore.stage import Stage
from nemo_vopd.vlm.hf_weights import load_hf
from nemo_vopd.vlm.layout import ModelShape, check_layout
from nemo_vopd.vlm.qwen2_5_vl import Qwen2_5_VL, model_shape, transformer_config

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def shape_of(config: Config) -> ModelShape:
    """Sizes of the model in `config.model.hf_path`. Raises OptionError when it is no model we know."""
    return model_shape(_hf_config(config))


def check_model(config: Config) -> None:
    """Raise OptionError when `config.model.hf_path` is no model we know or the layout cannot divide it."""
    check_layout(shape_of(config), config.parallel)


def _hf_config(config: Config) -> Any:
    path = Path(config.model.hf_path)
    if not (path / "config.json").is_file():
        remedy = "give the directory of a Hugging Face vision-language model"
        raise OptionError("model.hf_path", path, "has no config.json", remedy)
    hf = AutoConfig.from_pretrained(path, local_files_only=True)
    if hf.model_type != "qwen2_5_vl":
        raise OptionError("model.hf_path", path, f"holds a {hf.model_type} model", "give a Qwen2.5-VL model")
    return hf


def build_vlm(config: Config, groups: ProcessGroupCollection) -> Stage:
    """This rank's stage of the model in `config.model.hf_path`, with its weights, on this rank's device."""
    hf = _hf_config(config)
    megatron = transformer_config(hf, config.parallel, DTYPES[config.precision.dtype])
    num_chunks = config.parallel.virtual_pipeline
    chunks = [
        Qwen2_5_VL(
            hf,
            megatron,
            groups,
            layer_spec=config.model.layer_spec,
            pre_process=parallel.is_first_stage(groups) and index == 0,
            post_process=parallel.is_last_stage(groups) and index == num_chunks - 1,
            vp_stage=index if num_chunks > 1 else None,
        )
        for index in range(num_chunks)
    ]
    stage = Stage(chunks)
    load_hf(stage, stage.weight_rule, config.model.hf_path, groups)
    return stage.to(cpu.device())
