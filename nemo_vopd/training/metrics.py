"""Phase timers, the metrics file and the progress line."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch.callbacks import TQDMProgressBar

from nemo_vopd.batch import Rollout


class Timers:
    """Wall-clock seconds of each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time `phase`; GPU work queued in it is waited for, so that seconds belong to their phase."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def pop(self) -> dict[str, float]:
        """`seconds_<phase>` of the step and `seconds_step`, the time since the last call; starts the next step."""
        now = time.perf_counter()
        result = {f"seconds_{phase}": seconds for phase, seconds in self.seconds.items()}
        result["seconds_step"] = now - self._start
        self.seconds, self._start = {}, now
        return result


class MetricsFile:
    """metrics.jsonl: one JSON object a step, each step once, also after a restart."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Open `path`; lines from `first_step` on, left by an interrupted run, are taken out.

        A run that starts at step 0 keeps an earlier run's file as `<name>.previous`.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and first_step == 0:
            path.replace(path.with_name(path.name + ".previous"))
        keep_lines_before(path, first_step)
        self._file = path.open("a", buffering=1)

    def write(self, metrics: dict) -> None:
        """Append one line; non-finite numbers become null, which JSON can hold."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        self._file.write(json.dumps(clean) + "\n")


def keep_lines_before(path: Path, step: int) -> None:
    """Leave only the lines of the JSONL file `path` whose "step" is below `step`; makes the file if there is none."""
    kept = [line for line in path.read_text().splitlines() if _step(line) < step] if path.exists() else []
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text("".join(line + "\n" for line in kept))
    temporary.replace(path)


def distinct_2(rollouts: list[Rollout]) -> tuple[float, int]:
    """(sum over responses of distinct over all pairs of neighbouring tokens, number of responses with a pair).

    The mean falls towards 0 when responses repeat themselves, the usual form of collapse.
    """
    total, num = 0.0, 0
    for rollout in rollouts:
        tokens = rollout.token_ids.tolist()
        pairs = list(zip(tokens, tokens[1:], strict=False))
        if pairs:
            total, num = total + len(set(pairs)) / len(pairs), num + 1
    return total, num


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # a line cut off by a crash


class ProgressBar(TQDMProgressBar):
    """Step, loss, response length and tokens a second on one live line."""

    def get_metrics(self, trainer, pl_module):
        """Without the logger's version number, which is always the same here."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        """Count the steps of the whole run, not those since it was resumed."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)
