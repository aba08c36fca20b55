"""Responses from a file: write what any engine produced, read it back under any layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from nemo_vopd.batch import Rollout, Sample
from nemo_vopd.errors import OptionError

Record = tuple[str, int, list[int], list[float]]
"""Sample id, number of the response, token ids, log-probs."""


def to_record(rollout: Rollout) -> Record:
    """What is written of one rollout: plain values that also travel between ranks."""
    return rollout.sample.id, rollout.index, rollout.token_ids.tolist(), rollout.log_probs.tolist()


def dump(path: str | Path, records: list[Record], step: int) -> None:
    """Write the `records` of training step `step` to the JSONL file `path`, one line each; step 0 starts it anew."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w" if step == 0 else "a") as file:
        for sample_id, index, token_ids, log_probs in records:
            record = {"step": step, "sample_id": sample_id, "index": index}
            file.write(json.dumps({**record, "token_ids": token_ids, "log_probs": log_probs}) + "\n")


class ReplayEngine:
    """Finds responses by sample id (and step, where a sample comes back), so it works under any layout."""

    def __init__(self, path: str | Path, n: int) -> None:
        """Read the file that `rollout.dump_path` wrote; `n` responses are taken for each sample."""
        self.path, self.n = path, n
        self._by_sample: dict[str, dict[int, dict[int, tuple[torch.Tensor, torch.Tensor]]]] = {}
        remedy = "give a file that rollout.dump_path wrote"
        if not Path(path).is_file():
            raise OptionError("rollout.path", path, "is not a file", remedy)
        with Path(path).open() as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                    steps = self._by_sample.setdefault(record["sample_id"], {})
                    steps.setdefault(record["step"], {})[record["index"]] = (
                        torch.tensor(record["token_ids"], dtype=torch.int64),
                        torch.tensor(record["log_probs"], dtype=torch.float32),
                    )
                except (ValueError, KeyError, TypeError):
                    raise OptionError("rollout.path", path, f"line {number} is not a rollout", remedy) from None

    def generate(self, samples: list[Sample], step: int) -> list[Rollout]:
        """The recorded rollouts of `samples`: those of `step`, or of the only step that has the sample."""
        rollouts = []
        for sample in samples:
            steps = self._by_sample.get(sample.id)
            if not steps:
                raise OptionError(
                    "rollout.path",
                    self.path,
                    f"has no response to sample {sample.id}",
                    "replay with the data set and the seed of the run that wrote it",
                )
            if step not in steps and len(steps) > 1:
                rule = f"has responses to sample {sample.id} at steps {sorted(steps)}, none at step {step}"
                raise OptionError("rollout.path", self.path, rule, "replay with the seed of the run that wrote it")
            recorded = steps[step] if step in steps else next(iter(steps.values()))
            if any(k not in recorded for k in range(self.n)):
                rule = f"the file holds responses {sorted(recorded)} to sample {sample.id}"
                raise OptionError("rollout.n", self.n, rule, "set rollout.n to that of the run that wrote it")
            rollouts += [Rollout(sample, *recorded[k], index=k) for k in range(self.n)]
        return rollouts

    def sync_weights(self) -> None:
        """Nothing to do: recorded responses do not depend on the weights."""
