"""The top of the report: the gap before and after where it was measured, else what the run did."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_vopd.tools.report.bars import gap_bars
from nemo_vopd.tools.report.charts import PRINT_COLOURS, as_svg
from nemo_vopd.tools.report.estimates import Estimate, accuracy, ends
from nemo_vopd.tools.report.numbers import NAN, as_float, format_number, format_percent, points
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
_UNCERTAIN = "\u00b1 marks 95% intervals"


@dataclass
class Measured:
    """Accuracy on full images and on crops, before and after training."""

    accuracies: dict[str, tuple[float, float]]
    """(full, crop) of Before and of After."""
    num_questions: float = NAN
    closed: float = NAN
    """Share of the gap that was closed, if the recipe tells it."""
    how: str = ""
    """How it was measured, in a sentence."""

    @property
    def is_known(self) -> bool:
        """Whether no accuracy is missing."""
        return all(math.isfinite(value) for pair in self.accuracies.values() for value in pair)

    @property
    def gaps(self) -> list[Estimate]:
        """The gap before and after; its margin is that of independent views, which is more than theirs."""
        pairs = ([accuracy(value, self.num_questions) for value in pair] for pair in self.accuracies.values())
        return [crop - full for full, crop in pairs]

    @property
    def share_closed(self) -> float:
        """The share of the gap that was closed."""
        before, after = (gap.value for gap in self.gaps)
        return 1 - after / before if not math.isfinite(self.closed) and before > 0 else self.closed

    @property
    def headline(self) -> str:
        """What became of the gap."""
        before, after = self.gaps
        if not (math.isfinite(before.value) and math.isfinite(after.value)):
            return "The regional-to-global gap was not measured both before and after."
        texts = before.text(points), after.text(points)
        if (after - before).is_noise or abs(after.value - before.value) < 5e-4:
            return f"No clear change of the regional-to-global gap: {texts[0]} points before, {texts[1]} after."
        verb = "narrowed" if after.value < before.value else "widened"
        text = f"The regional-to-global gap {verb} from {texts[0]} to {texts[1]} points"
        return (
            f"{text}: {format_percent(self.share_closed, 0)} of it is closed." if self.share_closed > 0 else f"{text}."
        )


def gap_figure_svg(summary: dict[str, Any]) -> str:
    """The bars of full-view and crop-view accuracy before and after, on white: a file of its own for a README."""
    measured = _of_summary(summary)
    title = {"text": "Accuracy on the full image and on the evidence crop", "anchor": "start", "fontSize": 15}
    page = {"width": 420, "background": "#ffffff", "padding": 16, "title": title | {"color": PRINT_COLOURS["ink"]}}
    return as_svg(gap_bars(measured.accuracies, measured.headline, PRINT_COLOURS, **page)) + "\n"


def _of_summary(summary: dict[str, Any]) -> Measured:
    accuracies = {
        moment: (as_float(summary.get(f"full_accuracy_{key}")), as_float(summary.get(f"crop_accuracy_{key}")))
        for moment, key in (("Before", "before"), ("After", "after"))
    }
    return Measured(accuracies, as_float(summary.get("num_test_samples")), as_float(summary.get("gap_closed")))


def _of_run(run: Run) -> Measured:
    """What the recipe measured, else the first and the last measurements while training."""
    measured, rows = _of_summary(run.summary), run.evaluations
    views = np.stack([rows.get("full_accuracy"), rows.get("crop_accuracy")])
    both = np.flatnonzero(np.isfinite(views).all(axis=0))
    if measured.is_known or len(both) < 2:
        return measured
    # the model before its first step is one model; at the end a mean evens out how accuracy goes up and down
    last = both[-max(1, len(both) // 4) :]
    before, after = views[:, both[0]], views[:, last].mean(axis=1)
    steps = f"at step {rows.steps[last[0]]:g}"
    if len(last) > 1:
        steps = f"as the mean of {len(last)} measurements from step {rows.steps[last[0]]:g} on"
    how = f"Measured while training, at step {rows.steps[both[0]]:g} and {steps}."
    accuracies = {"Before": (float(before[0]), float(before[1])), "After": (float(after[0]), float(after[1]))}
    return Measured(accuracies, run.num_questions, how=how)


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
    measured = _of_run(run)
    if measured.is_known:
        return measured.headline
    first, last = ends(run.metrics.get("loss"))
    num = _num_steps(run)
    steps = f"{format_number(num)} step{'s' * (num != 1)}"
    if not math.isfinite(first.value):
        return f"{steps} and no loss on record." if num else "No training step on record."
    if len(run.metrics.steps) == 1:
        return f"{steps}: a loss of {format_number(first.value)}."
    change, texts = last - first, (first.text(), last.text())
    if not math.isfinite(change.margin):
        return f"{steps}, too few to tell a change of the loss: {texts[0]} at first, {texts[1]} at last."
    if change.is_noise:
        return f"{steps}: no clear change of the loss, {texts[0]} at first and {texts[1]} at last."
    return f"{steps}: the loss {'fell' if change.value < 0 else 'rose'} from {texts[0]} to {texts[1]}."


def header(run: Run, other: Run | None) -> dict[str, Any]:
    """The headline, numbers (name, value, unit), and the bars of the gap if there are any."""
    measured = _of_run(run)
    shown: dict[str, Any] = {"headline": headline(run), "other": headline(other) if other else ""}
    if not measured.is_known:
        numbers, how = _run_numbers(run)
        return shown | {"numbers": numbers, "status": _status(run), "how": how, "gap": None}
    before, after = measured.gaps
    closed = "within noise" if (after - before).is_noise else format_percent(measured.share_closed, 0)
    numbers = [("Gap before", points(before.value), "points"), ("Gap after", points(after.value), "points")]
    numbers.append(("Gap closed", closed, ""))
    pairs = measured.accuracies.values()
    views = {view: [format_percent(pair[i]) for pair in pairs] for i, view in enumerate(("full", "crop"))}
    how = [measured.how] if measured.how else []
    if math.isfinite(before.margin):
        how.append(f"{_UNCERTAIN} over {format_number(measured.num_questions)} questions.")
    bars = gap_bars(measured.accuracies, measured.headline)
    return shown | {"numbers": numbers, "how": " ".join(how), "gap": {"views": views, "chart": bars}}


def _run_numbers(run: Run) -> tuple[list[tuple[str, str, str]], str]:
    numbers, how = [], ""
    if _num_steps(run):
        numbers.append(("Steps", _progress(run), ""))
    first, last = ends(run.metrics.get("loss"))
    if math.isfinite(last.value):
        numbers.append(("Loss", f"{format_number(first.value)} \u2192 {format_number(last.value)}", "nats per token"))
        how = f"Losses are means over the first and the last tenth of the steps; {_UNCERTAIN}."
    return numbers, how
