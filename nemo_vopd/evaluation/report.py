"""The report of a run: one self-contained HTML page, and the gap figure alone for a README."""

from __future__ import annotations

import math
from html import escape
from numbers import Real
from pathlib import Path
from typing import Any

from nemo_vopd.evaluation.example_cards import Example, TokenTrace, examples_section, legend, tokens_section
from nemo_vopd.evaluation.page_style import SCRIPT, STYLE
from nemo_vopd.evaluation.svg import (
    PAGE_COLOURS,
    PRINT_COLOURS,
    Series,
    as_float,
    format_number,
    format_percent,
    gap_bars,
    line_chart,
    stacked_chart,
)

__all__ = ["Example", "TokenTrace", "gap_figure_svg", "write_report"]

SECTIONS = {
    "gap": "The gap",
    "accuracy": "Accuracy over steps",
    "curves": "Training",
    "warmup": "Warm-up",
    "examples": "Examples",
    "tokens": "Token by token",
    "facts": "Run facts",
}
PANELS: list[tuple[str, str, dict[str, str]]] = [
    ("Loss", "nats per token", {"loss": "loss"}),
    ("Gradient norm", "L2 norm", {"grad_norm": "gradient norm"}),
    ("Entropy of the student", "nats per token", {"entropy": "entropy"}),
    ("Response length", "tokens, mean", {"mean_response_length": "length"}),
    ("Top-k mass", "probability", {"student_topk_mass": "student", "teacher_topk_mass": "teacher"}),
    ("Importance weight", "mean", {"importance_weight_mean": "weight"}),
    ("Learning rate", "", {"lr": "learning rate"}),
    ("Throughput", "tokens per second", {"tokens_per_second": "throughput"}),
    ("Response tokens", "tokens per step", {"num_response_tokens": "tokens"}),
    ("Dropped samples", "samples per step", {"num_dropped_samples": "dropped"}),
]
LOG_KEYS = {"loss", "grad_norm"}
SUMS_OF_PHASES = {"seconds_total", "seconds_step"}
FACT_LABELS = {
    "full_accuracy_before": "Full-view accuracy before",
    "full_accuracy_after": "Full-view accuracy after",
    "crop_accuracy_before": "Crop-view accuracy before",
    "crop_accuracy_after": "Crop-view accuracy after",
    "wall_seconds": "Wall-clock time",
    "num_parameters": "Parameters",
}


def write_report(
    path: Path,
    *,
    title: str,
    summary: dict[str, Any],
    metrics: list[dict[str, Any]],
    warmup: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
    examples: list[Example],
    traces: list[TokenTrace],
) -> None:
    """Write the page to `path`; whatever is missing or not finite is left out or shown as n/a."""
    sections = {
        "accuracy": _accuracy_section(evaluations),
        "curves": _curves_section(metrics),
        "warmup": _warmup_section(warmup),
        "examples": examples_section(examples),
        "tokens": tokens_section(traces),
        "facts": _facts_section(summary),
    }
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name in SECTIONS.items())
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{SECTIONS[key]}</h2>'
        f"{content}</section>"
        for key, content in sections.items()
    )
    # The policy makes the promise of a self-contained page one that the browser keeps.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'{_header(title, summary)}<nav aria-label="Sections">{links}</nav><main>{body}</main>'
        "<footer>Vision-OPD: on-policy self-distillation of a vision-language model (arXiv 2605.18740).</footer>"
        f'<div id="tip" hidden></div><script>{SCRIPT}</script></body></html>\n'
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def gap_figure_svg(summary: dict[str, Any]) -> str:
    """The bars of full-view and crop-view accuracy before and after, on white: a file of its own for a README."""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 366" width="480" height="366" role="img" '
        f'aria-label="{escape(_headline(summary))}"><rect x="0.5" y="0.5" width="479" height="365" rx="8" '
        'fill="#ffffff" stroke="#d9d7d2"/><text x="18" y="29" font-family="system-ui, -apple-system, Segoe UI, '
        f'sans-serif" font-size="15" font-weight="700" fill="{PRINT_COLOURS["ink"]}">Accuracy on the full image and '
        f'on the evidence crop</text><g transform="translate(0 36)">{gap_bars(_accuracies(summary), PRINT_COLOURS)}'
        "</g></svg>\n"
    )


def _accuracies(summary: dict[str, Any]) -> dict[str, tuple[float, float]]:
    return {
        moment: (as_float(summary.get(f"full_accuracy_{key}")), as_float(summary.get(f"crop_accuracy_{key}")))
        for moment, key in (("Before", "before"), ("After", "after"))
    }


def _gaps(summary: dict[str, Any]) -> tuple[float, float, float]:
    """The gap before, after (fractions of accuracy) and the share of it that was closed."""
    before, after = (crop - full for full, crop in _accuracies(summary).values())
    closed = as_float(summary.get("gap_closed"))
    if not math.isfinite(closed) and before > 0:
        closed = 1 - after / before
    return before, after, closed


