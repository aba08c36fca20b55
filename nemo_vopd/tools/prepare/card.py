"""The data card: what a prepared data set holds, as JSON for programs and as one HTML page for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from nemo_vopd.tools.prepare.statistics import AREA_EDGES, MEGAPIXEL_EDGES, Statistics, histogram
from nemo_vopd.tools.report.page import stylesheet

_STYLE = """
.dc-hist text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--muted); }
.dc-hist .dc-count { fill: var(--ink); } .dc-hist .dc-axis { stroke: var(--muted); }
.dc-hist .dc-column { fill: var(--full); } .dc-area .dc-column { fill: var(--crop); }
.dc-hist .dc-median { fill: var(--ink); }
.dc-pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 16px; }
header { display: block; padding-bottom: 0; } h2 { margin-bottom: 12px; }
.numbers dd { font-size: clamp(24px, 3vw, 34px); }
.dc-scroll { overflow-x: auto; } .dc-number, td code { white-space: nowrap; overflow-wrap: normal; }
.dc-scroll td { overflow-wrap: break-word; } .dc-scroll td:not(:last-child) { padding-right: 18px; }
.dc-counts td:not(:first-child), .dc-sources :is(td, th):nth-child(n+3) { text-align: right; }
.dc-sources, .dc-reasons { min-width: 560px; }
"""
_WORDS = {
    "malformed_record": "not of the form that is expected",
    "duplicate_id": "an earlier record has the same id",
    "missing_crop": "no crop image, or neither box nor crop",
    "path_outside_folder": "its image lies outside the folder of the source",
}


def write_card(
    folder: Path,
    whole: Statistics,
    sources: list[dict],
    parts: list[str],
    options: dict[str, object],
    crop: dict[str, Any],
    copies: Sequence[str] = (),
) -> None:
    """Write data_card.json and data_card.html to `folder`, and both again to its folders `copies`.

    `sources` are {"path", "layout", "kept", "dropped", "weight"}, `parts` the data sets in `folder`.
    """
    card = {
        "sources": sources,
        "kept": whole.kept,
        "dropped": dict(whole.dropped.most_common()),
        "examples": whole.examples,
        "bytes": sum(entry["bytes"] for entries in whole.shards.values() for entry in entries),
        "shards": sum(len(entries) for entries in whole.shards.values()),
        "splits": whole.splits(),
        "parts": parts,
        "with_answer": whole.with_answer,
        "with_box": whole.with_box,
        "with_crop": whole.with_crop,
        "with_hint": whole.with_hint,
        "image_megapixels": histogram(whole.megapixels, MEGAPIXEL_EDGES),
        "relative_box_area": histogram(whole.relative_area, AREA_EDGES),
        "crop": crop,
        "options": options,
    }
    page = card_page(card)
    for place in (folder, *(folder / name for name in copies)):
        own = {**card, "parts": ["."]} if place != folder else card
        (place / "data_card.json").write_text(json.dumps(own, indent=1, ensure_ascii=False) + "\n")
        (place / "data_card.html").write_text(page)


def card_page(card: dict) -> str:
    """The page, which works from one file, offline. `card`: contents of data_card.json."""
    kept, dropped = card["kept"], sum(card["dropped"].values())
    numbers = [("records", f"{kept:,}"), ("dropped", f"{dropped:,}"), ("on disk", _size(card["bytes"]))]
    area = card["relative_box_area"]["median"]
    if area is not None:
        numbers.append(("median share of the image that a box covers", _percent(area)))
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in numbers)
    sections = [
        _section("Sources", _sources_table(card["sources"])),
        _section("Records", _contents_table(card)),
        _section("Images and evidence", _pictures(card)),
        _section("Dropped", _dropped_table(card)),
        _section("Made with", _options_table(card)),
    ]
    names = ", ".join(Path(source["path"]).name for source in card["sources"])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Data card: {escape(names)}</title><style>{stylesheet()}{_STYLE}</style></head><body>"
        f'<header><h1>Data card</h1><p class="lead">{escape(names)}</p><dl class="numbers">{tiles}</dl></header>'
        f"<main>{''.join(sections)}</main>"
        "<footer>Written by recipes/prepare_data.py; data_card.json beside this page has the numbers.</footer>"
        "</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML."""
    top = f"<thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr></thead>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="card dc-scroll"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def _sources_table(sources: list[dict]) -> str:
    weights = [source["weight"] for source in sources if source["weight"] is not None]
    blended = len(weights) == len(sources) and len(sources) > 1
    rows = []
    for source in sources:
        row = [
            escape(source["path"]),
            escape(source["layout"]),
            _number(f"{source['kept']:,}"),
            _number(f"{source['dropped']:,}"),
        ]
        rows.append([*row, _percent(source["weight"] / sum(weights))] if blended else row)
    return _table(["source", "layout", "kept", "dropped"] + ["share of the blend"] * blended, rows, "dc-sources")


