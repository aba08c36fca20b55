"""Whole training steps through NeMo, Lightning and Megatron against the naive oracle, in several layouts."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from nemo_vopd.config import Config
from nemo_vopd.tools.prepare.tiny_model import write_tiny_model
from nemo_vopd.vlm.weights.export import iterate_hf
from tests.distributed import run_distributed
from tests.helpers import made_up_rollouts, read_lines, tiny_config, write_rollouts
from tests.reference import ReferenceOptions, ReferenceResult, run_reference
from tests.vlm.tiny_qwen3_vl import write_tiny_qwen3_vl

STEPS = 3
LR = 1e-3  # large enough that a wrong update cannot hide in the tolerance
# Adam's default of 1e-8 turns the round-off of a gradient near zero into the sign of a whole update
EPS = 1e-4
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
    "121 small": (2, [*UNEVEN, SMALL, "distill.teacher.offload=true"]),
    "131 small": (3, ["parallel.pipeline=3", SMALL]),
    "111 recompute": (1, ["trainer.recompute=layers", "trainer.recompute_vision=true"]),
    "221 recompute": (4, [*TENSOR, *UNEVEN, SMALL, "trainer.recompute=mlp"]),
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
    from nemo_vopd.tools.during_training import GapDuringTraining
    from nemo_vopd.training.run import train

    model = train(config, evaluation=GapDuringTraining(config))
    student, groups = model.student, model.groups
    weights = dict(iterate_hf(student, groups))
    teacher = dict(iterate_hf(model.teacher_model, groups))
    return weights, teacher


@pytest.fixture(scope="module")
def oracle(assets, tmp_path_factory):
    """Rollouts on file and what the oracle makes of them."""
    folder = tmp_path_factory.mktemp("oracle")
    config = tiny_config(assets, folder)
    steps = made_up_rollouts(config, STEPS)
    write_rollouts(folder / "rollouts.jsonl", steps)
    result = run_reference(assets / "tiny-vlm", steps, ReferenceOptions(lr=LR, eps=EPS))
    return folder / "rollouts.jsonl", result


def run(assets, folder, rollouts, world_size, overrides, num_steps=STEPS):
    """Metrics and, for each rank, weights of student and teacher after training on the recorded rollouts."""
    options = [f"trainer.max_steps={STEPS}", f"optimizer.lr={LR}", f"optimizer.eps={EPS}"]
    replay = ["rollout=replay", f"rollout.path={rollouts}"]
    config = tiny_config(assets, folder, *replay, *options, *overrides)
    per_rank = run_distributed(train_and_collect, world_size, config)
    metrics = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(num_steps))
    return metrics, per_rank


def check(metrics, per_rank, expected, *, loss: float, grad_norm: float, weights: dict, first: float | None = None):
    """Compare with the oracle; `loss` and `grad_norm` are relative bounds, `weights` assert_close's.

    `first` bounds both in the first step, where no update has happened yet.
    """
    assert expected.smallest_gap > 1e-6, "which token ends a support is a matter of round-off here: draw other rollouts"
    for line, oracle_loss, oracle_norm in zip(metrics, expected.losses, expected.grad_norms, strict=True):
        only = first if line["step"] == 0 else None
        assert line["loss"] == pytest.approx(oracle_loss, rel=only or loss)
        assert line["grad_norm"] == pytest.approx(oracle_norm, rel=only or grad_norm)
    for which, reference in enumerate((expected.student, expected.teacher)):
        for rank, result in enumerate(per_rank):
            for name, tensor in result[which].items():
                torch.testing.assert_close(
                    tensor.float(), reference[name], **weights, msg=lambda m, r=rank, n=name: f"rank {r} {n}: {m}"
                )
        assert set().union(*(result[which] for result in per_rank)) == set(reference)


def check_model(hf_path, assets, folder, world_size, overrides):
    """Two steps of another model than the tiny one, in one layout, against the oracle."""
    model = f"model.hf_path={hf_path}"
    steps = made_up_rollouts(tiny_config(assets, folder, model), 2)
    write_rollouts(folder / "rollouts.jsonl", steps)
    expected = run_reference(hf_path, steps, ReferenceOptions(lr=LR, eps=EPS))
    overrides = [*overrides, model, "trainer.max_steps=2"]
    metrics, per_rank = run(assets, folder / "run", folder / "rollouts.jsonl", world_size, overrides, num_steps=2)
    check(metrics, per_rank, expected, loss=1e-5, grad_norm=1e-5, weights={"atol": 1e-6, "rtol": 1e-5})


@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_equal_the_oracle(name, oracle, assets, tmp_path):
    rollouts, expected = oracle
    metrics, per_rank = run(assets, tmp_path, rollouts, *LAYOUTS[name])
    check(metrics, per_rank, expected, loss=1e-5, grad_norm=1e-5, weights={"atol": 1e-6, "rtol": 1e-5})


@pytest.mark.parametrize("name", ["111 small", "121 small", "221 sequence small", "122 small"])
def test_tied_embeddings_stay_tied_across_stages(name, assets, tmp_path):
    """First and last stage hold a copy each; Megatron sums their gradients."""
    hf_path = tmp_path / "tied"
    write_tiny_model(hf_path, seed=4, tie_word_embeddings=True)
    check_model(hf_path, assets, tmp_path, *LAYOUTS[name])


@pytest.mark.parametrize("name", ["111 small", "211 sequence small", "221"])
def test_a_vocabulary_that_does_not_divide(name, assets, tmp_path):
    """131 tokens: two tensor-parallel ranks hold 80 rows each, 29 of them stand for no token."""
    hf_path = tmp_path / "odd"
    write_tiny_model(hf_path, seed=4, vocab_size=131)
    check_model(hf_path, assets, tmp_path, *LAYOUTS[name])


INTERLEAVED = ["parallel.pipeline=3", "parallel.virtual_pipeline=2"]


@pytest.mark.parametrize(
    "num_layers,world_size,overrides",
    [
        (6, 3, INTERLEAVED),
        (7, 3, [*INTERLEAVED, SMALL, "parallel.pipeline_layout=[1,1,1,1,2,1]"]),
        (6, 6, [*SEQUENCE, *INTERLEAVED, SMALL]),
    ],
    ids=["131", "131 uneven small", "231 sequence small"],
)
def test_virtual_pipeline_stages(num_layers, world_size, overrides, assets, tmp_path):
    """Interleaved schedule: each of three stages holds two chunks of the model."""
    hf_path = tmp_path / "deeper"
    write_tiny_model(hf_path, seed=4, num_hidden_layers=num_layers)
    check_model(hf_path, assets, tmp_path, world_size, overrides)


BF16 = ["111", "211 sequence small", "121 small", "112", "222 small"]


def test_bf16_layouts_agree_and_stay_near_the_oracle(oracle, assets, tmp_path):
    """bf16 keeps 8 bits, so each operation rounds by up to 2^-9; the bounds below are what that allows.

    Against float32, weights and some sixty operations in sequence are rounded: 2^-9 * sqrt(60) = 1.5% for a typical
    activation. With six seeds for the rollouts, loss and gradient norm of the first step were up to 1.0% off. Adam
    scales small gradients up, so the steps after it part: up to 12% in the loss and 22% in the norm. Between layouts
    the weights are the same and only the order of sums differs: measured below 1% and 6%. Updated weights may fall on
    either side of a rounding edge (2^-8 relative) and Adam may scale the update differently (a third of 6e-4).
    """
    rollouts, expected = oracle
    results = {}
    for name in BF16:
        world_size, overrides = LAYOUTS[name]
        folder = tmp_path / name.replace(" ", "_")
        results[name] = run(assets, folder, rollouts, world_size, [*overrides, "precision=bf16"])
    check(*results["111"], expected, first=0.02, loss=0.2, grad_norm=0.35, weights={"atol": 1e-3, "rtol": 2**-7})
    metrics, ((student, teacher),) = results["111"]
    single = ReferenceResult(
        [line["loss"] for line in metrics],
        [line["grad_norm"] for line in metrics],
        {name: tensor.float() for name, tensor in student.items()},
        {name: tensor.float() for name, tensor in teacher.items()},
    )
    for name in BF16[1:]:
        check(*results[name], single, loss=0.02, grad_norm=0.09, weights={"atol": 3e-4, "rtol": 2**-7})


def train_with_noise(config: Config):
    """What this rank holds after a run in which each rank's gradients of copies are its own, off by some 1e-3.

    Weights of both models as they are exported, and state as it is saved.
    """
    from nemo_vopd import model
    from nemo_vopd.training.run import train

    plain_freeze = model.freeze

    def freeze(stage, options) -> None:
        plain_freeze(stage, options)
        noise = torch.Generator().manual_seed(dist.get_rank())
        for name, parameter in stage.named_parameters():
            if stage.weight_rule(name).split == "replicated":
                parameter.register_hook(lambda grad: grad * (1 + 1e-3 * torch.randn(grad.shape, generator=noise)))

    with mock.patch.object(model, "freeze", freeze):
        trained = train(config)
    student, groups, dp_rank = trained.student, trained.groups, trained.groups.dp_cp.rank()
    models = {"student": student, "teacher": trained.teacher_model}
    tensors = {(which, n): t for which, m in models.items() for n, t in iterate_hf(m, groups)}
    for kind, shards in trained.sharded_state().items():
        copies = {n: flat for n, (flat, _) in shards.items() if student.weight_rule(n).split == "replicated"}
        tensors |= {(f"{kind} of data-parallel rank {dp_rank}", n): flat.clone() for n, flat in copies.items()}
    return tensors


@pytest.mark.parametrize(
    "name,family", [("211", "qwen3_vl"), ("211 sequence small", "qwen2_5_vl"), ("212 small", "qwen2_5_vl")]
)
def test_copies_on_tensor_parallel_ranks_stay_equal(name, family, assets, tmp_path):
    """A GPU rounds in another order on each rank; whoever writes a checkpoint or an export writes the same."""
    world_size, overrides = LAYOUTS[name]
    if family == "qwen3_vl":  # with norms of queries and keys
        hf_path = write_tiny_qwen3_vl(tmp_path / "model", assets / "tiny-vlm", layers=2)
        overrides = [*overrides, f"model.hf_path={hf_path}"]
    options = ["trainer.max_steps=6", f"optimizer.lr={LR}", "checkpoint.every_n_steps=0"]
    ranks = run_distributed(train_with_noise, world_size, tiny_config(assets, tmp_path / "run", *options, *overrides))
    for (i, one), (j, other) in itertools.combinations(enumerate(ranks), 2):
        shared = one.keys() & other.keys()
        # both models, and of one tensor-parallel group four kinds of state
        assert len({which for which, _ in shared}) == (6 if i // 2 == j // 2 else 2)
        assert not [key for key in shared if not torch.equal(one[key], other[key])]


def test_the_oracle_moved(oracle, assets):
    """The comparison above would be empty if nothing had changed."""
    _, expected = oracle
    moved = [(expected.student[n] - expected.teacher[n]).abs().max().item() for n in expected.student]
    assert min(moved) > 1e-6
