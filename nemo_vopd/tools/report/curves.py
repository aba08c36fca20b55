"""Curves of the report: everything in metrics.jsonl, the warm-up, accuracy over steps; a second run dashed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nemo_vopd.tools.report.charts import Series, line_chart, stacked_chart
from nemo_vopd.tools.report.numbers import format_number, format_percent, label, points, signed
from nemo_vopd.tools.report.parts import Legend, Panel, Table
from nemo_vopd.tools.report.run_files import Curves, Run

Named = tuple[str, str, dict[str, str]]
"""Heading of a panel, unit of its axis, and the name of each column of metrics.jsonl that it draws."""
_PANELS: list[Named] = [
    ("Loss", "nats per token", {"loss": "loss"}),
    ("Gradient norm", "L2 norm", {"grad_norm": "gradient norm"}),
    ("Entropy of the student", "nats per token", {"entropy": "entropy"}),
    ("Response length", "tokens, mean", {"mean_response_length": "length"}),
    ("Top-k mass", "probability", {"student_topk_mass": "student", "teacher_topk_mass": "teacher"}),
    ("Mismatch of engine and trainer", "nats", {"mismatch_mean": "mean", "mismatch_max": "largest"}),
    ("Importance weight", "mean", {"importance_weight_mean": "weight"}),
    ("Distinct neighbouring pairs", "share of a response's pairs", {"distinct_2": "distinct pairs"}),
    ("Learning rate", "", {"lr": "learning rate"}),
    ("Throughput", "tokens per second", {"tokens_per_second": "throughput"}),
    ("Response tokens", "tokens per step", {"num_response_tokens": "tokens"}),
    ("Dropped samples", "samples per step", {"num_dropped_samples": "dropped"}),
]
_WARMUP: list[Named] = [_PANELS[0], ("Learning rate", "", {"lr": "learning rate"})]
_VIEWS = {"full_accuracy": ("full view", "var(--full)"), "crop_accuracy": ("crop view", "var(--crop)")}
_LOG_KEYS = {"loss", "grad_norm", "mismatch_mean", "mismatch_max"}
_SUMS_OF_PHASES = {"seconds_total", "seconds_step"}
_COLOURS = ("var(--full)", "var(--crop)")


def _panels_of(metrics: Curves) -> list[Named]:
    """The panels above, then one for each other number."""
    drawn = {key for _, _, names in _PANELS for key in names}
    rest = [key for key in metrics.columns if key not in drawn and not key.startswith("seconds") and "/" not in key]
    return _PANELS + [(label(key), "value", {key: label(key).lower()}) for key in rest]


def _known(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _is_still(names: dict[str, str], runs: list[Curves]) -> bool:
    """Whether each column has one value throughout, up to rounding, and in every run: a line of text says it all."""
    for key in names:
        values = np.concatenate([_known(curves.get(key)) for curves in runs])
        if len(values) < 3 or np.ptp(values) > 1e-5 * np.abs(values).max():
            return False
    return True


def _dashed(name: str, colour: str, curves: Curves, key: str, run_name: str) -> Series:
    """The other run's curve, in a colour that shows on top of the faint one of every step."""
    beside = f"color-mix(in srgb, {colour} 35%, var(--ink))"
    return Series(f"{name}, {run_name}", beside, curves.steps, curves.get(key), dashed=True)


def _curve_panel(named: Named, curves: Curves, other: Curves, other_name: str) -> Panel | None:
    heading, unit, names = named
    pairs = list(zip(names.items(), _COLOURS, strict=False))
    series = [Series(name, colour, curves.steps, curves.get(key)) for (key, name), colour in pairs]
    series = [one for one in series if len(_known(np.asarray(one.y)))]
    dashed = [
        _dashed(name, colour, other, key, other_name) for (key, name), colour in pairs if len(_known(other.get(key)))
    ]
    look = {"allow_log": bool(_LOG_KEYS & set(names)), "exact": "lr" in names}
    chart = line_chart([*series, *dashed], label=f"{heading} over steps", y_label=unit, **look)
    if chart is None:
        return None
    entries = [(one.name, one.colour) for one in series] if len(names) > 1 else []
    last = ", ".join(format_number(float(_known(np.asarray(one.y))[-1])) for one in series)
    return Panel(heading, chart, f"last {last}" if last else "", Legend(entries, other_name if dashed else ""))


