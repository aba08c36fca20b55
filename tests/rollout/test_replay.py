"""Replay finds the response of a sample by step and number, and names what is missing."""

import pytest
import torch

from nemo_vopd.batch import Rollout, Sample, View
from nemo_vopd.errors import OptionError
from nemo_vopd.rollout.replay import ReplayEngine, dump, to_record


def make_rollout(name: str, index: int, token: int) -> Rollout:
    view = View(torch.tensor([1]), torch.zeros(3, 1, dtype=torch.int64), torch.zeros(0, 1), torch.zeros(0, 3))
    return Rollout(Sample(name, view, view, "?"), torch.tensor([token, 2]), torch.tensor([-1.0, -0.5]), index)


def write(path, steps):
    for step, rollouts in enumerate(steps):
        dump(path, [to_record(rollout) for rollout in rollouts], step)


def first_tokens(rollouts):
    return [(r.sample.id, r.index, r.token_ids[0].item()) for r in rollouts]


def test_a_sample_that_comes_back_gets_the_responses_of_its_step(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    steps = [[make_rollout("a", k, 10 * step + k) for k in (1, 0)] for step in range(3)]
    write(path, steps)
    engine, sample = ReplayEngine(path, 2), steps[0][0].sample
    for step in (2, 0, 1):
        assert first_tokens(engine.generate([sample], step)) == [("a", 0, 10 * step), ("a", 1, 10 * step + 1)]


def test_a_file_is_written_anew_by_step_0(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    write(path, [[make_rollout("a", 0, 1)], [make_rollout("b", 0, 2)]])
    write(path, [[make_rollout("c", 0, 3)]])
    assert path.read_text().count("\n") == 1 and '"c"' in path.read_text()


def test_missing_samples_and_responses_are_named(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    write(path, [[make_rollout("a", 0, 1), make_rollout("a", 2, 3), make_rollout("a", 3, 4)]])
    with pytest.raises(OptionError, match="no response to sample b"):
        ReplayEngine(path, 1).generate([make_rollout("b", 0, 1).sample], 0)
    for n in (2, 3, 4):  # number 1 is missing
        with pytest.raises(OptionError, match=f"rollout.n={n}"):
            ReplayEngine(path, n).generate([make_rollout("a", 0, 1).sample], 0)


def test_a_line_that_is_no_rollout_is_named(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    write(path, [[make_rollout("a", 0, 1)]])
    for line in (
        "{",
        "3",
        '{"step": 0}',
        '{"step": 0, "sample_id": "a", "index": 1, "token_ids": "x", "log_probs": []}',
    ):
        path.write_text(path.read_text().splitlines()[0] + "\n" + line + "\n")
        with pytest.raises(OptionError, match="line 2 is not a rollout"):
            ReplayEngine(path, 1)
