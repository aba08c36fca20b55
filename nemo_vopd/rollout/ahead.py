"""Sampling for the next step while this one trains: one step off-policy, which the importance weights correct for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from nemo_vopd.batch import RecordKey, Rollout, Sample
from nemo_vopd.rollout.engine import RolloutEngine
from nemo_vopd.rollout.replay import Record, to_record


class BackgroundEngine(Protocol):
    """An engine that works while this process does something else."""

    def begin(self, samples: list[Sample]) -> None:
        """Start answering `samples`."""
        ...

    def finish(self) -> list[Rollout]:
        """The answers to what `begin` was given last; waits for them. Collective, unlike `begin`."""
        ...

    def sync_weights(self) -> None:
        """Take over the student's weights after an optimizer step."""
        ...


class AheadEngine(RolloutEngine):
    """Gives the rollouts that were begun a step ago and begins those of the next step.

    Weights are synchronised when the rollouts under way are done, so each batch comes from one state of the student.
    """

    def __init__(self, engine: BackgroundEngine, upcoming: Callable[[], list[Sample]]) -> None:
        """`upcoming` gives the samples of the next step."""
        self.engine, self.upcoming = engine, upcoming
        self._ready: list[Rollout] | None = None
        self._saved: list[Record] = []
        self._under_way = False

    def generate(self, samples: list[Sample]) -> list[Rollout]:
        """The rollouts of `samples`, begun during the step before if there was one."""
        rollouts = self._answered(samples)
        self.engine.begin(self.upcoming())
        self._under_way = True
        return rollouts

    def sync_weights(self) -> None:
        """Wait for the rollouts under way, then let the engine take over the student's weights."""
        self._wait()
        self.engine.sync_weights()

    def pending(self) -> list[Record]:
        """This rank's rollouts of the next step: part of a checkpoint, they came from weights that are gone."""
        self._wait()
        return [to_record(rollout) for rollout in self._ready or []]

    def restore(self, records: list[Record]) -> None:
        """Give the `records` of a checkpoint, of all ranks, in place of the first rollouts, if there are any."""
        self._saved = records

    def _wait(self) -> None:
        if self._under_way:
            self._ready, self._under_way = self.engine.finish(), False

    def _answered(self, samples: list[Sample]) -> list[Rollout]:
        """Rollouts that are there already, or new ones. `finish` is collective: all ranks have some, or none does."""
        self._wait()
        ready, saved = self._ready, self._saved
        self._ready, self._saved = None, []
        if ready is not None:
            return ready
        if saved:
            return _restored(samples, saved)
        self.engine.begin(samples)
        return self.engine.finish()


def _restored(samples: list[Sample], records: list[Record]) -> list[Rollout]:
    """This rank's rollouts from the records of all ranks, under whatever layout they were sampled."""
    by_key: dict[RecordKey, list[Record]] = {}
    for record in records:
        by_key.setdefault(RecordKey(*(record[name] for name in RecordKey._fields)), []).append(record)
    return [
        Rollout(sample, torch.tensor(r["token_ids"], dtype=torch.int64), torch.tensor(r["log_probs"]), r["index"])
        for sample in samples
        for r in sorted(by_key[sample.key], key=lambda record: record["index"])
    ]
