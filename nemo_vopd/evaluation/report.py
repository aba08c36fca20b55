"""The report of a run: one self-contained HTML page, and the gap figure alone for a README."""

from __future__ import annotations

import base64
import io
import itertools
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

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

MAX_IMAGE_SIDE = 640
"""Larger images are shrunk before they are embedded: the page shows none of them wider."""
LN2 = math.log(2)
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
    ("Learning rate", "per step", {"lr": "learning rate"}),
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


@dataclass
class Example:
    """One question with both views, and the model's answers before and after training."""

    image: Image.Image
    bbox: tuple[float, float, float, float]
    """The evidence in pixels of `image`: left, top, right, bottom."""
    crop: Image.Image
    question: str
    answer: str
    full_before: str
    full_after: str
    crop_before: str
    crop_after: str


@dataclass
class TokenTrace:
    """One response of the student, and what both policies gave each of its T tokens."""

    image: Image.Image
    crop: Image.Image
    question: str
    tokens: list[str]
    student_log_probs: list[float]
    """[T] log-probability of the sampled token, nats; the full view."""
    teacher_log_probs: list[float]
    """[T] the same; the crop view."""
    divergence: list[float]
    """[T] generalised Jensen-Shannon divergence, 0 to ln 2."""
    student_top: list[list[tuple[str, float]]]
    """[T] the most probable tokens and their probabilities."""
    teacher_top: list[list[tuple[str, float]]]


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
        "examples": _examples_section(examples),
        "tokens": _tokens_section(traces),
        "facts": _facts_section(summary),
    }
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name in SECTIONS.items())
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{SECTIONS[key]}</h2>{content}</section>'
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
        f'<p><b class="full">Full view</b>: {format_percent(full_before)} before, {format_percent(full_after)} after. '
        f'<b class="crop">Crop view</b>: {format_percent(crop_before)} before, {format_percent(crop_after)} after.</p>'
        '<p class="note">The gap is the accuracy with a crop around the evidence minus the accuracy with the full '
        "image. The student sees the full image; its teacher, an average of its own weights, sees the crop.</p></div>"
        f'<figure class="card"><svg viewBox="0 0 480 330" role="img" aria-label="{escape(_headline(summary))}">'
        f"{gap_bars(_accuracies(summary), PAGE_COLOURS)}</svg></figure></header>"
    )


def _legend(entries: list[tuple[str, str]]) -> str:
    return (
        '<div class="legend">'
        + "".join(f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in entries)
        + "</div>"
    )


