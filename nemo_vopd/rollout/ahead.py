"""Sampling for the next step while this one trains: one step off-policy, which the importance weights correct for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from nemo_vopd.batch import Rollout, Sample
from nemo_vopd.rollout.replay import Record, to_record


class BackgroundEngine(Protocol):
    """An engine that works while this process does something else."""

    def begin(self, samples: list[Sample], step: int) -> None:
        """Start answering `samples`."""
        ...

    def finish(self) -> list[Rollout]:
        """The answers to what `begin` was given last; waits for them. Collective, unlike `begin`."""
        ...

    def sync_weights(self) -> None:
        """Take over the student's weights after an optimizer step."""
        ...


class AheadEngine:
    """Gives the rollouts that were begun a step ago and begins those of the next step.

    Weights are synchronised when the rollouts under way are done, so each batch comes from one state of the student.
    """

    def __init__(self, engine: BackgroundEngine, upcoming: Callable[[], list[Sample]]) -> None:
        """`upcoming` gives the samples of the next step."""
        self.engine, self.upcoming = engine, upcoming
        self._ready: tuple[int, list[Rollout]] | None = None
        self._saved: tuple[int, list[Record]] | None = None
        self._begun: int | None = None

    def generate(self, samples: list[Sample], step: int) -> list[Rollout]:
        """The rollouts of `samples`, begun during the step before if there was one."""
        rollouts = self._of_step(samples, step)
        self._begun = step + 1
        self.engine.begin(self.upcoming(), step + 1)
        return rollouts

    def sync_weights(self) -> None:
        """Wait for the rollouts under way, then let the engine take over the student's weights."""
        self._wait()
        self.engine.sync_weights()

    def pending(self) -> list[Record]:
        """This rank's rollouts of the next step: part of a checkpoint, they came from weights that are gone."""
        self._wait()
        return [] if self._ready is None else [to_record(rollout) for rollout in self._ready[1]]

    def restore(self, step: int, records: list[Record]) -> None:
        """Give the `records` of a checkpoint, of all ranks, at `step` instead of new rollouts, if there are any."""
        self._saved = (step, records) if records else None

    def _wait(self) -> None:
        if self._begun is not None:
            self._ready, self._begun = (self._begun, self.engine.finish()), None

    def _of_step(self, samples: list[Sample], step: int) -> list[Rollout]:
        self._wait()
        if self._ready is not None and self._ready[0] == step:
            return self._ready[1]
        if self._saved is not None and self._saved[0] == step:
            return _restored(samples, self._saved[1])
        self.engine.begin(samples, step)
        return self.engine.finish()


def _restored(samples: list[Sample], records: list[Record]) -> list[Rollout]:
    """This rank's rollouts from the records of all ranks, under whatever layout they were sampled."""
    by_sample: dict[str, list[Record]] = {}
    for record in records:
        by_sample.setdefault(record[0], []).append(record)
    return [
        Rollout(sample, torch.tensor(token_ids, dtype=torch.int64), torch.tensor(log_probs), index)
        for sample in samples
        for _, index, token_ids, log_probs in sorted(by_sample[sample.id], key=lambda record: record[1])
    ]
