"""When to save and when to stop: decided after each step, alike on every rank."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_vopd.config import Config, EarlyStopConfig
from nemo_vopd.errors import RunError
from nemo_vopd.mcore import cpu, parallel
from nemo_vopd.training.signals import StopSignals
from nemo_vopd.validation import seconds

REASONS = ("max_steps", "early_stop", "max_time", "SIGINT", "SIGTERM", "SIGUSR1")
"""Reasons for an orderly end. After the first two a run is finished; after the others it can be resumed."""
FINISHED = ("max_steps", "early_stop")


class RunControl:
    """The reason to stop, if there is one, and how many bad updates came in a row."""

    def __init__(self, config: Config) -> None:
        """Start the clock of `trainer.max_time`. `signals` listens once it is entered, and may be replaced before."""
        self.config = config
        self.status_file = Path(config.exp_manager["exp_dir"]) / "status.json"
        self.signals = StopSignals()
        self.skipped_in_a_row = 0
        self.outside_in_a_row = 0
        self._start = self._step_start = time.monotonic()
        self._limit = seconds(config.trainer.max_time)

    def watch(self, values: dict[str, float]) -> None:
        """Compare newly measured `values` with the range of `distill.early_stop`."""
        if values.get("num_response_tokens") == 0:  # says nothing
            return
        rule = self.config.distill.early_stop
        if rule.metric in values:
            self.outside_in_a_row = self.outside_in_a_row + 1 if _outside(values[rule.metric], rule) else 0

    def check_mismatch(self, metrics: dict[str, float]) -> None:
        """Raise RunError, before any weight moves, when engine and trainer differ by over `rollout.max_mismatch`."""
        limit = self.config.rollout.max_mismatch
        if limit is None or metrics["mismatch_mean"] <= limit or not metrics["num_response_tokens"]:
            return
        raise RunError(
            f"the rollout engine's log-probs are {metrics['mismatch_mean']:.2g} off the trainer's on average, "
            f"{metrics['mismatch_max']:.2g} at most (rollout.max_mismatch={limit}): it runs stale or other weights, "
            "another precision or temperature; no weight was changed by this step; "
            "see docs/troubleshooting.md, or raise rollout.max_mismatch"
        )

    def count_update(self, updated: bool, num_tokens: int, last_checkpoint: Path | None) -> None:
        """Raise RunError after `trainer.max_skipped_updates` in a row that were not finite."""
        if updated or not num_tokens:  # a step without a token is the data's fault and says nothing of the weights
            self.skipped_in_a_row = 0 if updated else self.skipped_in_a_row
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.config.trainer.max_skipped_updates:
            kept = f"the last checkpoint, {last_checkpoint}, is intact" if last_checkpoint else "nothing was saved"
            raise RunError(
                f"the loss or its gradient was not finite in {self.skipped_in_a_row} updates in a row "
                f"(trainer.max_skipped_updates); no weight was changed by them and {kept}; "
                "resume with a lower optimizer.lr, or with precision=fp32 to find the cause"
            )

    def stop_reason(self, step: int) -> str | None:
        """Why to stop now that `step` steps are done, the same on every rank; None to go on."""
        now = time.monotonic()
        duration, self._step_start = now - self._step_start, now
        mine = -1
        if self.signals.received is not None:
            mine = REASONS.index(self.signals.received)
        elif self._limit is not None and now - self._start + duration > self._limit:
            mine = REASONS.index("max_time")
        code = torch.tensor(mine, dtype=torch.int32, device=cpu.device())
        dist.all_reduce(code, op=dist.ReduceOp.MAX)
        return self.finished(step) or (REASONS[int(code)] if code >= 0 else None)

    def finished(self, step: int) -> str | None:
        """Why there is nothing left to do after `step` steps, if so."""
        early_stop = self.config.distill.early_stop
        if step >= self.config.trainer.max_steps:
            return "max_steps"
        outside = early_stop.metric is not None and self.outside_in_a_row >= early_stop.patience
        return "early_stop" if outside else None

    def write_status(self, reason: str, step: int, checkpoint: Path | None) -> None:
        """status.json: whether the run is finished, for scripts that decide about another job."""
        if not parallel.is_rank_zero():
            return
        status = {
            "finished": reason in FINISHED,
            "reason": reason,
            "step": step,
            "max_steps": self.config.trainer.max_steps,
            "checkpoint": str(checkpoint) if checkpoint else None,
        }
        self._write(status)

    def write_error(self) -> None:
        """Let status.json say that the run ended with an error, unless it gives another reason already."""
        if parallel.is_rank_zero():
            status = json.loads(self.status_file.read_text())
            if status["reason"] == "running":
                self._write({**status, "reason": "error"})

    def _write(self, status: dict) -> None:
        self.status_file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.status_file.with_name("status.json.partial")
        temporary.write_text(json.dumps(status) + "\n")
        os.replace(temporary, self.status_file)

    def state(self) -> dict:
        """Counters that survive a restart."""
        return {"skipped_in_a_row": self.skipped_in_a_row, "outside_in_a_row": self.outside_in_a_row}

    def restore(self, state: dict) -> None:
        """Count on from `state`."""
        self.skipped_in_a_row, self.outside_in_a_row = state["skipped_in_a_row"], state["outside_in_a_row"]


def _outside(value: float, rule: EarlyStopConfig) -> bool:
    low = -math.inf if rule.min is None else rule.min
    high = math.inf if rule.max is None else rule.max
    return not low <= value <= high
