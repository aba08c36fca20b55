"""Replay finds responses by the key of a sample, whatever the layout, and names what is missing."""

import json

import pytest
import torch

from nemo_vopd.batch import RecordKey, Rollout, Sample, View
from nemo_vopd.errors import OptionError
from nemo_vopd.rollout.replay import ReplayEngine, dump, to_record

FIRST = RecordKey(0, 0)


def make_rollout(name: str, index: int, token: int, key: RecordKey = FIRST) -> Rollout:
    view = View(torch.tensor([1]), torch.zeros(3, 1, dtype=torch.int64), torch.zeros(0, 1), torch.zeros(0, 3))
    return Rollout(Sample(name, key, view, view, "?"), torch.tensor([token, 2]), torch.tensor([-1.0, -0.5]), index)


def write(path, steps):
    for step, rollouts in enumerate(steps):
        dump(path, [to_record(rollout) for rollout in rollouts], step)


def tokens(rollouts):
    return [(r.sample.id, r.index, r.token_ids[0].item()) for r in rollouts]


def test_every_occurrence_has_responses_of_its_own(tmp_path):
    """The same record in later epochs, also twice in one step, and the same id in two data sets of a blend."""
    path = tmp_path / "rollouts.jsonl"
    places = [RecordKey(0, 5), RecordKey(0, 5, 1), RecordKey(1, 5), RecordKey(1, 9, 1)]
    written = [make_rollout("a", k, 10 * i + k, key) for i, key in enumerate(places) for k in (1, 0)]
    write(path, [written[:6], written[6:]])
    engine = ReplayEngine(path, 2, 128)
    for i, key in reversed(list(enumerate(places))):
        sample = make_rollout("a", 0, 0, key).sample
        assert tokens(engine.generate([sample])) == [("a", 0, 10 * i), ("a", 1, 10 * i + 1)]
    with pytest.raises(OptionError, match="no response to sample a for occurrence 2"):
        engine.generate([make_rollout("a", 0, 0, RecordKey(0, 5, 2)).sample])


def test_responses_written_by_hand_are_found_by_sample_id(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    lines = [{"sample_id": "a", "index": k, "token_ids": [k, 2], "log_probs": [-1.0, -0.5]} for k in (0, 1)]
    path.write_text("\n".join(map(json.dumps, lines)))
    for key in (RecordKey(0, 3), RecordKey(2, 0, 4)):
        assert tokens(ReplayEngine(path, 2, 128).generate([make_rollout("a", 0, 0, key).sample])) == [
            ("a", 0, 0),
            ("a", 1, 1),
        ]
    path.write_text("\n".join(map(json.dumps, [*lines, lines[0]])))
    with pytest.raises(OptionError, match="line 3 .*response 0 to sample a stands in the file already"):
        ReplayEngine(path, 2, 128)


def test_a_file_is_written_anew_by_step_0(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    write(path, [[make_rollout("a", 0, 1)], [make_rollout("b", 0, 2)]])
    write(path, [[make_rollout("c", 0, 3)]])
    assert path.read_text().count("\n") == 1 and '"c"' in path.read_text()


def test_what_is_missing_is_named(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    write(path, [[make_rollout("a", 0, 1), make_rollout("a", 2, 3), make_rollout("a", 3, 4)]])
    with pytest.raises(OptionError, match="no response to sample b"):
        ReplayEngine(path, 1, 128).generate([make_rollout("b", 0, 1, RecordKey(0, 1)).sample])
    with pytest.raises(OptionError, match="response to sample a for the record that is now sample b"):
        ReplayEngine(path, 1, 128).generate([make_rollout("b", 0, 1).sample])
    for n in (2, 3, 4):  # number 1 is missing
        with pytest.raises(OptionError, match=f"rollout.n={n}"):
            ReplayEngine(path, n, 128).generate([make_rollout("a", 0, 1).sample])


def test_a_line_that_is_no_rollout_is_named(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    write(path, [[make_rollout("a", 0, 1)]])
    good = json.loads(path.read_text())
    wrong = [
        {**good, "index": 1, **change}
        for change in (
            {"token_ids": "xy"},
            {"token_ids": [1.5, 2]},
            {"token_ids": [1]},
            {"index": "1"},
            {"log_probs": None},
            {"log_probs": [float("-inf"), -1.0]},
            {"log_probs": [-(10**400), -1.0]},
            {"log_probs": [0.1, -1.0]},
            {"log_probs": [False, -1.0]},
            {"log_probs": [[-1.0], [-1.0]]},
            {"index": -1},
        )
    ]
    for token in (128, 500, -1):  # an embedding has no row for it
        path.write_text(json.dumps({**good, "token_ids": [token], "log_probs": [0.0]}))
        with pytest.raises(OptionError, match=f"line 1 .*token id {token}, and the model has 128 tokens"):
            ReplayEngine(path, 1, 128)
    lines = ("{", "3", '{"step": 0}', "[" * 100_000, *map(json.dumps, wrong))
    for line in (b"\xff", *map(str.encode, lines)):
        path.write_bytes(json.dumps(good).encode() + b"\n" + line + b"\n")
        with pytest.raises(OptionError, match="line 2 is not a rollout") as caught:
            ReplayEngine(path, 1, 128)
        assert len(str(caught.value)) < 400
    for name in (tmp_path, tmp_path / ("a" * 5000)):
        with pytest.raises(OptionError, match="is not a file"):
            ReplayEngine(name, 1, 128)
