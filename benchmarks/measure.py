"""The measuring harness: time and memory of calls, rows that survive errors, a table and files after each of them."""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_vopd.config import Config
from nemo_vopd.training.environment import implementations, versions

GIB = 2**30
Row = dict[str, Any]
"""One line of a table: column -> number or word."""


class Meter:
    """Seconds and memory of a block.

    With a GPU: the time between two CUDA events, host gaps included, and PyTorch's memory. Without: the clock, and with
    `resident` this process's memory above the start, sampled.
    """

    def __init__(self, resident: bool = False) -> None:
        """Nothing is measured before the block."""
        self.seconds, self.peak, self.extra = 0.0, 0, 0
        self._done = threading.Event() if resident and not torch.cuda.is_available() else None

    def __enter__(self) -> Meter:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        elif self._done is not None:
            self._before = _resident()
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        if torch.cuda.is_available():
            self._events[1].record()
            self._events[1].synchronize()
            self.seconds = self._events[0].elapsed_time(self._events[1]) / 1e3
            self.peak = torch.cuda.max_memory_allocated()
            self.extra = self.peak - self._before
        elif self._done is not None:
            self._done.set()
            self._watcher.join()

    def _watch(self) -> None:
        while self._done is not None and not self._done.wait(0.005):
            self.extra = max(self.extra, _resident() - self._before)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Measured:
    """What `measure` found."""

    seconds: float
    """Median time of one call."""
    peak_gib: float
    """Highest memory on the GPU, whatever it holds; 0 without one."""
    extra_gib: float
    """Highest memory above what was taken before a measurement."""
    result: Any
    """Result of the last call."""


def measure(function: Callable[[], Any], repeats: int, **options: Any) -> Measured:
    """`measure_in_turn` of one function."""
    return measure_in_turn([function], repeats, **options)[0]


