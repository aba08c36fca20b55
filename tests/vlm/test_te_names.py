"""The weight map under Transformer Engine's parameter names, by names and shapes: it need not be installed.

Transformer Engine's LayerNormLinear holds the weight of the norm before a projection as `layer_norm_weight`; Megatron's
layers with it (get_gpt_layer_with_transformer_engine_spec) have no norm modules of their own before qkv and fc1.
"""

from __future__ import annotations

import pytest

from nemo_vopd.data.tiny_model import write_tiny_model
from nemo_vopd.mcore import parallel
from nemo_vopd.vlm import build_stage, hf_config
from nemo_vopd.vlm.hf_weights import HFReader
from tests.helpers import tiny_config
from tests.vlm.tiny_qwen3_vl import write_tiny_qwen3_vl

FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_both_specs_name_the_same_tensors(family, tmp_path):
    write_tiny_model(tmp_path / "qwen2_5_vl", seed=1)
    if family == "qwen3_vl":
        write_tiny_qwen3_vl(tmp_path / "qwen3_vl", tmp_path / "qwen2_5_vl")
    config = tiny_config(tmp_path, tmp_path, f"model.hf_path={tmp_path / family}")
    groups = parallel.initialize(config.parallel, seed=1)
    stage, reader = build_stage(hf_config(config), config, groups), HFReader(tmp_path / family)
    named, renamed = set(), 0
    for name, parameter in stage.named_parameters():
        te_name = next((name.replace(own, te) for own, te in FUSED.items() if name.endswith(own)), name)
        renamed += te_name != name
        rule = stage.weight_rule(te_name)
        assert rule == stage.weight_rule(name)
        shapes = [reader.shape(hf_name) for hf_name in rule.names]
        assert sum(shape[0] for shape in shapes) == parameter.shape[0]
        assert all(shape[1:] == tuple(parameter.shape[1:]) for shape in shapes)
        named |= set(rule.names)
    assert renamed == 2 * stage.config.num_layers
    assert named == set(reader.original_name)
