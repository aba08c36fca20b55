"""The data in the report: records that a run could not use, and the card of its data set."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import numpy as np

from nemo_vopd.tools.report.run_files import Run
from nemo_vopd.tools.report.svg import as_float, format_number
from nemo_vopd.tools.report.svg_bars import histogram
from nemo_vopd.tools.report.svg_evidence import area_text
from nemo_vopd.tools.report.text import count_bars, fact, facts_table, label, numeric_table, panel

_PREFIX = "dropped_by_reason/"
_UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def drops_section(run: Run) -> str:
    """Bars of what was dropped, by reason, with examples; empty when nothing was."""
    counts = dict(run.drops.counts)
    if not counts:  # dropped.jsonl is missing; the metrics counted too
        columns = {key.removeprefix(_PREFIX): v for key, v in run.metrics.columns.items() if key.startswith(_PREFIX)}
        counts = {reason: int(np.nansum(values)) for reason, values in columns.items()}
    ranked = sorted(((reason, float(num)) for reason, num in counts.items() if num > 0), key=lambda item: -item[1])
    if not ranked:
        return ""
    details = ""
    for reason, _ in ranked:
        examples = run.drops.examples.get(reason, [])
        lines = "".join(f"<li>{escape(name)}{': ' if detail else ''}{escape(detail)}</li>" for name, detail in examples)
        if lines:
            details += f"<details><summary>{escape(reason)}: examples</summary><ul class='found'>{lines}</ul></details>"
    return (
        '<p class="note">Records and responses that could not be used; dropped.jsonl has every one. '
        "docs/troubleshooting.md explains the reasons.</p>"
        f'<div class="card">{count_bars(ranked)}{details}</div>'
    )


def data_section(card: dict[str, Any]) -> str:
    """What recipes/prepare_data.py counted in the data set; empty without a card."""
    facts = [(label(key), fact(key, card[key])) for key in ("kept", *_WITH) if key in card]
    if math.isfinite(size := as_float(card.get("bytes"))):
        facts.append(("Size", _bytes(size)))
    splits = card.get("splits")
    if isinstance(splits, dict):
        facts += [(f"Split {name}", fact("", number)) for name, number in splits.items()]
    for key, name in (
        ("image_megapixels", "Median image, megapixels"),
        ("relative_box_area", "Median box, of the image"),
    ):
        if math.isfinite(median := as_float(_of(card, key).get("median"))):
            facts.append((name, area_text(median) if key == "relative_box_area" else format_number(median)))
    cards = [f'<div class="card">{facts_table("Records", facts)}</div>'] if facts else []
    cards += [
        _histogram(_of(card, "image_megapixels"), "Image size", "megapixels", "{:g}".format),
        _histogram(_of(card, "relative_box_area"), "Relative box area", "share of the image", area_text),
        _card_drops(card),
    ]
    options = [_options(card, key) for key in ("crop", "options")]
    content = "".join([*cards, *options])
    sources = _sources(card)
    return f'<div class="multiples data">{content}</div>{sources}' if content or sources else ""


_WITH = ("with_answer", "with_box", "with_crop", "with_hint")


def _of(card: dict[str, Any], key: str) -> dict[str, Any]:
    value = card.get(key)
    return value if isinstance(value, dict) else {}


def _histogram(value: dict[str, Any], heading: str, x_label: str, as_text) -> str:
    edges, counts = value.get("edges"), value.get("counts")
    if not isinstance(edges, list) or not isinstance(counts, list):
        return ""
    chart = histogram(edges, counts, label=f"{heading} of the records", x_label=x_label, as_text=as_text)
    return panel(heading, "", chart) if chart else ""


def _card_drops(card: dict[str, Any]) -> str:
    dropped = [(str(reason), as_float(num)) for reason, num in _of(card, "dropped").items()]
    ranked = sorted((pair for pair in dropped if pair[1] > 0), key=lambda pair: -pair[1])
    head = '<div class="panel-head"><h3>Dropped when it was prepared</h3></div>'
    return f'<div class="card">{head}{count_bars(ranked)}</div>' if ranked else ""


def _options(card: dict[str, Any], key: str) -> str:
    rows = [(str(name).replace("_", " "), fact("", value)) for name, value in _of(card, key).items()]
    name = "Crop" if key == "crop" else "Options of prepare_data.py"
    return f'<div class="card">{facts_table(name, rows)}</div>' if rows else ""


def _sources(card: dict[str, Any]) -> str:
    listed = card.get("sources")
    sources = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    if not sources:
        return ""
    rows = []
    for one in sources:
        dropped = one.get("dropped")
        num = sum(as_float(n) for n in dropped.values()) if isinstance(dropped, dict) else as_float(dropped)
        name = escape(str(one.get("path", ""))) + (f" ({escape(str(one['layout']))})" if one.get("layout") else "")
        numbers = [as_float(one.get("kept")), num, as_float(one.get("weight"))]
        rows.append([name, *(format_number(n) if math.isfinite(n) else "\u2013" for n in numbers)])
    return f'<div id="sources">{numeric_table(["Source", "Kept", "Dropped", "Weight"], rows)}</div>'


def _bytes(size: float) -> str:
    unit = next((name for name, scale in reversed(_UNITS.items()) if size >= scale), "B")
    return f"{format_number(size / _UNITS[unit])} {unit}"
