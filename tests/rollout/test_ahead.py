"""Sampling one step ahead: what is asked for when, and that a restart gives the rollouts that were under way."""

import torch

from nemo_vopd.batch import RecordKey, Rollout, Sample, blank_rollout
from nemo_vopd.rollout.ahead import AheadEngine


class Recorder:
    """Answers every sample with the number of weight updates it has seen, twice."""

    def __init__(self) -> None:
        self.version, self.calls, self.under_way = 0, [], None

    def begin(self, samples: list[Sample]) -> None:
        assert self.under_way is None
        self.calls.append(("begin", samples[0].key.occurrence if samples else None, self.version))
        self.under_way = [
            Rollout(sample, torch.tensor([self.version]), torch.tensor([-0.5]), k) for sample in samples for k in (0, 1)
        ]

    def finish(self) -> list[Rollout]:
        rollouts, self.under_way = self.under_way, None
        return rollouts

    def sync_weights(self) -> None:
        assert self.under_way is None  # or a batch would come from two states of the weights
        self.version += 1


def samples(step: int) -> list[Sample]:
    view = blank_rollout(0).sample.student
    return [Sample(f"{step}-{i}", RecordKey(0, i, step), view, view, "") for i in range(3)]


def run(first: int, last: int, records=None, goes_on=False) -> tuple[AheadEngine, Recorder, list]:
    recorder, current = Recorder(), [first]
    engine = AheadEngine(recorder, lambda: samples(current[0] + 1) if current[0] + 1 < last or goes_on else [])
    if records is not None:
        engine.restore(records)
    rollouts = []
    for step in range(first, last):
        current[0] = step
        engine.sync_weights()
        rollouts.append([(r.sample.id, r.index, r.token_ids.tolist()) for r in engine.generate(samples(step))])
    return engine, recorder, rollouts


def test_each_batch_comes_from_the_weights_of_one_step_before():
    _, recorder, rollouts = run(0, 4)
    # the first two batches come from the weights that the run began with, then each is one update behind
    assert recorder.calls == [("begin", 0, 1), ("begin", 1, 1), ("begin", 2, 2), ("begin", 3, 3), ("begin", None, 4)]
    assert [batch[0] for batch in rollouts] == [("0-0", 0, [1]), ("1-0", 0, [1]), ("2-0", 0, [2]), ("3-0", 0, [3])]
    assert [(name, k) for name, k, _ in rollouts[0]] == [(f"0-{i}", k) for i in range(3) for k in (0, 1)]


def test_a_restart_gives_the_rollouts_that_were_under_way():
    _, _, whole = run(0, 5)
    engine, _, _ = run(0, 3)
    assert engine.pending() == []  # the run ends with this step: nothing was begun for another
    engine, _, _ = run(0, 3, goes_on=True)
    records = engine.pending()
    assert [(r["sample_id"], r["index"], r["token_ids"]) for r in records] == whole[3]
    _, _, resumed = run(3, 5, list(reversed(records)))
    assert resumed[0] == whole[3]
