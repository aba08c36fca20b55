"""The top of the report: the gap before and after where it was measured, else what the run did."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nemo_vopd.tools.report.bars import gap_bars
from nemo_vopd.tools.report.charts import PRINT_COLOURS, as_svg
from nemo_vopd.tools.report.numbers import as_float, format_number, format_percent, points
from nemo_vopd.tools.report.run_files import Run

_STATUS = {
    "max_steps": "finished: all steps are done",
    "early_stop": "finished: distill.early_stop ended it",
    "max_time": "stopped at trainer.max_time; the same command resumes it",
    "SIGINT": "stopped by Ctrl-C; the same command resumes it",
    "SIGTERM": "stopped by SIGTERM; the same command resumes it",
    "SIGUSR1": "stopped by SIGUSR1; the same command resumes it",
    "running": "still running, or ended without a word",
}
Accuracies = dict[str, tuple[float, float]]


def gap_figure_svg(summary: dict[str, Any]) -> str:
    """The bars of full-view and crop-view accuracy before and after, on white: a file of its own for a README."""
    accuracies = _of_summary(summary)
    name = _gap_headline(accuracies, as_float(summary.get("gap_closed")))
    title = {"text": "Accuracy on the full image and on the evidence crop", "anchor": "start", "fontSize": 15}
    page = {"width": 420, "background": "#ffffff", "padding": 16, "title": title | {"color": PRINT_COLOURS["ink"]}}
    return as_svg(gap_bars(accuracies, name, PRINT_COLOURS, **page)) + "\n"


def _of_summary(summary: dict[str, Any]) -> Accuracies:
    return {
        moment: (as_float(summary.get(f"full_accuracy_{key}")), as_float(summary.get(f"crop_accuracy_{key}")))
        for moment, key in (("Before", "before"), ("After", "after"))
    }


def _of_run(run: Run) -> tuple[Accuracies, str]:
    """Accuracies before and after, and how they were measured: by the recipe, else first and last while training."""
    accuracies = _of_summary(run.summary)
    full, crop = run.evaluations.get("full_accuracy"), run.evaluations.get("crop_accuracy")
    both = np.flatnonzero(np.isfinite(full) & np.isfinite(crop))
    if _known(accuracies) or len(both) < 2:
        return accuracies, ""
    first, last = both[0], both[-1]
    steps = f"at step {run.evaluations.steps[first]:g} and at step {run.evaluations.steps[last]:g}"
    ends = {"Before": (float(full[first]), float(crop[first])), "After": (float(full[last]), float(crop[last]))}
    return ends, f"Measured while training, {steps}."


def _known(accuracies: Accuracies) -> bool:
    return all(math.isfinite(value) for pair in accuracies.values() for value in pair)


def _gaps(accuracies: Accuracies, closed: float) -> tuple[float, float, float]:
    """The gap before, after (fractions of accuracy) and the share of it that was closed."""
    before, after = (crop - full for full, crop in accuracies.values())
    return before, after, 1 - after / before if not math.isfinite(closed) and before > 0 else closed


def _gap_headline(accuracies: Accuracies, closed: float) -> str:
    before, after, closed = _gaps(accuracies, closed)
    if not (math.isfinite(before) and math.isfinite(after)):
        return "The regional-to-global gap was not measured both before and after."
    verb = "stayed" if abs(after - before) < 5e-4 else "narrowed" if after < before else "widened"
    if verb == "stayed":
        return f"The regional-to-global gap stayed at {points(after)} points."
    text = f"The regional-to-global gap {verb} from {points(before)} to {points(after)} points"
    return f"{text}: {format_percent(closed, 0)} of it is closed." if closed > 0 else f"{text}."


def _ends(values: np.ndarray) -> tuple[float, float]:
    """Means over the first and the last twentieth of the finite `values`."""
    known = values[np.isfinite(values)]
    if not len(known):
        return math.nan, math.nan
    num = max(1, len(known) // 20)
    return float(known[:num].mean()), float(known[-num:].mean())


def _num_steps(run: Run) -> int:
    done = as_float(run.status.get("step"))
    recorded = int(run.metrics.steps[-1]) + 1 if len(run.metrics.steps) else 0
    return max(recorded, int(done) if math.isfinite(done) else 0)


def _progress(run: Run) -> str:
    num, of = _num_steps(run), as_float(run.status.get("max_steps"))
    return f"{format_number(num)} of {format_number(int(of))}" if math.isfinite(of) else format_number(num)


def _status(run: Run) -> str:
    if not run.status:
        return "not known: there is no status.json"
    reason = str(run.status.get("reason", "not known"))
    return _STATUS.get(reason, reason)


def headline(run: Run) -> str:
    """The run in one sentence."""
    accuracies, _ = _of_run(run)
    if _known(accuracies):
        return _gap_headline(accuracies, as_float(run.summary.get("gap_closed")))
    first, last = _ends(run.metrics.get("loss"))
    num = _num_steps(run)
    steps = f"{format_number(num)} step{'s' * (num != 1)}"
    if not math.isfinite(first):
        return f"{steps} and no loss on record." if num else "No training step on record."
    if len(run.metrics.steps) == 1:
        return f"{steps}: a loss of {format_number(first)}."
    verb = "fell" if last < first else "rose" if last > first else "stayed"
    if verb == "stayed":
        return f"{steps}: the loss stayed at {format_number(last)}."
    return f"{steps}: the loss {verb} from {format_number(first)} to {format_number(last)}."


def header(run: Run, other: Run | None) -> dict[str, Any]:
    """The headline, numbers (name, value, unit), and the bars of the gap if there are any."""
    accuracies, how = _of_run(run)
    closed = as_float(run.summary.get("gap_closed"))
    shown: dict[str, Any] = {"headline": headline(run), "other": headline(other) if other else ""}
    if not _known(accuracies):
        return shown | {"numbers": _run_numbers(run), "status": _status(run), "gap": None}
    before, after, closed = _gaps(accuracies, closed)
    numbers = [("Gap before", points(before), "points"), ("Gap after", points(after), "points")]
    numbers.append(("Gap closed", format_percent(closed, 0), ""))
    views = {view: [format_percent(pair[i]) for pair in accuracies.values()] for i, view in enumerate(("full", "crop"))}
    bars = gap_bars(accuracies, _gap_headline(accuracies, closed))
    return shown | {"numbers": numbers, "gap": {"views": views, "how": how, "chart": bars}}


def _run_numbers(run: Run) -> list[tuple[str, str, str]]:
    numbers = []
    if _num_steps(run):
        numbers.append(("Steps", _progress(run), ""))
    first, last = _ends(run.metrics.get("loss"))
    if math.isfinite(last):
        numbers.append(("Loss", f"{format_number(first)} \u2192 {format_number(last)}", "nats per token"))
    return numbers