def measure_in_turn(
    functions: list[Callable[[], Any]],
    repeats: int,
    *,
    warmup: int = 1,
    at_least_seconds: float = 0.0,
    before: Callable[[], object] | None = None,
    resident: bool = False,
) -> list[Measured]:
    """Measure each function `repeats` times in turn, so that what else the machine does falls on all of them.

    The first `warmup` calls do not count. One measurement calls a function as often as fills `at_least_seconds`: short
    kernels are timed at the clock rate that a GPU holds under load. `before` is called before each measurement, outside
    its time. Without a GPU, memory is measured where `resident` says so.
    """
    meters: list[list[Meter]] = [[] for _ in functions]
    results: list[Any] = [None] * len(functions)
    calls = [1] * len(functions)
    for number in range(-max(1, warmup), max(1, repeats)):
        for i, function in enumerate(functions):
            if before is not None and number >= 0:
                before()
            results[i] = None  # its memory is the next one's
            with Meter(resident) as meter:
                for _ in range(calls[i]):
                    results[i] = function()
            if number >= 0:
                meters[i].append(meter)
            elif number == -1:
                calls[i] = max(1, math.ceil(at_least_seconds / max(meter.seconds, 1e-6)))
    return [
        Measured(
            statistics.median(meter.seconds for meter in mine) / num,
            max(meter.peak for meter in mine) / GIB,
            max(meter.extra for meter in mine) / GIB,
            result,
        )
        for mine, num, result in zip(meters, calls, results, strict=True)
    ]


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table; columns in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        lines.append("| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines)


class Bench:
    """The rows of all parts, the time that is left for them, and the files they are written to."""

    def __init__(
        self,
        facts: dict[str, Any],
        budget_seconds: float,
        repeats: int,
        output: str | None = None,
        *,
        resume: bool = False,
    ) -> None:
        """`facts` about the machine come first in `output` (JSON; beside it FILE.md with the same tables).

        With `resume`, parts that `output` holds stay in it.
        """
        self.facts, self.budget, self.repeats = facts, budget_seconds, max(1, repeats)
        self.output = Path(output) if output is not None else None
        self.parts: dict[str, list[Row]] = {}
        self.seconds: dict[str, float] = {}
        self._start, self._part = time.monotonic(), ""
        if resume and self.output is not None and self.output.exists():
            earlier = json.loads(self.output.read_text())
            self.parts, self.seconds = earlier["parts"], earlier["seconds"]
        self.write()  # a place that cannot be written is told before anything is measured

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds in which something may still be begun."""
        return self.budget - self.elapsed

    def part(self, name: str, function: Callable[[], None]) -> None:
        """Run one part, which calls `record`; print its table."""
        self._part, start = name, self.elapsed
        rows = self.parts[name] = []
        if self.left < 0:
            rows.append(self._skipped())
        else:
            try:
                function()
            except Exception as error:
                rows.append({"error": _one_line(error)})
            _free()
        self.seconds[name] = self.elapsed - start
        print(f"\n## {name} ({self.seconds[name]:.0f} s)\n\n{_table(rows)}\n", flush=True)
        self.write()

    def record(self, labels: Row, function: Callable[[], Row | list[Row]]) -> list[Row]:
        """Append what `function` measures to the part under way, each row after its `labels`; returns these rows.

        Its error, or the end of the time, makes one row.
        """
        if self.left < 0:
            found = [self._skipped()]
        else:
            try:
                measured = function()
                found = measured if isinstance(measured, list) else [measured]
            except Exception as error:
                found = [{"error": _one_line(error)}]
        _free()
        rows: list[Row] = [{**labels, **row} for row in found]
        self.parts[self._part] += rows
        for row in rows:
            values = ", ".join(f"{name} {_short(value)}" for name, value in row.items())
            print(f"[{self.elapsed:.0f} s] {self._part}: {values}", flush=True)
        self.write()
        return rows

    def is_broken(self) -> bool:
        """Whether an error has left the GPU unusable to this process, as a failed assertion on it does."""
        if not torch.cuda.is_available():
            return False
        try:
            torch.cuda.synchronize()
        except Exception:
            return True
        return False

    def ceiling(self) -> float | None:
        """Highest TFLOP/s of a bf16 product that was measured."""
        rows = [row for row in self.parts.get("ceilings", []) if row.get("kind") == "bf16" and "tflops" in row]
        return max((float(row["tflops"]) for row in rows), default=None)

    def rates(self, operations: float, seconds: float) -> Row:
        """TFLOP/s, and their share of the measured bf16 ceiling if there is one."""
        tflops, ceiling = operations / seconds / 1e12, self.ceiling()
        return {"tflops": tflops, **({"share_of_bf16_ceiling": tflops / ceiling} if ceiling else {})}

    def write(self) -> None:
        """All that is known so far, into `output`."""
        if self.output is None:
            return
        self.output.parent.mkdir(parents=True, exist_ok=True)
        result = {**self.facts, "seconds": self.seconds, "parts": self.parts}
        _replace(self.output, json.dumps(result, indent=1) + "\n")
        page = self.output.with_suffix(".md")
        if page != self.output:
            lines = ["# One GPU", "", *(f"- {name}: {_fact(value)}" for name, value in self.facts.items())]
            for name, rows in self.parts.items():
                lines += ["", f"## {name}", "", _table(rows)]
            _replace(page, "\n".join(lines) + "\n")

    def _skipped(self) -> Row:
        return {"skipped": f"the {self.budget:g} s were over"}


def _replace(path: Path, text: str) -> None:
    """Write `text` so that whoever ends this process leaves the old contents or the new."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    temporary.replace(path)


def _short(value: object) -> str:
    """Three digits, or all before the point."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1000 <= abs(value) < math.inf else f"{value:.3g}"


def _table(rows: list[Row]) -> str:
    return table([{name: _short(value) for name, value in row.items()} for row in rows])


def _fact(value: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else _short(value)


def _one_line(error: Exception) -> str:
    """Kind and text of `error`, whose frames let go of what they hold: GPU memory above all."""
    if error.__traceback__ is not None:
        traceback.clear_frames(error.__traceback__)
    text = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__}: {text[:300]}"


def out_of_memory(row: Row) -> bool:
    """Whether the row tells that the GPU was too small."""
    words = "OutOfMemoryError", "ALLOC_FAILED", "Failed to CUDA calloc"  # PyTorch's, cuBLAS's, NCCL's
    return any(word in str(row.get("error", "")) for word in words)


def _free() -> None:
    """Give back what the last row took; models hold themselves in cycles, Transformer Engine their FP8 state."""
    with contextlib.suppress(Exception):  # a broken GPU must not hide what was measured before
        if "transformer_engine" in sys.modules:
            from transformer_engine.pytorch.fp8 import FP8GlobalStateManager  # type: ignore[import-not-found]

            FP8GlobalStateManager.reset()
    with contextlib.suppress(Exception):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def machine(config: Config) -> dict[str, Any]:
    """Date, GPU, driver and versions; `implementations` are those of bf16 layers."""
    facts: dict[str, Any] = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {"gpu": properties.name, "memory_gib": properties.total_memory / GIB}
        facts["capability"] = f"{properties.major}.{properties.minor}"
    else:
        facts["gpu"] = "cpu"
    names = ("driver_version", "power.limit", "clocks.max.sm")
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
        facts["driver"] = dict(zip(names, (word.strip() for word in answer.split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        facts["driver"] = "unknown"
    facts |= {"cuda": torch.version.cuda or "none", "versions": versions(), "implementations": implementations(config)}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        facts["versions"]["liger-kernel"] = importlib.metadata.version("liger-kernel")
    return facts
