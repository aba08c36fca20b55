"""Vision-language models on Megatron-Core: one file for each family, weights in `hf_weights`."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import AutoConfig

from nemo_vopd.config import Config
from nemo_vopd.mcore import cpu, parallel
from nemo_vopd.vlm.hf_weights import load_hf
from nemo_vopd.vlm.qwen2_5_vl import Qwen2_5_VL, transformer_config

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_vlm(config: Config, groups: ProcessGroupCollection) -> Qwen2_5_VL:
    """This rank's stage of the model in `config.model.hf_path`, with its weights, on this rank's device."""
    hf = AutoConfig.from_pretrained(config.model.hf_path, local_files_only=True)
    megatron = transformer_config(hf, config.parallel, DTYPES[config.precision.dtype])
    model = Qwen2_5_VL(
        hf,
        megatron,
        groups,
        layer_spec=config.model.layer_spec,
        pre_process=parallel.is_first_stage(groups),
        post_process=parallel.is_last_stage(groups),
    )
    load_hf(model, model.weight_rule, config.model.hf_path, groups)
    return model.to(cpu.device())
