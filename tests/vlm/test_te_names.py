"""The weight map under Transformer Engine's parameter names, by names and shapes, installed or not.

Transformer Engine's LayerNormLinear holds the weight of the norm before a projection as `layer_norm_weight`; Megatron's
layers with it (get_gpt_layer_with_transformer_engine_spec) have no norm modules of their own before qkv and fc1.
"""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from nemo_vopd.mcore import cpu, fp8, parallel
from nemo_vopd.mcore.layers import CoreAttention, has_fused_attention, uses_transformer_engine
from nemo_vopd.rollout.native import forward
from nemo_vopd.tools.prepare.tiny_model import write_tiny_model
from nemo_vopd.vlm import qwen2_5_vl
from nemo_vopd.vlm.build import build_stage, hf_config
from nemo_vopd.vlm.weights.reading import HFReader
from tests.bare_te import needs_te, run_on_te
from tests.helpers import tiny_config
from tests.vlm.tiny_qwen3_vl import write_tiny_qwen3_vl

FAMILIES = ["qwen2_5_vl", "qwen3_vl"]
FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def prepare(family, folder, *overrides):
    write_tiny_model(folder / "qwen2_5_vl", seed=1)
    if family == "qwen3_vl":
        write_tiny_qwen3_vl(folder / "qwen3_vl", folder / "qwen2_5_vl")
    config = tiny_config(folder, folder, f"model.hf_path={folder / family}", *overrides)
    return config, parallel.initialize(config.parallel, seed=1)


def rules(stage, names=lambda name: name):
    """The shape of each parameter, and what the weight map answers to `names` of its name."""
    return {name: (tuple(tensor.shape), stage.weight_rule(names(name))) for name, tensor in stage.named_parameters()}


def check_rules(found, folder) -> None:
    """They name all tensors of the model in `folder`, and their shapes fit."""
    reader, named = HFReader(folder), set()
    for shape, rule in found.values():
        shapes = [reader.shape(hf_name) for hf_name in rule.names]
        assert sum(part[0] for part in shapes) == shape[0] and all(part[1:] == shape[1:] for part in shapes)
        named |= set(rule.names)
    assert named == set(reader.original_name)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_specs_name_the_same_tensors(family, tmp_path):
    config, groups = prepare(family, tmp_path)
    stage = build_stage(hf_config(config), config, groups)
    renamed = []

    def te_name(name: str) -> str:
        other = next((name.replace(own, te) for own, te in FUSED.items() if name.endswith(own)), name)
        renamed.extend([name] if other != name else [])
        return other

    found = rules(stage)
    check_rules(found, tmp_path / family)
    assert rules(stage, te_name) == found
    assert len(renamed) == 2 * stage.config.num_layers


def describe_te_stage(family, folder):
    """A stage of Transformer Engine's own layers without memory: they are built where no GPU is, but do not compute."""
    config, groups = prepare(family, folder, "model.layer_spec=transformer_engine", "precision=fp8_delayed")
    cpu.activate()
    with torch.device("meta"), mock.patch("torch.cuda.is_available", lambda: True):
        with mock.patch("torch.cuda.get_device_capability", lambda *_: (9, 0)):
            stage = build_stage(hf_config(config), config, groups)
    (chunk,) = stage.chunks
    parameters = {id(parameter): name for name, parameter in stage.named_parameters()}
    sampled = forward.ChunkPass(chunk, groups, ends_model=True).layers
    modules = dict(stage.named_modules())
    return SimpleNamespace(
        num_layers=stage.config.num_layers,
        rules=rules(stage),
        attention=[type(module).__name__ for module in modules.values() if isinstance(module, CoreAttention)],
        adding=[name for name, module in modules.items() if getattr(module, "fuse_wgrad_accumulation", False)],
        scaled=[name for name, _ in fp8._scaled_modules(stage)],
        sampled=[{parameters[id(w)] for w in layer if isinstance(w, torch.Tensor)} for layer in sampled],
    )


@pytest.fixture(scope="module", params=FAMILIES)
def te_stage(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("te")
    (found,) = run_on_te(describe_te_stage, 1, request.param, folder)
    return found, folder / request.param


@needs_te
def test_transformer_engines_own_layers_are_named_so(te_stage):
    found, folder = te_stage
    assert all(sum(name.endswith(te) for name in found.rules) == found.num_layers for te in FUSED.values())
    check_rules(found.rules, folder)


@needs_te
def test_attention_is_fused_and_gradients_go_to_the_buffer(te_stage):
    found, _ = te_stage
    assert found.attention == ["FusedCoreAttention"] * found.num_layers
    assert len(found.adding) == len(found.scaled) == 4 * found.num_layers


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
    with mock.patch("torch.cuda.is_available", lambda: True), mock.patch("nemo_vopd.mcore.layers.HAVE_TE", True):
        assert uses_transformer_engine(choice, dtype) == layers
        assert has_fused_attention(choice, dtype) == attention


@needs_te
def test_sampling_finds_all_weights_of_a_transformer_engine_layer(te_stage):
    found, _ = te_stage
    assert len(found.sampled) == found.num_layers
    for number, names in enumerate(found.sampled):
        assert names == {name for name in found.rules if f"language.decoder.layers.{number}." in name}


@needs_te
def test_the_scaling_state_is_that_of_the_four_products_of_a_layer(te_stage):
    found, _ = te_stage
    products = "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"
    assert set(found.scaled) == {f"layers.{n}.{product}" for n in range(found.num_layers) for product in products}


def recipe_of(group, folder):
    """Names of the classes of Megatron's recipe for a group of `precision`, its format, and its options."""
    from megatron.core.fp8_utils import get_fp8_recipe

    config, _ = prepare("qwen2_5_vl", folder, f"precision=fp8_{group}")
    options = fp8.megatron_options(config.precision.fp8)
    recipe = get_fp8_recipe(
        qwen2_5_vl.transformer_config(hf_config(config), config.parallel, torch.bfloat16, **options)
    )
    options = [getattr(recipe, name, None) for name in ("amax_history_len", "amax_compute_algo", "reduce_amax")]
    return {kind.__name__ for kind in type(recipe).__mro__}, recipe.fp8_format.name, options


@needs_te
@pytest.mark.parametrize(
    "group,kind,number_format",
    [
        ("delayed", "DelayedScaling", "HYBRID"),
        ("tensorwise", "Float8CurrentScaling", "HYBRID"),
        ("blockwise", "Float8BlockScaling", "E4M3"),
    ],
)
def test_megatron_makes_transformer_engines_recipes_of_the_groups(group, kind, number_format, tmp_path):
    ((kinds, found_format, options),) = run_on_te(recipe_of, 1, group, tmp_path)
    assert kind in kinds and found_format == number_format
    if group == "delayed":
        assert options == [1024, "max", True]
