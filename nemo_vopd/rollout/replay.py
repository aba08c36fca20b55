"""Responses from a file: write what any engine produced, read it back under any layout."""

from __future__ import annotations

import json
import math
import os
import reprlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_vopd.batch import RecordKey, Rollout, Sample
from nemo_vopd.errors import OptionError
from nemo_vopd.rollout.engine import RolloutEngine

Record = dict[str, Any]
"""One rollout in plain values: sample_id, data_set, record, occurrence, index, token_ids, log_probs."""

_REMEDY = "give a file that rollout.dump_path wrote"
_LEAST_LOG_PROB, _ROUND_OFF = -1e30, 1e-3
"""Bounds of log-probs: what float32 holds, and a little above 0, where a probability of 1 may be rounded to."""


def to_record(rollout: Rollout) -> Record:
    """What is written of one rollout; it also travels between ranks and into checkpoints."""
    return {
        "sample_id": rollout.sample.id,
        **rollout.sample.key._asdict(),
        "index": rollout.index,
        "token_ids": rollout.token_ids.tolist(),
        "log_probs": rollout.log_probs.tolist(),
    }


def dump(path: str | Path, records: list[Record], step: int) -> None:
    """Write the `records` of training step `step` to the JSONL file `path`, one line each; step 0 starts it anew."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w" if step == 0 else "a") as file:
        file.writelines(json.dumps({"step": step, **record}) + "\n" for record in records)


class ReplayEngine(RolloutEngine):
    """Finds recorded responses by the key of a sample, so it works under any layout and batch size.

    Lines without a key (data_set, record, occurrence), written by hand for example, are found by sample id.
    """

    def __init__(self, path: str | Path, n: int, vocab_size: int) -> None:
        """Read the file that `rollout.dump_path` wrote; `n` responses are taken for each sample.

        Raises OptionError with the number of a line that is no rollout of a model with `vocab_size` tokens.
        """
        self.path, self.n, self.vocab_size = path, n, vocab_size
        self._responses: dict[RecordKey | str, dict[int, tuple[str, Tensor, Tensor]]] = {}
        if not os.path.isfile(path):  # unlike Path.is_file, this takes a name of any length
            raise OptionError("rollout.path", path, "is not a file", _REMEDY)
        try:
            file = Path(path).open("rb")
        except OSError as error:
            raise OptionError("rollout.path", path, f"cannot be read ({error.strerror})", _REMEDY) from None
        with file:
            for number, line in enumerate(file, 1):
                try:
                    self._add(json.loads(line))
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    why = f" ({error})" if isinstance(error, _Reason) else ""
                    raise OptionError("rollout.path", path, f"line {number} is not a rollout{why}", _REMEDY) from None

    def _add(self, line: Record) -> None:
        sample_id, index, tokens, log_probs = (line[k] for k in ("sample_id", "index", "token_ids", "log_probs"))
        key = RecordKey(*(line[name] for name in RecordKey._fields)) if "record" in line else sample_id
        if not all(type(number) is int for number in (index, *tokens)) or len(tokens) != len(log_probs):
            raise ValueError("a token id is no integer, or ids and log-probs differ in number")
        if index < 0:
            raise _Reason(f"index {index}, and the first response has index 0")
        for number in log_probs:
            if isinstance(number, float) and math.isnan(number):
                continue  # a run whose weights are not finite dumps it; the step that reads it is skipped and counted
            if type(number) not in (int, float) or not _LEAST_LOG_PROB <= number <= _ROUND_OFF:
                raise _Reason(f"log-prob {reprlib.repr(number)}, and the logarithm of a probability is 0 or less")
        if strangers := [number for number in tokens if not 0 <= number < self.vocab_size]:
            raise _Reason(f"token id {strangers[0]}, and the model has {self.vocab_size} tokens")
        responses = self._responses.setdefault(key, {})
        if index in responses:
            raise _Reason(f"response {index} to sample {sample_id} stands in the file already")
        ids = torch.tensor(tokens, dtype=torch.int64)
        responses[index] = sample_id, ids, torch.tensor(log_probs, dtype=torch.float32)

    def generate(self, samples: list[Sample]) -> list[Rollout]:
        """The recorded rollouts of `samples`."""
        rollouts = []
        for sample in samples:
            responses = self._responses.get(sample.key) or self._responses.get(sample.id)
            if not responses:
                occurrence = f" for occurrence {sample.key.occurrence}" if sample.key.occurrence else ""
                rule = f"has no response to sample {sample.id}{occurrence}"
                remedy = "replay with the data set and the seed of the run that wrote it"
                raise OptionError("rollout.path", self.path, rule, remedy)
            if any(k not in responses for k in range(self.n)):
                rule = f"the file holds responses {sorted(responses)} to sample {sample.id}"
                raise OptionError("rollout.n", self.n, rule, "set rollout.n to that of the run that wrote it")
            for index in range(self.n):
                sample_id, tokens, log_probs = responses[index]
                if sample_id != sample.id:
                    rule = f"has a response to sample {sample_id} for the record that is now sample {sample.id}"
                    raise OptionError("rollout.path", self.path, rule, "replay with the data set it was written with")
                rollouts.append(Rollout(sample, tokens, log_probs, index))
        return rollouts


class _Reason(ValueError):
    """Why a line that reads well is no rollout of this run."""
