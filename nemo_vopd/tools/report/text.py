"""Pieces of HTML that several sections of the report are made of, and numbers in the unit their names tell."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from numbers import Real

from nemo_vopd.tools.report.cards import legend
from nemo_vopd.tools.report.svg import as_float, format_number, format_percent

_LABELS = {
    "full_accuracy_before": "Full-view accuracy before",
    "full_accuracy_after": "Full-view accuracy after",
    "crop_accuracy_before": "Crop-view accuracy before",
    "crop_accuracy_after": "Crop-view accuracy after",
    "full_accuracy": "Full-view accuracy",
    "crop_accuracy": "Crop-view accuracy",
    "wall_seconds": "Wall-clock time",
    "num_parameters": "Parameters",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "distinct_2": "Distinct neighbouring pairs",
    "student_topk_mass": "Top-k mass of the student",
    "teacher_topk_mass": "Top-k mass of the teacher",
    "mismatch_mean": "Mismatch, mean",
    "mismatch_max": "Mismatch, largest",
    "mismatch_share": "Mismatch, share of tokens far off",
    "importance_weight_mean": "Importance weight, mean",
    "mean_response_length": "Response length, mean",
}


def points(fraction: float) -> str:
    """A difference of accuracies in percentage points."""
    return format_number(100 * fraction, 1)


def signed(value: float, decimals: int | None = None) -> str:
    """A number with its sign, also when it is positive."""
    return ("+" if value > 0 else "") + format_number(value, decimals)


def label(key: str) -> str:
    """What people call the metric or fact `key`."""
    if key in _LABELS:
        return _LABELS[key]
    words = key.removesuffix("_gib").removesuffix("_seconds").removeprefix("seconds_").replace("_", " ")
    words = words.removeprefix("num ")
    return words[:1].upper() + words[1:]


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if not 60 <= seconds < 1e12:
        return f"{format_number(seconds)} s" if math.isfinite(seconds) else "n/a"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def fact(key: str, value: object) -> str:
    """`value` as text, in the unit that its key names."""
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(fact(key, item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{name}: {fact(key, one)}" for name, one in value.items() if one is not None) or "n/a"
    # A seed is a name, not a quantity.
    if not isinstance(value, Real) or key == "seed":
        return str(value)
    number = as_float(value)
    if "accuracy" in key or key == "gap_closed":
        return format_percent(number)
    if "seconds" in key:
        return duration(number)
    return f"{format_number(number)} GiB" if key.endswith("_gib") else format_number(number)


def facts_table(caption: str, rows: Iterable[tuple[str, str]]) -> str:
    """Names and values; `caption` and all texts are escaped here."""
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in rows)
    return f"<table><caption>{escape(caption)}</caption><tbody>{body}</tbody></table>"


def numeric_table(heads: list[str], rows: list[list[str]], caption: str = "") -> str:
    """A card with a table: first column words, the others numbers. Cells are HTML; heads and `caption` are escaped."""
    # names of runs may be long; the words of this page are not broken
    kinds = [' class="long"' if any(len(word) > 12 for word in name.split()) else "" for name in heads]
    head = "".join(f'<th scope="col"{k}>{escape(name)}</th>' for k, name in zip(kinds, heads, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f'<th scope="row">{c}</th>' if i == 0 else f"<td>{c}</td>" for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    top = f"<caption>{escape(caption)}</caption>" if caption else ""
    table = f'<table class="numeric">{top}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="card"><div class="scroll">{table}</div></div>'


def panel(heading: str, value: str, chart: str, entries: list[tuple[str, str]] | None = None, other: str = "") -> str:
    """A card with a chart, its heading, one number, and its legend; `other` names the dashed curves."""
    names = legend(entries, other) if entries or other else ""
    return (
        f'<figure class="card"><div class="panel-head"><h3>{escape(heading)}</h3><span>{escape(value)}</span></div>'
        f"{chart}{names}</figure>"
    )


def count_bars(counts: list[tuple[str, float]]) -> str:
    """A line for each name with a bar as long as its count."""
    largest = max((number for _, number in counts), default=0.0)
    lines = "".join(
        f'<span>{escape(name)}</span><i style="--p:{number / largest if largest > 0 else 0:.4f}"></i>'
        f"<span>{format_number(number)}</span>"
        for name, number in counts
    )
    return f'<div class="counts">{lines}</div>'


def number_note(text: str) -> str:
    """Small print below a number."""
    return f'<span class="number-note">{escape(text)}</span>' if text else ""


def difference(value: float, text: str) -> str:
    """`text` in the colour of a gain or a loss; the sign says the same."""
    kind = "plus" if value > 5e-4 else "minus" if value < -5e-4 else ""
    return f'<span class="{kind}">{text}</span>' if kind else f"<span>{text}</span>"