def _points(fraction: float) -> str:
    return format_number(100 * fraction, 1)


def _headline(summary: dict[str, Any]) -> str:
    before, after, closed = _gaps(summary)
    if not (math.isfinite(before) and math.isfinite(after)):
        return "The regional-to-global gap was not measured both before and after."
    verb = "stayed" if abs(after - before) < 5e-4 else "narrowed" if after < before else "widened"
    if verb == "stayed":
        return f"The regional-to-global gap stayed at {_points(after)} points."
    text = f"The regional-to-global gap {verb} from {_points(before)} to {_points(after)} points"
    return f"{text}: {format_percent(closed, 0)} of it is closed." if closed > 0 else f"{text}."


def _header(title: str, summary: dict[str, Any]) -> str:
    before, after, closed = _gaps(summary)
    (full_before, crop_before), (full_after, crop_after) = _accuracies(summary).values()
    numbers = [
        ("Gap before", _points(before), "points"),
        ("Gap after", _points(after), "points"),
        ("Gap closed", format_percent(closed, 0), ""),
    ]
    tiles = "".join(
        f"<div><dt>{name}</dt><dd>{value} <small>{unit}</small></dd></div>" for name, value, unit in numbers
    )
    return (
        f'<header id="gap"><div><h1>{escape(title)}</h1><p class="lead">{escape(_headline(summary))}</p>'
        f'<dl class="numbers">{tiles}</dl>'
        f'<p><b class="full">Full view</b>: {format_percent(full_before)} before, {format_percent(full_after)} after'
        f'.<br><b class="crop">Crop view</b>: {format_percent(crop_before)} before, {format_percent(crop_after)} after'
        ".</p>"
        '<p class="note">The gap is the accuracy with a crop around the evidence minus the accuracy with the full '
        "image. Vision-OPD lets a model that sees the crop teach itself on the full image.</p></div>"
        f'<figure class="card"><svg viewBox="0 0 480 330" role="img" aria-label="{escape(_headline(summary))}">'
        f"{gap_bars(_accuracies(summary), PAGE_COLOURS)}</svg></figure></header>"
    )


def _panel(heading: str, value: str, chart: str, entries: list[tuple[str, str]] | None = None) -> str:
    return (
        f'<figure class="card"><div class="panel-head"><h3>{escape(heading)}</h3><span>{escape(value)}</span></div>'
        f"{chart}{legend(entries) if entries else ''}</figure>"
    )


def _steps(rows: list[dict[str, Any]]) -> tuple[list[float], list[dict[str, Any]]]:
    """Step numbers and their rows, in order; a row without a step takes its position."""
    steps = [as_float(row.get("step")) for row in rows]
    steps = [step if math.isfinite(step) else float(i) for i, step in enumerate(steps)]
    order = sorted(range(len(rows)), key=steps.__getitem__)
    return [steps[i] for i in order], [rows[i] for i in order]


def _accuracy_section(evaluations: list[dict[str, Any]]) -> str:
    steps, rows = _steps(evaluations)
    full, crop = ([as_float(row.get(key)) for row in rows] for key in ("full_accuracy", "crop_accuracy"))
    series = [Series("full view", "var(--full)", steps, full), Series("crop view", "var(--crop)", steps, crop)]
    chart = line_chart(
        series,
        label="Accuracy of the full view and the crop view over training steps",
        y_label="accuracy",
        size=(480, 270),
        percent=True,
        shade_between=True,
    )
    if not chart:
        return '<p class="note">No accuracy was measured during training.</p>'
    # First, last and evenly spaced rows: the chart holds the rest.
    shown = sorted({round(i * (len(rows) - 1) / 8) for i in range(9)})
    body = "".join(
        f"<tr><td>{format_number(steps[i])}</td><td>{format_percent(full[i])}</td><td>{format_percent(crop[i])}</td>"
        f"<td>{_points(crop[i] - full[i])}</td></tr>"
        for i in shown
    )
    shaded = "color-mix(in srgb, var(--muted) 30%, transparent)"
    names = legend([("full view", "var(--full)"), ("crop view", "var(--crop)"), ("gap", shaded)])
    return (
        '<p class="note">The shaded area is the gap.</p><div class="split">'
        f'<figure class="card">{chart}{names}</figure>'
        '<div class="card"><table class="numeric"><thead><tr><th>Step</th><th>Full view</th><th>Crop view</th>'
        f"<th>Gap, points</th></tr></thead><tbody>{body}</tbody></table></div></div>"
    )


def _last(values: list[float]) -> str:
    return next((format_number(value) for value in reversed(values) if math.isfinite(value)), "n/a")


