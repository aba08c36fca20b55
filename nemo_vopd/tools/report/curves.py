"""Curves of the report: everything in metrics.jsonl, the warm-up, accuracy over steps; a second run dashed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nemo_vopd.tools.report.charts import Series, line_chart, stacked_chart
from nemo_vopd.tools.report.estimates import Estimate, accuracy, ends
from nemo_vopd.tools.report.numbers import MINUS, format_number, format_percent, label, points, signed
from nemo_vopd.tools.report.parts import Cell, Legend, Names, Panel, Table
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
    return Series(_of(name, run_name), beside, curves.steps, curves.get(key), dashed=True)


def _curve_panel(named: Named, curves: Curves, other: Curves, run_names: Names = ("", "")) -> Panel | None:
    """The panel of `curves`, and of `other` in dashes; `run_names` are those of both, empty where there is one run."""
    heading, unit, names = named
    pairs = list(zip(names.items(), _COLOURS, strict=False))
    ours, theirs = ([pair for pair in pairs if len(_known(one.get(pair[0][0])))] for one in (curves, other))
    series = [Series(_of(n, run_names[0]), colour, curves.steps, curves.get(key)) for (key, n), colour in ours]
    dashed = [_dashed(name, colour, other, key, run_names[1]) for (key, name), colour in theirs]
    look = {"allow_log": bool(_LOG_KEYS & set(names)), "exact": "lr" in names}
    chart = line_chart([*series, *dashed], label=f"{heading} over steps", y_label=unit, **look)
    if chart is None:
        return None
    entries = [(name, colour) for (_, name), colour in ours or theirs] if len(names) > 1 else []
    if not any(run_names):
        return Panel(heading, chart, _last(series), Legend(entries))
    solid, dash = (f"{name}: {_last(of)}" if of else "" for name, of in zip(run_names, (series, dashed), strict=True))
    return Panel(heading, chart, legend=Legend(entries, solid, dash))


def _of(name: str, run_name: str) -> str:
    return f"{name}, {run_name}" if run_name else name


def _last(series: list[Series]) -> str:
    numbers = ", ".join(format_number(float(_known(np.asarray(one.y))[-1])) for one in series)
    return f"last {numbers}" if numbers else ""


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
    names = (run.name, other.name) if other else ("", "")
    panels: list[Panel | None] = []
    still: list[str] = []
    for one in _panels_of(Curves(columns={**metrics.columns, **others.columns})):
        if _is_still(one[2], [metrics, others]):
            for key in one[2]:
                found = [_known(curves.get(key)) for curves in (metrics, others)]
                only = "" if all(map(len, found)) or not other else f" ({names[0 if len(found[0]) else 1]} alone)"
                still.append(f"{label(key).lower()} {format_number(float(np.concatenate(found)[0]))}{only}")
        else:
            panels.append(_curve_panel(one, metrics, others, names))
    panels += [_time_panel(metrics, names[0]), _time_panel(others, names[1])]
    shown = [panel for panel in panels if panel]
    if not shown and not still:
        return {}
    table = _end_values(run, other) if other else None
    return {"panels": shown, "unchanged": "; ".join(still), "ends": table}


def _end_values(run: Run, other: Run) -> Table | None:
    """Means over the last tenth of both runs, for what both have."""
    rows: list[list[Cell | str]] = []
    for key in run.metrics.columns:
        ours, theirs = _known(run.metrics.get(key)), _known(other.metrics.get(key))
        if len(ours) and len(theirs) and "/" not in key:
            a, b = (ends(values)[1] for values in (ours, theirs))
            text = f"Seconds of {label(key).lower()}" if key.startswith("seconds_") else label(key)
            same = abs(a.value - b.value) <= 1e-9 * max(abs(a.value), abs(b.value))  # means of the same numbers
            rows.append([text, format_number(a.value), format_number(b.value), "0" if same else _difference(a - b)])
    for key in _VIEWS:
        ours, theirs = _known(run.evaluations.get(key)), _known(other.evaluations.get(key))
        if len(ours) and len(theirs):
            a, b = accuracy(float(ours[-1]), run.num_questions), accuracy(float(theirs[-1]), other.num_questions)
            texts = format_percent(a.value), format_percent(b.value)
            rows.append([f"{label(key)}, last measured", *texts, _difference(a - b, percent=True)])
    caption = "End values: means over the last tenth of the steps of each run. "
    caption += f"Difference: {run.name} {MINUS} {other.name}, \u00b1 its 95% interval"
    return Table(["", run.name, other.name, "Difference"], rows, caption) if rows else None


def _difference(change: Estimate, percent: bool = False) -> Cell:
    text = f"{signed(100 * change.value, 1)} points" if percent else signed(change.value)
    margin = change.margin_text(points if percent else format_number)
    return Cell(text, ", ".join(filter(None, [margin, "within noise" if change.is_noise else ""])))


def warmup_section(run: Run) -> dict[str, Any]:
    """Curves of the supervised warm-up; empty without one."""
    panels = [panel for one in _WARMUP if (panel := _curve_panel(one, run.warmup, Curves()))]
    return {"panels": panels} if panels else {}


def accuracy_section(run: Run, other: Run | None) -> dict[str, Any]:
    """Accuracy of both views over steps, with the gap between them; empty if it was not measured."""
    measured, others = run.evaluations, other.evaluations if other else Curves()
    steps = measured.steps
    name_, other_name = (run.name, other.name) if other else ("", "")
    series = [Series(_of(name, name_), colour, steps, measured.get(key)) for key, (name, colour) in _VIEWS.items()]
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
    legend = Legend(
        [*_VIEWS.values(), (_of("gap", name_), shaded)], name_ if dashed else "", other_name if dashed else ""
    )
    tables = [_accuracy_table(curves, name) for curves, name in ((measured, name_), (others, other_name))]
    panel = Panel("", chart, legend=legend) if chart else None
    shown = {"panel": panel, "tables": [table for table in tables if table]}
    return shown if any(shown.values()) else {}


def _accuracy_table(measured: Curves, caption: str) -> Table | None:
    """The first, the last and evenly spaced rows: the chart holds the rest."""
    steps, full, crop = measured.steps, *(measured.get(key) for key in _VIEWS)
    rows = [
        [format_number(steps[i]), format_percent(full[i]), format_percent(crop[i]), points(crop[i] - full[i])]
        for i in (sorted({round(i * (len(steps) - 1) / 8) for i in range(9)}) if len(steps) else [])
        if math.isfinite(full[i]) or math.isfinite(crop[i])
    ]
    return Table(["Step", "Full view", "Crop view", "Gap, points"], rows, caption) if rows else None
