"""Curves of the report: everything in metrics.jsonl, the warm-up, accuracy over steps; a second run dashed."""

from __future__ import annotations

import math
from html import escape

import numpy as np

from nemo_vopd.tools.report.cards import legend
from nemo_vopd.tools.report.run_files import Curves, Run
from nemo_vopd.tools.report.svg import Series, format_number, format_percent, line_chart
from nemo_vopd.tools.report.svg_bars import stacked_chart
from nemo_vopd.tools.report.text import label, numeric_table, panel, points, signed

Panel = tuple[str, str, dict[str, str]]
_PANELS: list[Panel] = [
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
_WARMUP: list[Panel] = [
    ("Loss", "nats per token", {"loss": "loss"}),
    ("Learning rate", "", {"lr": "learning rate"}),
]
_LOG_KEYS = {"loss", "grad_norm", "mismatch_mean", "mismatch_max"}
_SUMS_OF_PHASES = {"seconds_total", "seconds_step"}
_COLOURS = ("var(--full)", "var(--crop)")


def _panels_of(metrics: Curves) -> list[Panel]:
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


def _beside(colour: str) -> str:
    """The colour of the other run's curve: it must show on top of the faint one of every step."""
    return f"color-mix(in srgb, {colour} 35%, var(--ink))"


def _curve_panel(panel_of: Panel, curves: Curves, other: Curves, other_name: str) -> str:
    heading, unit, names = panel_of
    pairs = list(zip(names.items(), _COLOURS, strict=False))
    series = [Series(name, colour, curves.steps, curves.get(key)) for (key, name), colour in pairs]
    series = [one for one in series if len(_known(np.asarray(one.y)))]
    dashed = [
        Series(f"{name}, {other_name}", _beside(colour), other.steps, other.get(key), dashed=True)
        for (key, name), colour in pairs
        if len(_known(other.get(key)))
    ]
    chart = line_chart(
        [*series, *dashed],
        label=f"{heading} over steps",
        y_label=unit,
        allow_log=bool(_LOG_KEYS & set(names)),
        exact="lr" in names,
    )
    if not chart:
        return ""
    entries = [(one.name, one.colour) for one in series] if len(names) > 1 else None
    last = ", ".join(format_number(float(_known(np.asarray(one.y))[-1])) for one in series)
    return panel(heading, f"last {last}" if last else "", chart, entries, other_name if dashed else "")


def _time_panel(metrics: Curves, name: str = "") -> str:
    phases = [key for key in metrics.columns if key.startswith("seconds_") and key not in _SUMS_OF_PHASES]
    # Six colours tell six phases apart; whatever comes after the fifth shares the last one.
    groups = [[key] for key in phases] if len(phases) <= 6 else [[key] for key in phases[:5]] + [phases[5:]]
    stacked = []
    for i, group in enumerate(groups):
        words = group[0].removeprefix("seconds_").replace("_", " ") if len(group) == 1 else "other"
        values = np.sum([np.maximum(np.nan_to_num(metrics.get(key)), 0.0) for key in group], axis=0)
        stacked.append(Series(words, f"var(--c{i})", metrics.steps, values))
    chart = stacked_chart(stacked, label="Seconds per step by phase", y_label="seconds per step")
    if not chart:
        return ""
    mean = sum(float(np.sum(one.y)) for one in stacked) / len(metrics.steps)
    entries = [(one.name, one.colour) for one in stacked]
    heading = f"Time by phase, {name}" if name else "Time by phase"
    return panel(heading, f"mean {format_number(mean)} s", chart, entries)


def curves_section(run: Run, other: Run | None) -> str:
    """A panel for each number of metrics.jsonl; with a second run its curves too, and a table of end values."""
    metrics, others = run.metrics, other.metrics if other else Curves()
    name = other.name if other else ""
    cards, still = [], []
    for one in _panels_of(Curves(columns={**metrics.columns, **others.columns})):
        if _is_still(one[2], [metrics, others]):
            still += [(label(key), _known(np.concatenate([metrics.get(key), others.get(key)]))[0]) for key in one[2]]
        else:
            cards.append(_curve_panel(one, metrics, others, name))
    cards += [_time_panel(metrics, run.name if other else ""), _time_panel(others, name)]
    if not any(cards) and not still:
        return ""
    unchanged = "; ".join(f"{text.lower()} {format_number(float(value))}" for text, value in still)
    return (
        '<p class="note">Faint: every step. Strong: moving mean. Point at a chart to read its values.</p>'
        f'<div class="multiples">{"".join(cards)}</div>'
        + (f'<p class="note still">The same at every step: {escape(unchanged)}.</p>' if still else "")
        + (_end_values(run, other) if other else "")
    )


def _end_values(run: Run, other: Run) -> str:
    """Means over the last twentieth of both runs, for what both have."""
    rows = []
    for key in run.metrics.columns:
        ours, theirs = _known(run.metrics.get(key)), _known(other.metrics.get(key))
        if len(ours) and len(theirs) and "/" not in key:
            a, b = (float(values[-max(1, len(values) // 20) :].mean()) for values in (ours, theirs))
            text = f"Seconds of {label(key).lower()}" if key.startswith("seconds_") else label(key)
            change = a - b if abs(a - b) > 1e-9 * max(abs(a), abs(b)) else 0.0  # means of the same numbers
            rows.append([escape(text), format_number(a), format_number(b), signed(change)])
    for key in ("full_accuracy", "crop_accuracy"):
        ours, theirs = _known(run.evaluations.get(key)), _known(other.evaluations.get(key))
        if len(ours) and len(theirs):
            a, b = float(ours[-1]), float(theirs[-1])
            rows.append(
                [escape(label(key)), format_percent(a), format_percent(b), f"{signed(100 * (a - b), 1)} points"]
            )
    if not rows:
        return ""
    caption = "End values: means over the last twentieth of the steps of each run"
    return f'<div id="ends">{numeric_table(["", run.name, other.name, "Difference"], rows, caption)}</div>'


def warmup_section(run: Run) -> str:
    """Curves of the supervised warm-up; empty without one."""
    cards = [_curve_panel(one, run.warmup, Curves(), "") for one in _WARMUP]
    if not any(cards):
        return ""
    return (
        '<p class="note">Supervised training that gives the small model its first skill, before any distillation.</p>'
        f'<div class="multiples">{"".join(cards)}</div>'
    )


def accuracy_section(run: Run, other: Run | None) -> str:
    """Accuracy of both views over steps, with the gap between them; empty if it was not measured."""
    steps = run.evaluations.steps
    full, crop = run.evaluations.get("full_accuracy"), run.evaluations.get("crop_accuracy")
    series = [Series("full view", "var(--full)", steps, full), Series("crop view", "var(--crop)", steps, crop)]
    others = other.evaluations if other else Curves()
    dashed = [
        Series(f"{name}, {other.name if other else ''}", _beside(colour), others.steps, others.get(key), dashed=True)
        for key, name, colour in (
            ("full_accuracy", "full view", _COLOURS[0]),
            ("crop_accuracy", "crop view", _COLOURS[1]),
        )
        if len(_known(others.get(key)))
    ]
    # one point makes no curve; the table has it
    several = max(len(steps), len(others.steps)) > 1
    chart = line_chart(
        [*series, *dashed] if several else [],
        label="Accuracy of the full view and the crop view over training steps",
        y_label="accuracy",
        size=(480, 270),
        percent=True,
        shade_between=True,
    )
    shaded = "color-mix(in srgb, var(--muted) 30%, transparent)"
    entries = [("full view", "var(--full)"), ("crop view", "var(--crop)"), ("gap", shaded)]
    names = legend(entries, other.name if other and dashed else "")
    # First, last and evenly spaced rows: the chart holds the rest.
    shown = sorted({round(i * (len(steps) - 1) / 8) for i in range(9)}) if len(steps) else []
    rows = [
        [format_number(steps[i]), format_percent(full[i]), format_percent(crop[i]), points(crop[i] - full[i])]
        for i in shown
        if math.isfinite(full[i]) or math.isfinite(crop[i])
    ]
    table = numeric_table(["Step", "Full view", "Crop view", "Gap, points"], rows) if rows else ""
    if not chart:
        return table
    return (
        '<p class="note">The shaded area is the gap.</p><div class="split">'
        f'<figure class="card">{chart}{names}</figure>{table}</div>'
    )