def _curve_panel(heading: str, unit: str, names: dict[str, str], rows: list[dict[str, Any]]) -> str:
    steps, rows = _steps(rows)
    colours = ["var(--full)", "var(--crop)"]
    series = [
        Series(name, colour, steps, [as_float(row.get(key)) for row in rows])
        for (key, name), colour in zip(names.items(), colours, strict=False)
    ]
    series = [one for one in series if any(math.isfinite(value) for value in one.y)]
    chart = line_chart(
        series, label=f"{heading} over steps", y_label=unit, allow_log=bool(LOG_KEYS & set(names)), exact="lr" in names
    )
    if not chart:
        return ""
    entries = [(one.name, one.colour) for one in series] if len(names) > 1 else None
    return _panel(heading, "last " + ", ".join(_last(one.y) for one in series), chart, entries)


def _curves_section(metrics: list[dict[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for row in metrics for key in row if isinstance(key, str)))
    phases = [key for key in keys if key.startswith("seconds_") and key not in SUMS_OF_PHASES]
    drawn = {key for _, _, names in PANELS for key in names} | {"step"}
    rest = [key for key in keys if key not in drawn and not key.startswith("seconds")]
    panels = PANELS + [(_label(key), "value", {key: _label(key)}) for key in rest]
    cards = [_curve_panel(heading, unit, names, metrics) for heading, unit, names in panels]
    steps, rows = _steps(metrics)
    # Six colours tell six phases apart; whatever comes after the fifth shares the last one.
    groups = [[key] for key in phases] if len(phases) <= 6 else [[key] for key in phases[:5]] + [phases[5:]]
    stacked = []
    for i, group in enumerate(groups):
        name = group[0].removeprefix("seconds_").replace("_", " ") if len(group) == 1 else "other"
        values = [sum(value for value in map(as_float, map(row.get, group)) if value > 0) for row in rows]
        stacked.append(Series(name, f"var(--c{i})", steps, values))
    chart = stacked_chart(stacked, label="Seconds per step by phase", y_label="seconds per step")
    if chart:
        mean = sum(sum(one.y) for one in stacked) / len(rows)
        entries = [(one.name, one.colour) for one in stacked]
        cards.append(_panel("Time by phase", f"mean {format_number(mean)} s", chart, entries))
    if not any(cards):
        return '<p class="note">No training metrics were recorded.</p>'
    return (
        '<p class="note">Faint: every step. Strong: moving mean. Point at a chart to read its values.</p>'
        f'<div class="multiples">{"".join(cards)}</div>'
    )


def _warmup_section(warmup: list[dict[str, Any]]) -> str:
    panels = (("Loss", "nats per token", {"loss": "loss"}), ("Learning rate", "", {"lr": "learning rate"}))
    cards = [_curve_panel(heading, unit, names, warmup) for heading, unit, names in panels]
    if not any(cards):
        return '<p class="note">No supervised warm-up was recorded.</p>'
    return (
        '<p class="note">Supervised training that gives the small model its first skill, before any distillation.</p>'
        f'<div class="multiples">{"".join(cards)}</div>'
    )


def _label(key: str) -> str:
    if key in FACT_LABELS:
        return FACT_LABELS[key]
    words = key.removesuffix("_gib").removesuffix("_seconds").removeprefix("seconds_").replace("_", " ")
    return words[:1].upper() + words[1:]


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds) or seconds < 60:
        return f"{format_number(seconds)} s" if math.isfinite(seconds) else "n/a"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _fact(key: str, value: object) -> str:
    """`value` as text, in the unit that its key names."""
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_fact(key, item) for item in value)
    # A seed is a name, not a quantity.
    if not isinstance(value, Real) or key == "seed":
        return str(value)
    number = as_float(value)
    if "accuracy" in key or key == "gap_closed":
        return format_percent(number)
    if "seconds" in key:
        return _duration(number)
    return f"{format_number(number)} GiB" if key.endswith("_gib") else format_number(number)


def _table(caption: str, rows: list[tuple[str, str]]) -> str:
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in rows)
    return f"<table><caption>{escape(caption)}</caption><tbody>{body}</tbody></table>"


def _facts_section(summary: dict[str, Any]) -> str:
    flat = [(_label(str(key)), _fact(str(key), value)) for key, value in summary.items() if not isinstance(value, dict)]
    tables = [_table("Run", flat)] if flat else []
    for key, facts in summary.items():
        if isinstance(facts, dict):
            # Phases are seconds whatever their own names are.
            unit = " seconds" if "seconds" in str(key) or "phases" in str(key) else ""
            tables.append(
                _table(_label(str(key)), [(str(name), _fact(f"{name}{unit}", v)) for name, v in facts.items()])
            )
    return (
        f'<div class="facts">{"".join(tables)}</div>' if tables else '<p class="note">No run facts were recorded.</p>'
    )
