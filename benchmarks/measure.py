"""Measurements of recipes/benchmark.py: medians, peak memory, and a reference in the same run."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nemo_vopd.batch import Rollout
from nemo_vopd.config import Config
from nemo_vopd.distill.divergence import generalized_jsd
from nemo_vopd.distill.fused import LossOptions, Policy, fused_linear_jsd
from nemo_vopd.mcore import cpu, parallel
from nemo_vopd.mcore.optimizer import learning_rate
from nemo_vopd.mcore.schedule import student_pass, teacher_pass
from nemo_vopd.model import VisionOPDModel

Row = dict[str, float | int | str]


class PeakMemory:
    """Highest memory above the start while the block runs, in bytes: CUDA's own count, or resident memory sampled."""

    def __enter__(self) -> PeakMemory:
        self.extra = 0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
            return self
        self._page = os.sysconf("SC_PAGE_SIZE")
        self._start, self._done = self._resident(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            self.extra = torch.cuda.max_memory_allocated() - self._start
            return
        self._done.set()
        self._watcher.join()

    def _resident(self) -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * self._page

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.extra = max(self.extra, self._resident() - self._start)


def measure(function: Callable[[], object], repeats: int) -> tuple[float, float]:
    """(median seconds, highest extra GiB) of `repeats` calls after one that is not counted."""
    return measure_in_turn([function], repeats)[0]


def measure_in_turn(functions: list[Callable[[], object]], repeats: int) -> list[tuple[float, float]]:
    """`measure` of each function, called in turn: what else the machine does falls on all of them."""
    seconds, peaks = [[] for _ in functions], [0] * len(functions)
    for number in range(repeats + 1):
        for i, function in enumerate(functions):
            with PeakMemory() as memory:
                start = time.perf_counter()
                function()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                elapsed = time.perf_counter() - start
            if number or repeats == 0:
                seconds[i].append(elapsed)
                peaks[i] = max(peaks[i], memory.extra)
    return [(statistics.median(times), peak / 2**30) for times, peak in zip(seconds, peaks, strict=True)]


def loss(
    num_tokens: list[int], vocab_size: int, hidden_size: int, top_k: int | None, alpha: float, repeats: int
) -> list[Row]:
    """Forward and backward of the fused loss and of the dense definition.

    Both add the gradient of the head to a buffer that exists already, as in training (Megatron's main_grad); the
    buffer is in neither's memory.
    """
    device = cpu.device()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * shape[-1] ** -0.5).to(dtype)

    weight, teacher_weight = make(vocab_size, hidden_size).requires_grad_(), make(vocab_size, hidden_size)
    weight.grad = torch.zeros_like(weight)
    main_grad = torch.zeros(vocab_size, hidden_size, device=device) if dtype != torch.float32 else weight.grad
    rows: list[Row] = []
    for num in num_tokens:
        student, teacher = (make(num, hidden_size) * 40).requires_grad_(), make(num, hidden_size) * 40
        ones = torch.ones(num, device=device)
        options = {"alpha": alpha, "top_k": top_k, "add_tail": True}

        def fused(student=student, teacher=teacher, ones=ones, options=options) -> None:
            student.grad = None
            args = Policy(student, weight), Policy(teacher, teacher_weight), ones, LossOptions(**options)
            fused_linear_jsd(*args, weight_grad_into=main_grad)[0].backward()

        def dense(student=student, teacher=teacher, ones=ones, options=options) -> None:
            student.grad = None
            with torch.no_grad():
                teacher_logits = teacher @ teacher_weight.t()
            (generalized_jsd(student @ weight.t(), teacher_logits, **options) * ones).sum().backward()

        for name, function in (("dense", dense), ("fused", fused)):
            seconds, gib = measure(function, repeats)
            row: Row = {"loss": name, "tokens": num, "vocabulary": vocab_size, "hidden": hidden_size}
            rows.append({**row, "ms": seconds * 1e3, "extra_gib": gib})
        dense_row, fused_row = rows[-2:]
        fused_row["time_ratio"] = float(fused_row["ms"]) / float(dense_row["ms"])
        fused_row["memory_ratio"] = float(fused_row["extra_gib"]) / max(float(dense_row["extra_gib"]), 1e-9)
    return rows


def step(config: Config, repeats: int) -> list[Row]:
    """The phases of a training step on one batch."""
    model = VisionOPDModel(config, parallel.initialize(config.parallel, seed=config.seed))
    samples = next(iter(model.train_dataloader())).samples
    rollouts: list[Rollout] = model.engine.generate(samples)
    students, teachers = model._microbatches(rollouts)
    hidden = teacher_pass(model.teacher_model, teachers, model.groups)
    lr = learning_rate(0, config.optimizer, config.trainer.max_steps)

    def student() -> None:
        model.student_optimizer.zero_grad()
        student_pass(model.student, model.student_ddp, students, model._loss(students, hidden), model.groups)

    def optimizer() -> None:
        model.student_optimizer.step(lr)
        model.teacher.update(0)

    phases: dict[str, Callable[[], object]] = {
        "rollout": lambda: model.engine.generate(samples),
        "teacher": lambda: teacher_pass(model.teacher_model, teachers, model.groups),
        "student": student,
        "optimizer and EMA": optimizer,
    }
    num_tokens = sum(rollout.token_ids.numel() for rollout in rollouts)
    rows: list[Row] = []
    for name, function in phases.items():
        seconds, gib = measure(function, repeats)
        rows.append({"phase": name, "ms": seconds * 1e3, "extra_gib": gib, "response_tokens": num_tokens})
    return rows


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table; columns in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        lines.append("| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines)