def _panel(heading: str, value: str, chart: str, legend: list[tuple[str, str]] | None = None) -> str:
    return (
        f'<figure class="card"><div class="panel-head"><h3>{escape(heading)}</h3><span>{escape(value)}</span></div>'
        f"{chart}{_legend(legend) if legend else ''}</figure>"
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
    legend = [("full view", "var(--full)"), ("crop view", "var(--crop)")]
    shaded = "<span><i style='background:var(--muted);opacity:.3'></i>gap</span>"
    return (
        '<p class="note">Measured on held-out questions; the shaded area is the gap.</p><div class="split">'
        f'<figure class="card">{chart}{_legend(legend).replace("</div>", shaded + "</div>")}</figure>'
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
    chart = line_chart(series, label=f"{heading} over steps", y_label=unit, allow_log=bool(LOG_KEYS & set(names)))
    if not chart:
        return ""
    legend = [(one.name, one.colour) for one in series] if len(names) > 1 else None
    return _panel(heading, "last " + ", ".join(_last(one.y) for one in series), chart, legend)


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
        legend = [(one.name, one.colour) for one in stacked]
        cards.append(_panel("Time by phase", f"mean {format_number(mean)} s", chart, legend))
    if not any(cards):
        return '<p class="note">No training metrics were recorded.</p>'
    return (
        '<p class="note">Faint: every step. Strong: moving mean. Point at a chart to read its values.</p>'
        f'<div class="multiples">{"".join(cards)}</div>'
    )


def _warmup_section(warmup: list[dict[str, Any]]) -> str:
    panels = (("Loss", "nats per token", {"loss": "loss"}), ("Learning rate", "per step", {"lr": "learning rate"}))
    cards = [_curve_panel(heading, unit, names, warmup) for heading, unit, names in panels]
    if not any(cards):
        return '<p class="note">This run started from a trained model: there was no supervised warm-up.</p>'
    return (
        '<p class="note">Supervised training that gives the small model its first skill, before any distillation.</p>'
        f'<div class="multiples">{"".join(cards)}</div>'
    )


def _image(image: Image.Image, alt: str, bbox: tuple[float, float, float, float] | None = None) -> str:
    """The image as a data URI, with the evidence box drawn over it in the image's own pixel coordinates."""
    width, height = image.size
    shown = image if image.mode in ("RGB", "L") else image.convert("RGB")
    if max(shown.size) > MAX_IMAGE_SIDE:
        shown = shown.copy()
        shown.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    buffer = io.BytesIO()
    shown.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    overlay = ""
    if bbox is not None and all(math.isfinite(as_float(edge)) for edge in bbox):
        left, top, right, bottom = bbox
        place = f'x="{left:g}" y="{top:g}" width="{max(right - left, 0):g}" height="{max(bottom - top, 0):g}"'
        overlay = (
            f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect class="halo" {place}/><rect class="box" {place}/></svg>'
        )
    # Tiny synthetic images are shown pixel by pixel; photographs are left to the browser's filter.
    small = ' class="small"' if max(width, height) <= 256 else ""
    return (
        f'<div class="shot"><img{small} src="data:image/png;base64,{data}" width="{width}" height="{height}" '
        f'alt="{escape(alt)}">{overlay}</div>'
    )


def _views(image: Image.Image, crop: Image.Image, bbox: tuple[float, float, float, float] | None = None) -> str:
    return (
        f'<div class="shots"><figure>{_image(image, "Full image", bbox)}<figcaption>Full view</figcaption></figure>'
        f"<figure>{_image(crop, 'Crop around the evidence')}<figcaption>Crop view</figcaption></figure></div>"
    )


def _normalised(answer: str) -> str:
    return answer.strip().rstrip(".!").casefold()


def _answer(given: str, answer: str) -> str:
    right = _normalised(given) == _normalised(answer)
    name, stroke = ("right", "M2 8.5L6.2 13L14 3.5") if right else ("wrong", "M3 3L13 13M13 3L3 13")
    return (
        f'<td><span class="mark {name}"><svg viewBox="0 0 16 16" aria-hidden="true"><path d="{stroke}"/></svg>'
        f'<span class="hidden">{name}:</span><span>{escape(given.strip()) or "(empty)"}</span></span></td>'
    )


def _examples_section(examples: list[Example]) -> str:
    if not examples:
        return '<p class="note">No examples were kept.</p>'
    cards = "".join(
        f'<article class="card">{_views(example.image, example.crop, example.bbox)}'
        f'<p class="question">{escape(example.question)}</p><p>Answer: <b>{escape(example.answer)}</b></p>'
        "<table><thead><tr><th></th><th>Before</th><th>After</th></tr></thead><tbody>"
        f'<tr><th scope="row">Full view</th>{_answer(example.full_before, example.answer)}'
        f"{_answer(example.full_after, example.answer)}</tr>"
        f'<tr><th scope="row">Crop view</th>{_answer(example.crop_before, example.answer)}'
        f"{_answer(example.crop_after, example.answer)}</tr></tbody></table></article>"
        for example in examples
    )
    return (
        '<p class="note">The box marks the evidence; it is drawn for the reader, the model does not see it. A tick '
        "means the same answer up to case and a final full stop; a cross means another one.</p>"
        f'<div class="examples">{cards}</div>'
    )


def _visible(token: str) -> str:
    """Token text with its white space made visible."""
    return escape(token.replace(" ", "\u00b7").replace("\n", "\u21b5").replace("\t", "\u21e5") or "(empty)")


def _bar(probability: float, who: str) -> str:
    name = f'<span class="hidden">{"student" if who == "full" else "teacher"}</span>'
    if not math.isfinite(probability):
        return f'<div class="bar {who}">{name}<span class="absent">not among its top tokens</span></div>'
    share = min(max(probability, 0.0), 1.0)
    return f'<div class="bar {who}" style="--p:{share:.4f}">{name}<i></i><span>{format_percent(share)}</span></div>'


def _token_detail(token: str, position: str, student: float, teacher: float, divergence: float, tops: list) -> str:
    """What both policies thought at one position: the sampled token first, then every other top token."""
    others: dict[str, list[float]] = {}
    for who, top in enumerate(tops):
        for text, probability in top:
            if text != token and not math.isfinite(others.setdefault(text, [math.nan, math.nan])[who]):
                others[text][who] = as_float(probability)
    sampled = [math.exp(min(value, 0.0)) if math.isfinite(value) else math.nan for value in (student, teacher)]
    ranked = sorted(others.items(), key=lambda item: -max((p for p in item[1] if math.isfinite(p)), default=0.0))
    rows = "".join(
        f"<div class='pair'><div><code>{_visible(text)}</code>{'<br><em>sampled</em>' if i == 0 else ''}</div>"
        f"<div>{_bar(pair[0], 'full')}{_bar(pair[1], 'crop')}</div></div>"
        for i, (text, pair) in enumerate([(token, sampled), *ranked])
    )
    return (
        f'<div class="facts-line"><span>Token {position}: <code>{_visible(token)}</code></span>'
        f'<span class="full">Student log-prob <b>{format_number(student, 3)}</b></span>'
        f'<span class="crop">Teacher log-prob <b>{format_number(teacher, 3)}</b></span>'
        f"<span>Divergence <b>{format_number(divergence, 4)}</b> nats</span></div>{rows}"
    )


def _trace(number: int, trace: TokenTrace) -> str:
    def column(values: list[float]) -> list[float]:
        return [as_float(value) for value, _ in itertools.zip_longest(values[:length], trace.tokens)]

    length = len(trace.tokens)
    student, teacher = column(trace.student_log_probs), column(trace.teacher_log_probs)
    divergence = column(trace.divergence)
    # The page opens where the two policies disagree most.
    known = [value if math.isfinite(value) else -1.0 for value in divergence]
    chosen = known.index(max(known)) if known else 0
    chips, details = [], []
    for j, token in enumerate(trace.tokens):
        heat = math.sqrt(min(max(known[j], 0.0) / LN2, 1.0))
        name, on = f"trace{number}-{j}", j == chosen
        chips.append(
            f'<button role="tab" type="button" id="{name}" aria-controls="{name}-detail" '
            f'aria-selected="{str(on).lower()}" tabindex="{0 if on else -1}" style="--d:{heat:.3f}">'
            f"{_visible(token)}</button>"
        )
        tops = [top[j] if j < len(top) else [] for top in (trace.student_top, trace.teacher_top)]
        detail = _token_detail(token, f"{j + 1} of {length}", student[j], teacher[j], divergence[j], tops)
        details.append(
            f'<div role="tabpanel" id="{name}-detail" aria-labelledby="{name}"{"" if on else " hidden"}>{detail}</div>'
        )
    return (
        f'<article class="card trace"><div>{_views(trace.image, trace.crop)}</div>'
        f'<div><p class="question">{escape(trace.question)}</p>'
        f'<div class="tokens" role="tablist" aria-label="Response tokens">{"".join(chips)}</div>'
        f'<div class="detail">{"".join(details)}</div></div></article>'
    )


def _tokens_section(traces: list[TokenTrace]) -> str:
    if not traces:
        return '<p class="note">No token traces were kept.</p>'
    scale = "".join(f"<li>{label}</li>" for label in ("0", "0.04", "0.17", "0.39", "ln 2"))
    policies = [("student, full view", "var(--full)"), ("teacher, crop view", "var(--crop)")]
    return (
        "<p class='note'>Responses that the student sampled from the full image. The darker a token, the more the "
        "teacher, who sees the crop, disagrees there. Point at a token, or focus one and use the arrow keys, to see "
        f"what both would have written.</p>{_legend(policies)}"
        '<div class="scale"><div></div>'
        f"<ol>{scale}</ol>Jensen-Shannon divergence, nats (square-root scale)</div>"
        + "".join(_trace(i, trace) for i, trace in enumerate(traces))
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
    number = as_float(value)
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return "n/a" if value is None else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(_fact(key, item) for item in value)
    if not isinstance(value, int | float):
        return str(value)
    if "accuracy" in key or key == "gap_closed":
        return format_percent(number)
    if "seconds" in key:
        return _duration(number)
    if key.endswith("_gib"):
        return f"{format_number(number)} GiB"
    # A seed is a name, not a quantity.
    return str(value) if key == "seed" else format_number(number)


def _facts_table(caption: str, facts: dict[str, Any], context: str = "") -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(_fact(key, value))}</td></tr>'
        for name, key, value in (
            (_label(str(k)) if not context else str(k), f"{context}{k}", v) for k, v in facts.items()
        )
    )
    return f"<table><caption>{escape(caption)}</caption><tbody>{rows}</tbody></table>"


def _facts_section(summary: dict[str, Any]) -> str:
    flat = {key: value for key, value in summary.items() if not isinstance(value, dict)}
    nested = {key: value for key, value in summary.items() if isinstance(value, dict)}
    tables = [_facts_table("Run", flat)]
    for key, facts in nested.items():
        # Phases are seconds whatever their own names are; versions keep the names that packages have.
        context = "seconds " if "seconds" in str(key) or "phases" in str(key) else " "
        tables.append(_facts_table(_label(str(key)), facts, context))
    return f'<div class="facts">{"".join(tables)}</div>'
