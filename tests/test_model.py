"""Steps out of the ordinary: dropped rollouts, an idle rank, a non-finite gradient, other options, evaluation."""

from __future__ import annotations

import math
import re

import pytest
import torch

from nemo_vopd.data.processor import Processor
from nemo_vopd.errors import RunError
from nemo_vopd.vlm.weights.export import iterate_hf
from nemo_vopd.vlm.weights.reading import HFReader
from tests.distributed import run_distributed
from tests.helpers import made_up_rollouts, read_lines, tiny_config, write_rollouts
from tests.reference import ReferenceOptions, run_reference
from tests.test_step import train_and_collect

LR = 1e-3


def replay(assets, folder, rollouts, num_steps, *overrides):
    """The configuration of a run in `folder` that replays the file `rollouts`."""
    options = [f"rollout.path={rollouts}", f"trainer.max_steps={num_steps}", f"optimizer.lr={LR}", *overrides]
    return tiny_config(assets, folder, "rollout=replay", *options)


def differences(first, second):
    """Largest difference of student and of teacher weights between two runs."""
    return [max((a[n] - b[n]).abs().max().item() for n in a) for a, b in zip(first, second, strict=True)]


def spoil(rollouts, config, ids, every):
    """Put an image token into the responses to the samples `ids`; into all of them or the first only."""
    forbidden = Processor.from_pretrained(config.model.hf_path).forbidden_token_ids
    for rollout in rollouts:
        if rollout.sample.id in ids and (every or rollout.index == 0):
            rollout.token_ids[-1] = forbidden[0]


