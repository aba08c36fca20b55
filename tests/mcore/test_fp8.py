"""FP8 options: what Megatron is told, what is refused and where, and the scaling state that ranks share.

What needs a GPU is in tests/gpu.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from nemo_vopd.config import FP8Config, ParallelConfig
from nemo_vopd.data.processor import Processor
from nemo_vopd.errors import OptionError
from nemo_vopd.mcore import fp8, parallel
from nemo_vopd.model import VisionOPDModel
from nemo_vopd.vlm import qwen2_5_vl
from nemo_vopd.vlm.build import build_vlm, hf_config
from tests.distributed import run_distributed
from tests.helpers import made_up_rollouts, tiny_config

GROUPS = ("fp8_delayed", "fp8_tensorwise", "fp8_blockwise")


def megatron_of(config, **sizes):
    options = fp8.megatron_options(config.precision.fp8)
    hf = hf_config(config)
    for name, value in sizes.items():
        setattr(hf.text_config, name, value)
    return qwen2_5_vl.transformer_config(hf, config.parallel, torch.bfloat16, **options)


def test_megatron_is_told_what_the_groups_say(assets, tmp_path):
    told = {}
    for group in GROUPS:
        megatron = megatron_of(tiny_config(assets, tmp_path, f"precision={group}"))
        assert megatron.tp_only_amax_red and not megatron.fp8_param and megatron.bf16
        assert not megatron.fp8_dot_product_attention and not megatron.fp8_multi_head_attention
        bf16_layers = megatron.num_layers_at_start_in_bf16, megatron.num_layers_at_end_in_bf16
        told[group] = megatron.fp8, megatron.fp8_recipe, megatron.first_last_layers_bf16 and bf16_layers
    assert told == {
        "fp8_delayed": ("hybrid", "delayed", False),
        "fp8_tensorwise": ("hybrid", "tensorwise", (1, 1)),
        "fp8_blockwise": ("e4m3", "blockwise", False),
    }
    options = "precision=fp8_delayed", "precision.fp8.amax_history=16", "precision.fp8.amax_algorithm=most_recent"
    megatron = megatron_of(tiny_config(assets, tmp_path, *options))
    assert (megatron.fp8_amax_history_len, megatron.fp8_amax_compute_algo) == (16, "most_recent")
    assert megatron_of(tiny_config(assets, tmp_path, "precision=bf16")).fp8 is None


REFUSED = {
    "precision.fp8.recipe": ["precision.fp8.recipe=mxfp8"],
    "precision.fp8.format": ["precision=fp8_delayed", "precision.fp8.format=e5m2"],
    "precision.fp8.amax_algorithm": ["precision=fp8_delayed", "precision.fp8.amax_algorithm=mean"],
    "precision.fp8.amax_history": ["precision=fp8_delayed", "precision.fp8.amax_history=0"],
    "precision.fp8.last_layers_bf16": ["precision=fp8_tensorwise", "precision.fp8.last_layers_bf16=-1"],
    "precision.dtype": ["precision=fp8_tensorwise", "precision.dtype=fp32"],
    "model.layer_spec": ["precision=fp8_tensorwise", "model.layer_spec=local"],
    "precision.fp8.recipe=delayed": ["precision=fp8_delayed", "precision.fp8.first_layers_bf16=1"],
}


@pytest.mark.parametrize("option", REFUSED)
def test_refused_before_anything_is_built(option, assets, tmp_path):
    with pytest.raises(OptionError, match=f"^{re.escape(option)}"):
        tiny_config(assets, tmp_path, *REFUSED[option])


def test_a_machine_without_a_gpu_is_told_so(assets, tmp_path, groups):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(
        OptionError, match="^precision.fp8.recipe=tensorwise: needs an NVIDIA GPU .* set precision=bf16"
    ):
        build_vlm(tiny_config(assets, tmp_path, "precision=fp8_tensorwise"), groups)


@pytest.mark.parametrize(
    "group,layout,sizes,rule",
    [
        ("fp8_delayed", {}, {"hidden_size": 72}, "multiples of 16, and the hidden size is 72"),
        ("fp8_delayed", {}, {"intermediate_size": 200}, "the feed-forward size is 200"),
        ("fp8_tensorwise", {"tensor": 2}, {"intermediate_size": 208}, "the feed-forward size is 104; .* smaller"),
        ("fp8_blockwise", {"tensor": 2, "sequence": True}, {}, "multiples of 128, and the hidden size is 64"),
    ],
)
def test_sizes_that_fp8_cannot_multiply(group, layout, sizes, rule, assets, tmp_path):
    config = tiny_config(assets, tmp_path, f"precision={group}")
    config.parallel = ParallelConfig(**layout)
    with pytest.raises(OptionError, match=rule):
        fp8.check_sizes(config.precision.fp8, megatron_of(config, **sizes))
    with pytest.raises(OptionError, match="needs bf16 weights"):
        megatron = qwen2_5_vl.transformer_config(hf_config(config), ParallelConfig(), torch.float32)
        fp8.check_sizes(config.precision.fp8, megatron)


def test_the_released_models_can_be_multiplied(assets, tmp_path):
    for hidden, ffn, heads, groups, tensor in (
        (8192, 29568, 64, 8, 8),
        (5120, 27648, 40, 8, 4),
        (3584, 18944, 28, 4, 4),
    ):
        sizes = {"hidden_size": hidden, "intermediate_size": ffn}
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": groups}
        for group in GROUPS:
            config = tiny_config(assets, tmp_path, f"precision={group}")
            config.parallel = ParallelConfig(tensor=tensor, sequence=True)
            fp8.check_sizes(config.precision.fp8, megatron_of(config, **sizes))


@pytest.mark.parametrize(
    "group,layout,multiple",
    [
        ("bf16", (1, False), 1),
        ("bf16", (2, True), 2),
        ("fp8_delayed", (1, False), 16),
        ("fp8_tensorwise", (2, False), 16),
        ("fp8_tensorwise", (2, True), 32),
        ("fp8_blockwise", (2, False), 16),
        ("fp8_blockwise", (2, True), 256),
    ],
)
def test_microbatches_divide_by_what_fp8_and_sequence_parallelism_need(group, layout, multiple, assets, tmp_path):
    config = tiny_config(assets, tmp_path, f"precision={group}", "trainer.max_tokens_per_microbatch=300")
    config.parallel = ParallelConfig(tensor=layout[0], sequence=layout[1])
    processor, student = Processor.from_pretrained(config.model.hf_path), SimpleNamespace(config=megatron_of(config))
    model = SimpleNamespace(config=config, processor=processor, student=student)
    (rollouts,) = made_up_rollouts(config, 1)
    microbatches = VisionOPDModel._microbatches(model, rollouts)  # type: ignore[arg-type]
    for batches, view in zip(microbatches, ("student", "teacher"), strict=True):
        lengths = [len(batch.token_ids) for batch in batches]
        assert len(lengths) > 1 and all(length % multiple == 0 for length in lengths)
        padding = sum(lengths) - sum(getattr(r.sample, view).num_tokens + len(r.token_ids) for r in rollouts)
        assert 0 <= padding <= (multiple - 1) * len(lengths)


def share(config):
    """What three steps of `agree` and `gather` make of a state that differs on every rank."""
    groups = parallel.initialize(config.parallel, seed=1)
    stage, rank = groups.pp.rank(), torch.distributed.get_rank()
    state = {
        f"student.layers.{stage}.mlp.linear_fc1.scale_fwd": torch.tensor([2.0 + rank, 5.0 - rank]),
        f"student.layers.{stage}.mlp.linear_fc1.amax_history_fwd": torch.tensor([[0.0, 1.0], [rank, -rank]]),
    }
    fp8.synchronize_scaling(state, groups)
    return stage, state, fp8.gather(state, groups)


def test_data_parallel_ranks_agree_and_stages_are_gathered(assets, tmp_path):
    config = tiny_config(assets, tmp_path, "parallel.pipeline=2", "parallel.pipeline_layout=[1,2]")
    results = run_distributed(share, 4, config)
    whole = results[0][2]
    assert len(whole) == 4
    for rank, (stage, state, gathered) in enumerate(results):
        first = 2 * stage  # ranks 0 and 1 are the data-parallel group of the first stage
        name = f"student.layers.{stage}.mlp.linear_fc1."
        assert rank in (first, first + 1)
        assert state[name + "scale_fwd"].tolist() == [2.0 + first, 4.0 - first], "the smallest scale"
        assert state[name + "amax_history_fwd"].tolist() == [[0.0, 1.0], [first + 1.0, -first]], "the largest value"
        assert gathered.keys() == whole.keys()
        assert all(torch.equal(gathered[key], whole[key]) for key in whole)


def test_a_history_of_another_length_keeps_the_newest_values():
    old = {"a.amax_history_fwd": torch.tensor([[0.0], [1.0], [2.0], [3.0]]), "a.scale_fwd": torch.tensor([7.0])}
    for length, expected in ((2, [2.0, 3.0]), (4, [0.0, 1.0, 2.0, 3.0]), (6, [0.0, 0.0, 0.0, 1.0, 2.0, 3.0])):
        new = {"a.amax_history_fwd": torch.full((length, 1), 9.0), "a.scale_fwd": torch.ones(1), "b": torch.ones(1)}
        fp8.restore(new, old)
        assert new["a.amax_history_fwd"][:, 0].tolist() == expected
        assert new["a.scale_fwd"].item() == 7.0 and new["b"].item() == 1.0


def test_without_delayed_scaling_there_is_no_state(assets, tmp_path, groups):
    assert fp8.scaling_state({"student": build_vlm(tiny_config(assets, tmp_path), groups)}) == {}
    assert fp8.megatron_options(FP8Config()) == {}
