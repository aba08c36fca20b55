"""The top of the report: the gap before and after where it was measured, else what the run did."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import numpy as np

from nemo_vopd.tools.report.run_files import Run
from nemo_vopd.tools.report.svg import as_float, format_number, format_percent
from nemo_vopd.tools.report.svg_bars import PAGE_COLOURS, PRINT_COLOURS, gap_bars
from nemo_vopd.tools.report.text import points

_STATUS = {
    "max_steps": "finished: all steps are done",
    "early_stop": "finished: distill.early_stop ended it",
    "max_time": "stopped at trainer.max_time; the same command resumes it",
    "SIGTERM": "stopped by SIGTERM; the same command resumes it",
    "SIGUSR1": "stopped by SIGUSR1; the same command resumes it",
    "running": "still running, or ended without a word",
}
Accuracies = dict[str, tuple[float, float]]


def gap_figure_svg(summary: dict[str, Any]) -> str:
    """The bars of full-view and crop-view accuracy before and after, on white: a file of its own for a README."""
    accuracies = _of_summary(summary)
    name = escape(_gap_headline(accuracies, as_float(summary.get("gap_closed"))))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 366" width="480" height="366" role="img" '
        f'aria-label="{name}"><rect x="0.5" y="0.5" width="479" height="365" rx="8" '
        'fill="#ffffff" stroke="#d9d7d2"/><text x="18" y="29" font-family="system-ui, -apple-system, Segoe UI, '
        f'sans-serif" font-size="15" font-weight="700" fill="{PRINT_COLOURS["ink"]}">Accuracy on the full image and '
        f'on the evidence crop</text><g transform="translate(0 36)">{gap_bars(accuracies, PRINT_COLOURS)}'
        "</g></svg>\n"
    )


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


def header(title: str, run: Run, other: Run | None) -> str:
    """Title, headline, numbers, and the bars of the gap if there are any; one line about the run to compare with."""
    accuracies, how = _of_run(run)
    known = _known(accuracies)
    closed = as_float(run.summary.get("gap_closed"))
    content = _gap_numbers(accuracies, closed, how) if known else _run_numbers(run)
    figure = ""
    if known:
        name, bars = escape(_gap_headline(accuracies, closed)), gap_bars(accuracies, PAGE_COLOURS)
        svg = f'<svg viewBox="0 0 480 330" role="img" aria-label="{name}">{bars}</svg>'
        figure = f'<figure class="card">{svg}</figure>'
    compared = ""
    if other is not None:
        text = f"Compared with {other.name} (dashed curves): {headline(other)}"
        compared = f'<p class="compared">{escape(text)}</p>'
    notes = "".join(f"<li>{escape(note)}</li>" for one in (run, other) if one for note in one.notes)
    notes = f'<ul class="found notes">{notes}</ul>' if notes else ""
    return (
        f'<header id="gap"{"" if figure else " class=single"}><div><h1>{escape(title)}</h1>'
        f'<p class="lead">{escape(headline(run))}</p>{content}{compared}{notes}</div>{figure}</header>'
    )


def _tiles(numbers: list[tuple[str, str, str]]) -> str:
    tiles = "".join(
        f"<div><dt>{name}</dt><dd>{escape(value)} <small>{unit}</small></dd></div>" for name, value, unit in numbers
    )
    return f'<dl class="numbers">{tiles}</dl>'


def _gap_numbers(accuracies: Accuracies, closed: float, how: str) -> str:
    before, after, closed = _gaps(accuracies, closed)
    (full_before, crop_before), (full_after, crop_after) = accuracies.values()
    tiles = _tiles(
        [
            ("Gap before", points(before), "points"),
            ("Gap after", points(after), "points"),
            ("Gap closed", format_percent(closed, 0), ""),
        ]
    )
    return (
        f'{tiles}<p><b class="full">Full view</b>: {format_percent(full_before)} before, {format_percent(full_after)} '
        f'after.<br><b class="crop">Crop view</b>: {format_percent(crop_before)} before, {format_percent(crop_after)} '
        f'after.</p><p class="note">{how} The gap is the accuracy with a crop around the evidence minus the accuracy '
        "with the full image. Vision-OPD lets a model that sees the crop teach itself on the full image.</p>"
    )


def _run_numbers(run: Run) -> str:
    numbers = []
    if _num_steps(run):
        numbers.append(("Steps", _progress(run), ""))
    first, last = _ends(run.metrics.get("loss"))
    if math.isfinite(last):
        numbers.append(("Loss", f"{format_number(first)} \u2192 {format_number(last)}", "nats per token"))
    return (_tiles(numbers) if numbers else "") + f"<p>Status: {escape(_status(run))}.</p>"