@pytest.mark.parametrize("layout", [(2, []), (3, ["parallel.pipeline=3"]), (2, ["parallel.tensor=2"])], ids=str)
def test_responses_with_image_tokens_are_dropped_whatever_rank_they_fall_to(layout, assets, tmp_path):
    """In step 0 one of two data-parallel ranks has nothing left; in step 1 it has half."""
    world_size, overrides = layout
    config = tiny_config(assets, tmp_path)
    steps = made_up_rollouts(config, 2)
    ids = list(dict.fromkeys(r.sample.id for r in steps[0]))[1::2]
    spoil(steps[0], config, ids, every=True)
    spoil(steps[1], config, list(dict.fromkeys(r.sample.id for r in steps[1]))[1::2], every=False)
    write_rollouts(tmp_path / "r.jsonl", steps)
    forbidden = torch.tensor(Processor.from_pretrained(config.model.hf_path).forbidden_token_ids)
    kept = [[r for r in step if not torch.isin(r.token_ids, forbidden).any()] for step in steps]
    assert [len(step) for step in kept] == [8, 12]
    expected = run_reference(assets / "tiny-vlm", kept, ReferenceOptions(lr=LR))

    run_distributed(
        train_and_collect, world_size, replay(assets, tmp_path / "run", tmp_path / "r.jsonl", 2, *overrides)
    )
    for k, line in enumerate(read_lines(tmp_path / "run" / "metrics.jsonl")):
        assert line["loss"] == pytest.approx(expected.losses[k], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(expected.grad_norms[k], rel=1e-5)
        assert line["num_response_tokens"] == sum(r.token_ids.numel() for r in kept[k])
        assert line["num_responses"] == len(kept[k]) and line["num_dropped_responses"] == 16 - len(kept[k])


def test_a_step_without_any_token_is_reported_and_the_run_goes_on(assets, tmp_path):
    config = tiny_config(assets, tmp_path)
    steps = made_up_rollouts(config, 2)
    spoil(steps[0], config, [r.sample.id for r in steps[0]], every=True)
    write_rollouts(tmp_path / "r.jsonl", steps)
    run_distributed(train_and_collect, 2, replay(assets, tmp_path / "run", tmp_path / "r.jsonl", 2))
    empty, full = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert empty["num_response_tokens"] == empty["loss"] == empty["grad_norm"] == 0
    told = read_lines(tmp_path / "run" / "dropped.jsonl")
    assert [(entry["step"], entry["reason"]) for entry in told] == [(0, "vision_token_in_response")] * 16
    assert empty["num_dropped_responses"] == 16 and full["num_dropped_responses"] == 0
    assert empty["num_skipped_updates"] == 1 and full["num_skipped_updates"] == 0
    assert full["num_response_tokens"] > 0 and full["loss"] > 0


def test_unusable_records_of_all_ranks_are_counted(assets, tmp_path):
    config = tiny_config(
        assets, tmp_path / "run", "data.max_prompt_length=1", "trainer.max_steps=1", "data.max_dropped_fraction=1"
    )
    run_distributed(train_and_collect, 2, config)
    (line,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert line["num_dropped_samples"] == 8 and line["num_responses"] == line["num_response_tokens"] == 0
    assert line["dropped_by_reason"] == {"overlong_prompt": 8}
    told = read_lines(tmp_path / "run" / "dropped.jsonl")
    assert len({entry["id"] for entry in told}) == 8
    assert all(entry["reason"] == "overlong_prompt" and "max_prompt_length=1" in entry["detail"] for entry in told)


def test_too_many_unusable_records_end_the_run_on_every_rank(assets, tmp_path):
    config = tiny_config(assets, tmp_path / "run", "data.max_prompt_length=1", "trainer.max_steps=9")
    with pytest.raises(RuntimeError, match=r"max_dropped_fraction=0.1: was exceeded: 8 of 8 .*overlong_prompt 8"):
        run_distributed(train_and_collect, 2, config)
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 1


def test_a_non_finite_gradient_on_one_rank_moves_neither_student_nor_teacher(assets, tmp_path):
    steps = made_up_rollouts(tiny_config(assets, tmp_path), 2)
    steps[1][0].log_probs[0] = float("nan")  # a sample of one of two data-parallel ranks
    write_rollouts(tmp_path / "r.jsonl", steps)
    one = run_distributed(train_and_collect, 2, replay(assets, tmp_path / "one", tmp_path / "r.jsonl", 1))
    two = run_distributed(train_and_collect, 2, replay(assets, tmp_path / "two", tmp_path / "r.jsonl", 2))
    student, teacher = one[0]
    assert differences([student], [teacher])[0] > 1e-6, "the teacher would move if it were updated again"
    for first, second in zip(one, two, strict=True):
        assert differences(first, second) == [0.0, 0.0]
    good, bad = read_lines(tmp_path / "two" / "metrics.jsonl")
    assert (good["num_skipped_updates"], bad["num_skipped_updates"]) == (0, 1)
    assert bad["loss"] is None and bad["grad_norm"] is None and good["loss"] > 0


def test_every_option_of_loss_and_optimizer_arrives(assets, tmp_path):
    steps = made_up_rollouts(tiny_config(assets, tmp_path), 2)
    write_rollouts(tmp_path / "r.jsonl", steps)
    other = ReferenceOptions(
        alpha=0.3,
        top_k=20,
        add_tail=False,
        temperature=0.7,
        max_weight=1.2,
        rate=0.3,
        lr=LR,
        betas=(0.5, 0.9),
        eps=1e-4,
        weight_decay=20.0,
        clip_grad=0.05,
        warmup_steps=2,
    )
    overrides = [
        f"distill.alpha={other.alpha}",
        f"distill.top_k={other.top_k}",
        "distill.add_tail=false",
        f"rollout.temperature={other.temperature}",
        f"distill.importance.max_weight={other.max_weight}",
        f"distill.teacher.rate={other.rate}",
        f"optimizer.beta1={other.betas[0]}",
        f"optimizer.beta2={other.betas[1]}",
        f"optimizer.eps={other.eps}",
        f"optimizer.weight_decay={other.weight_decay}",
        f"optimizer.clip_grad={other.clip_grad}",
        f"optimizer.warmup_steps={other.warmup_steps}",
    ]
    expected = run_reference(assets / "tiny-vlm", steps, other)
    config = replay(assets, tmp_path / "run", tmp_path / "r.jsonl", 2, *overrides)
    ((student, teacher),) = run_distributed(train_and_collect, 1, config)
    for line, loss, grad_norm in zip(
        read_lines(tmp_path / "run" / "metrics.jsonl"), expected.losses, expected.grad_norms, strict=True
    ):
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
        assert line["grad_norm"] == pytest.approx(grad_norm, rel=1e-5) and grad_norm > other.clip_grad
    for result, reference in ((student, expected.student), (teacher, expected.teacher)):
        for name, tensor in result.items():
            torch.testing.assert_close(tensor, reference[name], atol=2e-6, rtol=1e-5, msg=lambda m, n=name: f"{n} {m}")


def test_metrics_describe_the_step(assets, tmp_path):
    """Sums over ranks and stages become means over tokens: the numbers of one process are those of any layout."""
    steps = made_up_rollouts(tiny_config(assets, tmp_path), 1)
    write_rollouts(tmp_path / "r.jsonl", steps)
    lines = []
    for number, (size, overrides) in enumerate(
        [(1, []), (2, []), (3, ["parallel.pipeline=3"]), (2, ["parallel.tensor=2"])]
    ):
        folder = tmp_path / str(number)
        run_distributed(
            train_and_collect, size, replay(assets, folder, tmp_path / "r.jsonl", 1, "distill.top_k=10", *overrides)
        )
        (line,) = read_lines(folder / "metrics.jsonl")
        assert line.pop("dropped_by_reason") == {}
        lines.append({k: v for k, v in line.items() if "seconds" not in k and k != "tokens_per_second"})
    tokens = sum(r.token_ids.numel() for r in steps[0])
    assert lines[0]["num_response_tokens"] == tokens and lines[0]["num_responses"] == 16
    assert lines[0]["mean_response_length"] == pytest.approx(tokens / 16)
    assert 0 < lines[0]["teacher_topk_mass"] < lines[0]["student_topk_mass"] < 1
    assert 0 < lines[0]["entropy"] < math.log(128) and 0 < lines[0]["importance_weight_mean"] <= 2
    assert 0.1 < lines[0]["mismatch_mean"] < lines[0]["mismatch_max"] and 0 < lines[0]["mismatch_share"] <= 1
    for line in lines[1:]:
        assert line == pytest.approx(lines[0], rel=1e-4)


def message_of_a_failing_run(config) -> str:
    from nemo_vopd.training.run import train

    with pytest.raises(RunError) as told:
        train(config)
    return str(told.value)


def test_an_engine_with_other_weights_ends_the_run_before_an_update(assets, tmp_path):
    config = tiny_config(assets, tmp_path, "rollout.dump_path=" + str(tmp_path / "r.jsonl"), "trainer.max_steps=2")
    run_distributed(train_and_collect, 1, config)
    options = ["optimizer.lr=0.1", "rollout.max_mismatch=0.01"]
    stale = replay(assets, tmp_path / "s", tmp_path / "r.jsonl", 2, *options)
    (told,) = run_distributed(message_of_a_failing_run, 1, stale)
    assert re.match(r"the rollout engine's log-probs are \d\S* off the trainer's .*rollout.max_mismatch=0.01", told)
    (line,) = read_lines(tmp_path / "s" / "metrics.jsonl")
    assert line["mismatch_mean"] < 1e-5


def test_sampling_options_arrive(assets, tmp_path, groups):
    from nemo_vopd.model import VisionOPDModel

    overrides = ["rollout.n=3", "rollout.temperature=0.5", "rollout.top_p=0.25", "seed=9"]
    model = VisionOPDModel(tiny_config(assets, tmp_path, *overrides), groups)
    params = model.sampling_params
    assert (params.n, params.temperature, params.top_p, params.seed) == (3, 0.5, 0.25, 9)
    assert params.end_token_ids and params.forbidden_token_ids and params.max_response_length == 8


def test_accuracy_is_measured_at_the_start_and_every_n_steps(assets, tmp_path):
    evaluation = ["evaluation.every_n_steps=2", f"evaluation.path={assets}/tiny-digits", "evaluation.num_samples=4"]
    config = tiny_config(assets, tmp_path, "trainer.max_steps=5", "rollout.max_response_length=2", *evaluation)
    run_distributed(train_and_collect, 2, config)
    lines = read_lines(tmp_path / "evaluations.jsonl")
    assert [(line["step"], line["num_samples"]) for line in lines] == [(0, 4), (2, 4), (4, 4)]
    assert all(0 <= line["full_accuracy"] <= 1 and 0 <= line["crop_accuracy"] <= 1 for line in lines)


def part_of(name: str) -> str:
    """Which option of model.freeze a canonical tensor name belongs to."""
    return "projector" if "merger" in name else "vision" if name.startswith("visual.") else "language"


def train_and_count(config):
    """Weights of student and teacher, and on how many numbers gradients and optimizer state are kept."""
    from nemo_vopd.training.run import train

    model = train(config)
    weights = [dict(iterate_hf(m, model.groups)) for m in (model.student, model.teacher_model)]
    gradients = sum(buffer.grad_data.numel() for chunk in model.student_ddp for buffer in chunk.buffers)
    state = {kind: sum(t.numel() for t, _ in shards.values()) for kind, shards in model.sharded_state().items()}
    shared = {p.data_ptr() for p in model.student.parameters()} & {
        p.data_ptr() for p in model.teacher_model.parameters()
    }
    return *weights, gradients, state, len(shared)


@pytest.mark.parametrize("frozen", [["vision"], ["vision", "projector"], ["language"], ["projector", "language"]])
def test_frozen_parts_stay_and_the_others_move_as_without_them(frozen, assets, tmp_path):
    steps = made_up_rollouts(tiny_config(assets, tmp_path), 1)
    write_rollouts(tmp_path / "r.jsonl", steps)
    options = ["optimizer.clip_grad=0", f"optimizer.lr={LR}"]  # the gradient's norm differs
    size = 1 if "language" in frozen else 2
    layout = ["parallel.tensor=2", "parallel.sequence=true"] if size == 2 else []
    common = [*options, *layout]
    ((free, free_teacher, *_), *_) = run_distributed(
        train_and_count, size, replay(assets, tmp_path / "free", tmp_path / "r.jsonl", 1, *common)
    )
    switches = [f"model.freeze.{part}=true" for part in frozen]
    ((student, teacher, gradients, state, shared), *_) = run_distributed(
        train_and_count, size, replay(assets, tmp_path / "frozen", tmp_path / "r.jsonl", 1, *common, *switches)
    )
    original = HFReader(assets / "tiny-vlm")
    for name, tensor in student.items():
        if part_of(name) in frozen:
            assert torch.equal(tensor, original.read(name)) and torch.equal(teacher[name], original.read(name)), name
        else:
            assert torch.equal(tensor, free[name]) and torch.equal(teacher[name], free_teacher[name]), name
            assert not torch.equal(tensor, original.read(name)), name
    num_frozen = sum(tensor.numel() for name, tensor in student.items() if part_of(name) in frozen)
    num_all = sum(tensor.numel() for tensor in student.values())
    assert shared > 0 and len(set(state.values())) == 1
    if size == 1:
        assert set(state.values()) == {num_all - num_frozen} and gradients < num_all - num_frozen + 1000


def test_a_stage_with_nothing_to_train_is_refused(assets, tmp_path):
    config = tiny_config(assets, tmp_path, "model.freeze.language=true", "parallel.pipeline=3")
    with pytest.raises(RuntimeError, match="model.freeze.language=True: leaves nothing to train on a pipeline stage"):
        run_distributed(train_and_collect, 3, config)


def test_stop_texts_end_the_responses_of_a_run(assets, tmp_path):
    def run(name, *overrides):
        options = "trainer.max_steps=1", f"rollout.dump_path={tmp_path}/{name}.jsonl", *overrides
        run_distributed(train_and_collect, 1, tiny_config(assets, tmp_path / name, *options))
        return [line["token_ids"] for line in read_lines(tmp_path / f"{name}.jsonl")]

    processor = Processor.from_pretrained(str(assets / "tiny-vlm"))
    whole = run("whole")
    stop = processor.decode(
        [next(t for tokens in whole for t in tokens[1:-1] if processor.decode([t]).strip())]
    ).strip()
    cut = run("cut", f"rollout.stop=['{stop}']")
    assert cut != whole
    for long, tokens in zip(whole, cut, strict=True):
        hits = [k for k in range(1, len(long) + 1) if stop in processor.decode(long[:k])]
        assert tokens == long[: hits[0] if hits else None]
