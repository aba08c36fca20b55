"""Whole training steps through NeMo, Lightning and Megatron against the naive oracle, in several layouts."""

from __future__ import annotations

import pytest
import torch

from nemo_vopd.config import Config
from nemo_vopd.vlm.hf_weights import iterate_hf
from tests.distributed import run_distributed
from tests.helpers import made_up_rollouts, read_lines, tiny_config, write_rollouts
from tests.reference import ReferenceOptions, run_reference

STEPS = 3
LR = 1e-3  # large enough that a wrong update cannot hide in the tolerance
SMALL = "trainer.max_tokens_per_microbatch=300"  # several microbatches of different lengths
UNEVEN = ["parallel.pipeline=2", "parallel.pipeline_layout=[1,2]"]
TENSOR, SEQUENCE = ["parallel.tensor=2"], ["parallel.tensor=2", "parallel.sequence=true"]
LAYOUTS = {
    "111": (1, []),
    "111 small": (1, [SMALL]),
    "211": (2, TENSOR),
    "211 small": (2, [*TENSOR, SMALL]),
    "211 sequence": (2, SEQUENCE),
    "211 sequence small": (2, [*SEQUENCE, SMALL]),
    "121": (2, UNEVEN),
    "121 small": (2, [*UNEVEN, SMALL]),
    "131 small": (3, ["parallel.pipeline=3", SMALL]),
    "112": (2, []),
    "112 small": (2, [SMALL]),
    "221": (4, [*TENSOR, *UNEVEN]),
    "221 sequence small": (4, [*SEQUENCE, *UNEVEN, SMALL]),
    "212 sequence": (4, SEQUENCE),
    "212 small": (4, [*TENSOR, SMALL]),
    "122 small": (4, [*UNEVEN, SMALL]),
    "222 small": (8, [*TENSOR, *UNEVEN, SMALL]),
    "222 sequence": (8, [*SEQUENCE, *UNEVEN]),
}
"""Tensor, pipeline and data-parallel size; world size and overrides."""


def train_and_collect(config: Config):
    """Train and return metrics and (student, teacher) weights by canonical name, of this pipeline stage."""
    from nemo_vopd.runtime.training import train

    model = train(config)
    student, groups = model.student.module, model.groups
    weights = dict(iterate_hf(student, student.weight_rule, groups))
    teacher = dict(iterate_hf(model.teacher_model, student.weight_rule, groups))
    return weights, teacher


@pytest.fixture(scope="module")
def oracle(assets, tmp_path_factory):
    """Rollouts on file and what the oracle makes of them."""
    folder = tmp_path_factory.mktemp("oracle")
    config = tiny_config(assets, folder)
    steps = made_up_rollouts(config, STEPS)
    write_rollouts(folder / "rollouts.jsonl", steps)
    result = run_reference(assets / "tiny-vlm", steps, ReferenceOptions(lr=LR))
    return folder / "rollouts.jsonl", result


@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_equal_the_oracle(name, oracle, assets, tmp_path):
    rollouts, expected = oracle
    world_size, overrides = LAYOUTS[name]
    config = tiny_config(
        assets,
        tmp_path,
        "rollout=replay",
        f"rollout.path={rollouts}",
        f"trainer.max_steps={STEPS}",
        f"optimizer.lr={LR}",
        *overrides,
    )
    per_rank = run_distributed(train_and_collect, world_size, config)
    metrics = read_lines(tmp_path / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(STEPS))
    for line, loss, grad_norm in zip(metrics, expected.losses, expected.grad_norms, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
        assert line["grad_norm"] == pytest.approx(grad_norm, rel=1e-5)
    for which, reference in ((0, expected.student), (1, expected.teacher)):
        for rank, result in enumerate(per_rank):
            for tensor_name, tensor in result[which].items():
                # Adam divides by the root of tiny second moments, so round-off of a gradient near zero shows in
                # the weight; it stays far below one update (LR * steps = 6e-4 after the warm-up factors)
                torch.testing.assert_close(
                    tensor,
                    reference[tensor_name],
                    atol=2e-5,
                    rtol=1e-5,
                    msg=lambda m, r=rank, n=tensor_name: f"{r} {n} {m}",
                )
        seen = set().union(*(result[which] for result in per_rank))
        assert seen == set(reference)


def test_the_oracle_moved(oracle, assets):
    """The comparison above would be empty if nothing had changed."""
    _, expected = oracle
    moved = [(expected.student[n] - expected.teacher[n]).abs().max().item() for n in expected.student]
    assert min(moved) > 1e-6
