"""The weight map under Transformer Engine's parameter names, by names and shapes, installed or not.

Transformer Engine's LayerNormLinear holds the weight of the norm before a projection as `layer_norm_weight`; Megatron's
layers with it (get_gpt_layer_with_transformer_engine_spec) have no norm modules of their own before qkv and fc1.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE

from nemo_vopd.data.tiny_model import write_tiny_model
from nemo_vopd.mcore import cpu, fp8, inference, parallel
from nemo_vopd.mcore.layers import CoreAttention, FusedCoreAttention, has_fused_attention, uses_transformer_engine
from nemo_vopd.vlm import build_stage, hf_config, qwen2_5_vl
from nemo_vopd.vlm.hf_weights import HFReader
from tests.helpers import tiny_config
from tests.vlm.tiny_qwen3_vl import write_tiny_qwen3_vl

FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


needs_te = pytest.mark.skipif(not HAVE_TE, reason="Transformer Engine is not installed (NGC images have it)")


def prepare(family, tmp_path, *overrides):
    write_tiny_model(tmp_path / "qwen2_5_vl", seed=1)
    if family == "qwen3_vl":
        write_tiny_qwen3_vl(tmp_path / "qwen3_vl", tmp_path / "qwen2_5_vl")
    config = tiny_config(tmp_path, tmp_path, f"model.hf_path={tmp_path / family}", *overrides)
    return config, parallel.initialize(config.parallel, seed=1)


def check_names(stage, folder, names) -> None:
    """`names` maps those of the parameters to those that the weight map is asked for."""
    reader, named = HFReader(folder), set()
    for name, parameter in stage.named_parameters():
        rule = stage.weight_rule(names(name))
        assert rule == stage.weight_rule(name)
        shapes = [reader.shape(hf_name) for hf_name in rule.names]
        assert sum(shape[0] for shape in shapes) == parameter.shape[0]
        assert all(shape[1:] == tuple(parameter.shape[1:]) for shape in shapes)
        named |= set(rule.names)
    assert named == set(reader.original_name)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_both_specs_name_the_same_tensors(family, tmp_path):
    config, groups = prepare(family, tmp_path)
    stage = build_stage(hf_config(config), config, groups)
    renamed = []

    def te_name(name: str) -> str:
        other = next((name.replace(own, te) for own, te in FUSED.items() if name.endswith(own)), name)
        renamed.extend([name] if other != name else [])
        return other

    check_names(stage, tmp_path / family, te_name)
    assert len(renamed) == 2 * stage.config.num_layers


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def te_stage(request, tmp_path):
    """A stage of Transformer Engine's own layers without memory: they are built where no GPU is, but do not compute."""
    config, groups = prepare(request.param, tmp_path, "model.layer_spec=transformer_engine", "precision=fp8_delayed")
    cpu.activate()
    with torch.device("meta"), mock.patch("torch.cuda.is_available", lambda: True):
        with mock.patch("torch.cuda.get_device_capability", lambda *_: (9, 0)):
            stage = build_stage(hf_config(config), config, groups)
    return stage, tmp_path / request.param, groups


@needs_te
def test_transformer_engines_own_layers_are_named_so(te_stage):
    stage, folder, _ = te_stage
    names = [name for name, _ in stage.named_parameters()]
    assert all(sum(name.endswith(te) for name in names) == stage.config.num_layers for te in FUSED.values())
    check_names(stage, folder, lambda name: name)


@needs_te
def test_attention_is_fused_and_gradients_go_to_the_buffer(te_stage):
    stage, *_ = te_stage
    attention = [module for module in stage.modules() if isinstance(module, CoreAttention)]
    assert [type(module) for module in attention] == [FusedCoreAttention] * stage.config.num_layers
    adding = [name for name, module in stage.named_modules() if getattr(module, "fuse_wgrad_accumulation", False)]
    assert len(adding) == len(list(fp8._scaled_modules(stage))) == 4 * stage.config.num_layers


@needs_te
@pytest.mark.parametrize(
    "choice,dtype,layers,attention",
    [
        ("auto", torch.bfloat16, True, True),
        ("auto", torch.float32, False, False),  # Transformer Engine's products of float32 are TF32
        ("local", torch.bfloat16, False, False),
        ("transformer_engine", torch.float32, True, False),
    ],
)
def test_what_serves_a_gpu(choice, dtype, layers, attention):
    with mock.patch("torch.cuda.is_available", lambda: True):
        assert uses_transformer_engine(choice, dtype) == layers
        assert has_fused_attention(choice, dtype) == attention


@needs_te
def test_sampling_finds_all_weights_of_a_transformer_engine_layer(te_stage):
    stage, _, groups = te_stage
    parameters = {id(parameter): name for name, parameter in stage.named_parameters()}
    (chunk,) = stage.chunks
    found = inference.ChunkPass(chunk, groups, ends_model=True).layers
    assert len(found) == stage.config.num_layers
    for number, layer in enumerate(found):
        names = {parameters[id(weight)] for weight in layer if isinstance(weight, torch.Tensor)}
        assert names == {name for name in parameters.values() if f"language.decoder.layers.{number}." in name}


@needs_te
def test_the_scaling_state_is_that_of_the_four_products_of_a_layer(te_stage):
    stage, *_ = te_stage
    products = "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"
    expected = {f"layers.{number}.{product}" for number in range(stage.config.num_layers) for product in products}
    assert {name for name, _ in fp8._scaled_modules(stage)} == expected


@needs_te
@pytest.mark.parametrize(
    "group,kind",
    [("delayed", "DelayedScaling"), ("tensorwise", "Float8CurrentScaling"), ("blockwise", "Float8BlockScaling")],
)
def test_megatron_makes_transformer_engines_recipes_of_the_groups(group, kind, tmp_path):
    from megatron.core.fp8_utils import get_fp8_recipe
    from transformer_engine.common import recipe as te_recipe

    config, groups = prepare("qwen2_5_vl", tmp_path, f"precision=fp8_{group}")
    options = fp8.megatron_options(config.precision.fp8)
    recipe = get_fp8_recipe(
        qwen2_5_vl.transformer_config(hf_config(config), config.parallel, torch.bfloat16, **options)
    )
    assert isinstance(recipe, getattr(te_recipe, kind))
    assert recipe.fp8_format == (te_recipe.Format.E4M3 if group == "blockwise" else te_recipe.Format.HYBRID)
    if group == "delayed":
        assert (recipe.amax_history_len, recipe.amax_compute_algo, recipe.reduce_amax) == (1024, "max", True)