def _time_panel(metrics: Curves, name: str = "") -> Panel | None:
    phases = [key for key in metrics.columns if key.startswith("seconds_") and key not in _SUMS_OF_PHASES]
    # Six colours tell six phases apart; whatever comes after the fifth shares the last one.
    groups = [[key] for key in phases] if len(phases) <= 6 else [[key] for key in phases[:5]] + [phases[5:]]
    stacked = []
    for i, group in enumerate(groups):
        words = group[0].removeprefix("seconds_").replace("_", " ") if len(group) == 1 else "other"
        values = np.sum([np.maximum(np.nan_to_num(metrics.get(key)), 0.0) for key in group], axis=0)
        stacked.append(Series(words, f"var(--c{i})", metrics.steps, values))
    chart = stacked_chart(stacked, label="Seconds per step by phase", y_label="seconds per step")
    if chart is None:
        return None
    mean = sum(float(np.sum(one.y)) for one in stacked) / len(metrics.steps)
    legend = Legend([(one.name, one.colour) for one in stacked])
    return Panel(f"Time by phase, {name}" if name else "Time by phase", chart, f"mean {format_number(mean)} s", legend)


def curves_section(run: Run, other: Run | None) -> dict[str, Any]:
    """A panel for each number of metrics.jsonl; with a second run its curves too, and a table of end values."""
    metrics, others = run.metrics, other.metrics if other else Curves()
    name = other.name if other else ""
    panels: list[Panel | None] = []
    still = []
    for one in _panels_of(Curves(columns={**metrics.columns, **others.columns})):
        if _is_still(one[2], [metrics, others]):
            still += [(label(key), _known(np.concatenate([metrics.get(key), others.get(key)]))[0]) for key in one[2]]
        else:
            panels.append(_curve_panel(one, metrics, others, name))
    panels += [_time_panel(metrics, run.name if other else ""), _time_panel(others, name)]
    shown = [panel for panel in panels if panel]
    if not shown and not still:
        return {}
    unchanged = "; ".join(f"{text.lower()} {format_number(float(value))}" for text, value in still)
    return {"panels": shown, "unchanged": unchanged, "ends": _end_values(run, other) if other else None}


def _end_values(run: Run, other: Run) -> Table | None:
    """Means over the last twentieth of both runs, for what both have."""
    rows = []
    for key in run.metrics.columns:
        ours, theirs = _known(run.metrics.get(key)), _known(other.metrics.get(key))
        if len(ours) and len(theirs) and "/" not in key:
            a, b = (float(values[-max(1, len(values) // 20) :].mean()) for values in (ours, theirs))
            text = f"Seconds of {label(key).lower()}" if key.startswith("seconds_") else label(key)
            change = a - b if abs(a - b) > 1e-9 * max(abs(a), abs(b)) else 0.0  # means of the same numbers
            rows.append([text, format_number(a), format_number(b), signed(change)])
    for key in _VIEWS:
        ours, theirs = _known(run.evaluations.get(key)), _known(other.evaluations.get(key))
        if len(ours) and len(theirs):
            a, b = float(ours[-1]), float(theirs[-1])
            rows.append([label(key), format_percent(a), format_percent(b), f"{signed(100 * (a - b), 1)} points"])
    caption = "End values: means over the last twentieth of the steps of each run"
    return Table(["", run.name, other.name, "Difference"], rows, caption) if rows else None


def warmup_section(run: Run) -> dict[str, Any]:
    """Curves of the supervised warm-up; empty without one."""
    panels = [panel for one in _WARMUP if (panel := _curve_panel(one, run.warmup, Curves(), ""))]
    return {"panels": panels} if panels else {}


def accuracy_section(run: Run, other: Run | None) -> dict[str, Any]:
    """Accuracy of both views over steps, with the gap between them; empty if it was not measured."""
    measured, others = run.evaluations, other.evaluations if other else Curves()
    steps = measured.steps
    series = [Series(name, colour, steps, measured.get(key)) for key, (name, colour) in _VIEWS.items()]
    other_name = other.name if other else ""
    dashed = [
        _dashed(name, colour, others, key, other_name)
        for key, (name, colour) in _VIEWS.items()
        if len(_known(others.get(key)))
    ]
    chart = None
    if max(len(steps), len(others.steps)) > 1:  # one point makes no curve; the table has it
        label_ = "Accuracy of the full view and the crop view over training steps"
        look: Any = {"percent": True, "shade_between": True, "height": 240}
        chart = line_chart([*series, *dashed], label=label_, y_label="accuracy", **look)
    shaded = "color-mix(in srgb, var(--muted) 30%, transparent)"
    legend = Legend([*_VIEWS.values(), ("gap", shaded)], other_name if dashed else "")
    # First, last and evenly spaced rows: the chart holds the rest.
    full, crop = (measured.get(key) for key in _VIEWS)
    rows = [
        [format_number(steps[i]), format_percent(full[i]), format_percent(crop[i]), points(crop[i] - full[i])]
        for i in (sorted({round(i * (len(steps) - 1) / 8) for i in range(9)}) if len(steps) else [])
        if math.isfinite(full[i]) or math.isfinite(crop[i])
    ]
    table = Table(["Step", "Full view", "Crop view", "Gap, points"], rows) if rows else None
    panel = Panel("", chart, legend=legend) if chart else None
    return {"panel": panel, "table": table} if panel or table else {}
