"""What a run writes about its steps: sums over all ranks, metrics.jsonl and its sisters, timers, the progress line."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import TQDMProgressBar
from megatron.core.process_groups_config import ProcessGroupCollection
from nemo.utils import logging
from torch import Tensor

from nemo_vopd.batch import DroppedSample, PromptBatch, Rollout
from nemo_vopd.distill.fused import TokenStats
from nemo_vopd.distill.importance import mismatch
from nemo_vopd.errors import OptionError, printable
from nemo_vopd.images import DROP_REASONS
from nemo_vopd.mcore import cpu, parallel
from nemo_vopd.rollout.replay import dump, to_record
from nemo_vopd.watchdog import beat

_NUM_SUMS = 10
"""Number of sums in `step_sums`: loss, tokens, six fields of TokenStats, two of `mismatch`; a maximum follows."""
_TOO_FEW = 2
"""Number of unusable records that never ends a run: a share of a handful says nothing."""


def step_sums(loss_sum: Tensor, stats: TokenStats, rollout_log_probs: Tensor) -> Tensor:
    """[11] float32: what `Reporter.reduce` needs of one microbatch."""
    totals = torch.stack([loss_sum.detach().float(), torch.full_like(loss_sum, len(rollout_log_probs)).float()])
    return torch.cat([totals, stats.sums(), mismatch(stats.log_probs, rollout_log_probs)])


class Reporter:
    """Reduces the statistics of a step over ranks and keeps count of unusable records since the run began."""

    def __init__(
        self, folder: Path, groups: ProcessGroupCollection, max_dropped_fraction: float, dump_path: str | None
    ) -> None:
        """Write to `folder`; see `data.max_dropped_fraction` and `rollout.dump_path`."""
        self.folder, self.groups, self.max_dropped_fraction = folder, groups, max_dropped_fraction
        self.dump_path = None if dump_path is None else Path(dump_path)
        self.num_records = 0
        self.dropped: Counter[str] = Counter()
        self._files: dict[str, MetricsFile] = {}

    def open(self, first_step: int) -> None:
        """Open the files on rank 0; lines from `first_step` on are those of an interrupted run and are taken out."""
        if parallel.is_rank_zero():
            for name in ("metrics", "dropped"):
                self._files[name] = MetricsFile(self.folder / f"{name}.jsonl", first_step)
            if self.dump_path is not None and first_step:
                keep_lines_before(self.dump_path, first_step)
            # accuracy after a step is measured before that step's checkpoint is written
            self._files["evaluations"] = MetricsFile(self.folder / "evaluations.jsonl", first_step + (first_step > 0))

    def write(self, name: str, values: dict) -> None:
        """Append one line to `<name>.jsonl` (rank 0)."""
        if name in self._files:
            self._files[name].write(values)

    def dump(self, rollouts: list[Rollout], step: int) -> None:
        """Write the rollouts of all data-parallel ranks to `dump_path`, if there is one; collective."""
        if self.dump_path is not None:
            records = parallel.gather_all([to_record(rollout) for rollout in rollouts], self.groups.dp_cp)
            if parallel.is_rank_zero():
                dump(self.dump_path, records, step)

    def reduce(
        self, statistics: list[Tensor], rollouts: list[Rollout], batch: PromptBatch, dropped_responses: list[Rollout]
    ) -> dict:
        """Sum statistics and counts of this step over all ranks and turn them into means over tokens.

        `rollouts` are those that were scored, `dropped_responses` those that could not be.
        """
        reasons = Counter(sample.reason for sample in batch.dropped)
        counts = [
            len(rollouts),
            len(dropped_responses),
            len(batch.samples) + len(batch.dropped),
            *distinct_2(rollouts),
            *(reasons[reason] for reason in DROP_REASONS),
        ]
        sums = torch.zeros(_NUM_SUMS + len(counts), dtype=torch.float64, device=cpu.device())
        largest = torch.zeros((), dtype=torch.float64, device=cpu.device())
        if parallel.is_last_stage(self.groups):  # the other stages have no statistics and would count twice
            microbatches = torch.stack(statistics).double()
            sums[:_NUM_SUMS] = microbatches[:, :_NUM_SUMS].sum(0)
            sums[_NUM_SUMS:] = torch.tensor(counts)
            largest = microbatches[:, _NUM_SUMS].max()
        for group in (self.groups.dp_cp, self.groups.pp):
            dist.all_reduce(sums, group=group)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        loss, tokens, divergence, _, importance, entropy, student_mass, teacher_mass, apart, far, *total = sums.tolist()
        num_responses, num_dropped_responses, num_records, distinct, num_bigram_responses, *by_reason = total
        dropped = {reason: int(num) for reason, num in zip(DROP_REASONS, by_reason, strict=True) if num}
        self.num_records += int(num_records)
        self.dropped.update(dropped)
        num = max(tokens, 1.0)
        return {
            "loss": loss / num,
            "num_response_tokens": int(tokens),
            "num_responses": int(num_responses),
            "num_dropped_samples": sum(dropped.values()),
            "num_dropped_responses": int(num_dropped_responses),
            "dropped_by_reason": dropped,
            "mean_response_length": tokens / max(num_responses, 1.0),
            "distinct_2": distinct / max(num_bigram_responses, 1.0),
            "divergence": divergence / num,
            "teacher_topk_mass": teacher_mass / num,
            "student_topk_mass": student_mass / num,
            "importance_weight_mean": importance / num,
            "mismatch_mean": apart / num,
            "mismatch_max": largest.item(),
            "mismatch_share": far / num,
            "entropy": entropy / num,
        }

    def tell_dropped(self, step: int, metrics: dict, batch: PromptBatch, dropped_responses: list[Rollout]) -> None:
        """Append what was dropped to dropped.jsonl; when a reason occurs for the first time, print it with an example.

        Raises OptionError on every rank when too large a share of the records so far could not be used.
        """
        if not metrics["num_dropped_samples"] and not metrics["num_dropped_responses"]:
            return
        mine = [*batch.dropped]
        mine += [
            DroppedSample(r.sample.id, "vision_token_in_response", f"response {r.index}") for r in dropped_responses
        ]
        dropped: list[DroppedSample] = parallel.gather_all(mine, self.groups.dp_cp)
        for sample in dropped:
            line = {"step": step, "id": sample.id, "reason": sample.reason, "detail": sample.detail}
            self.write("dropped", line)
        for reason in metrics["dropped_by_reason"]:
            if self.dropped[reason] == metrics["dropped_by_reason"][reason]:  # met for the first time
                first = next(sample for sample in dropped if sample.reason == reason)
                logging.warning("dropped sample %s", printable(f"{first.id}: {first.reason} ({first.detail})"))
        num, limit = sum(self.dropped.values()), self.max_dropped_fraction
        if num > limit * self.num_records and (num > _TOO_FEW or limit == 0):
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.most_common())
            raise OptionError(
                "data.max_dropped_fraction",
                limit,
                f"was exceeded: {num} of {self.num_records} records could not be used ({reasons})",
                f"mend the records that {self.folder / 'dropped.jsonl'} names and start anew, or raise the limit",
            )

    def state(self) -> dict:
        """Counters that survive a restart."""
        return {"num_records": self.num_records, "dropped": dict(self.dropped)}

    def restore(self, state: dict) -> None:
        """Count on from `state`."""
        self.num_records, self.dropped = state["num_records"], Counter(state["dropped"])


class Timers:
    """Wall-clock seconds of each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time `phase`; GPU work queued in it is waited for, so that seconds belong to their phase."""
        start = time.perf_counter()
        beat()
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
    kept = [line for line in path.read_bytes().splitlines() if _step(line) < step] if path.exists() else []
    temporary = path.with_name(path.name + ".partial")
    temporary.write_bytes(b"".join(line + b"\n" for line in kept))
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


def _step(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut off by a crash, or none of ours


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