def _contents_table(card: dict) -> str:
    kept = card["kept"]
    rows = [[f"in {name}", _number(f"{count:,}"), _share(count, kept)] for name, count in card["splits"].items()]
    if len(rows) == 1:
        rows = []
    for key, words in (
        ("with_answer", "with a reference answer"),
        ("with_box", "with an evidence box"),
        ("with_crop", "with a crop image"),
        ("with_hint", "whose question carries the red-box hint"),
    ):
        note = f" ({card['options'].get('hint', 'keep')})" if key == "with_hint" and card[key] else ""
        rows.append([words + note, _number(f"{card[key]:,}"), _share(card[key], kept)])
    return _table([], rows, "dc-counts")


def _dropped_table(card: dict) -> str:
    if not card["dropped"]:
        return '<p class="note">Nothing was dropped.</p>'
    rows = []
    for reason, count in card["dropped"].items():
        words = escape(_WORDS.get(reason) or str(reason).replace("_", " "))
        rows.append(
            [f"<code>{escape(reason)}</code>", words, _number(f"{count:,}"), escape(card["examples"].get(reason, ""))]
        )
    return _table(["reason", "meaning", "records", "first"], rows, "dc-reasons")


def _options_table(card: dict) -> str:
    rows = []
    for name, value in {**card["options"], **{f"crop.{key}": value for key, value in card["crop"].items()}}.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}={item}" for key, item in value.items() if item is not None) or "known names"
        rows.append([f"<code>{escape(name)}</code>", escape(str("null" if value is None else value))])
    return _table([], rows)


def _pictures(card: dict) -> str:
    pictures = []
    for key, title, unit, kind in (
        ("image_megapixels", "Image size in megapixels", "", ""),
        ("relative_box_area", "Box area over image area", "%", "dc-area"),
    ):
        data = card[key]
        if data["counts"]:
            median = _percent(data["median"]) if unit else f"{data['median']:.3g}"
            head = f'<div class="panel-head"><h3>{title}</h3><span>&#9650; median {median}</span></div>'
            pictures.append(f'<figure class="card">{head}{histogram_svg(data, unit, kind, title)}</figure>')
    return f'<div class="dc-pictures">{"".join(pictures)}</div>' if pictures else ""


def histogram_svg(data: dict, unit: str, kind: str, title: str) -> str:
    """Bars of {"edges", "counts", "median"} at equal widths, edges written between them; `unit` % turns shares."""
    edges, counts = data["edges"], data["counts"]
    top, height, width = 22, 150, 480
    step, most = min((width - 48) / len(counts), 72), max(counts)
    left = (width - step * len(counts)) / 2
    baseline = top + height
    parts = []
    for i, count in enumerate(counts):
        tall = height * count / most
        x = left + i * step
        parts.append(
            f'<rect class="dc-column" x="{x + 1.5:.1f}" y="{baseline - tall:.1f}" width="{step - 3:.1f}" '
            f'height="{max(tall, 1 if count else 0):.1f}"><title>{_edge(edges[i], unit)} to '
            f"{_edge(edges[i + 1], unit)}: {count:,}</title></rect>"
        )
        if count:
            parts.append(
                f'<text class="dc-count" x="{x + step / 2:.1f}" y="{baseline - tall - 5:.1f}" '
                f'text-anchor="middle">{_count(count)}</text>'
            )
    parts.append(f'<path class="dc-axis" d="M{left:.1f} {baseline + 0.5}H{width - left:.1f}" fill="none"/>')
    every = 1 if step >= 40 else 2
    for i, edge in enumerate(edges):
        if i % every == 0:
            x, label = left + i * step, _edge(edge, unit)
            parts.append(f'<text x="{x:.1f}" y="{baseline + 22}" text-anchor="middle">{label}</text>')
    place = _place(data["median"], edges)
    x = left + place * step
    parts.append(f'<path class="dc-median" d="M{x:.1f} {baseline + 1}l5 7h-10z"/>')
    label = f"{title}: {len(counts)} bars, median {data['median']:.3g}"
    box = f"0 0 {width} {baseline + 28}"
    return f'<svg class="dc-hist {kind}" viewBox="{box}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _place(value: float, edges: Sequence[float]) -> float:
    """Where `value` lies, in bars from the left."""
    for i in range(len(edges) - 1):
        if value <= edges[i + 1]:
            return i + (value - edges[i]) / (edges[i + 1] - edges[i])
    return len(edges) - 1


def _edge(value: float, unit: str) -> str:
    return f"{100 * value:g}%" if unit else f"{value:g}"


def _count(count: int) -> str:
    return f"{count:,}" if count < 10_000 else f"{count / 1000:,.0f}k"


def _size(num_bytes: int) -> str:
    value, units = float(num_bytes), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g}%"


def _share(count: int, whole: int) -> str:
    return _number(_percent(count / whole))


def _number(text: str) -> str:
    return f'<span class="dc-number">{text}</span>'
