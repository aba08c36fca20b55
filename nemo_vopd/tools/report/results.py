"""Results of recipes/evaluate.py in the report: the gap by evidence size, and benchmarks against a baseline."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from nemo_vopd.tools.report.cards import legend
from nemo_vopd.tools.report.run_files import Results
from nemo_vopd.tools.report.svg import as_float, format_number, format_percent
from nemo_vopd.tools.report.svg_evidence import (
    accuracy_chart,
    area_text,
    gap_chart,
    interval_text,
    read_bins,
    same_sizes,
)
from nemo_vopd.tools.report.text import difference, label, number_note, numeric_table, points, signed

_NO_INTERVAL = (math.nan, math.nan)


@dataclass
class _Pair:
    """One benchmark of one result file, and its entry in the baseline's files (empty if there is none)."""

    source: str
    key: str
    entry: dict[str, Any]
    before: dict[str, Any]
    comparison: dict[str, Any]

    @property
    def title(self) -> str:
        """The benchmark's name, escaped, with its number of samples."""
        num = as_float(self.entry.get("num_samples"))
        notes = [f"{format_number(num)} samples"] if math.isfinite(num) else []
        return escape(self.name) + number_note(", ".join([*notes, *([self.source] if self.source else [])]))

    @property
    def name(self) -> str:
        """The benchmark's name."""
        title = self.entry.get("title")
        return str(title) if title else "The gap" if self.key == "gap" else self.key


def _pairs(results: list[Results], baseline: list[Results]) -> Iterator[_Pair]:
    for file in results:
        for key, entry in file.benchmarks.items():
            before = next((one.benchmarks[key] for one in baseline if key in one.benchmarks), {})
            source = file.name if len(results) > 1 else ""
            yield _Pair(source, key, entry, before, file.comparison.get(key, {}))


def _view(entry: dict[str, Any], view: str) -> tuple[float, tuple[float, float]]:
    """Accuracy of one view and its interval."""
    value = entry.get(view)
    if not isinstance(value, dict):
        return as_float(value), _NO_INTERVAL
    return as_float(value.get("accuracy")), _interval(value.get("interval"))


def _interval(value: object) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        return _NO_INTERVAL
    return as_float(value[0]), as_float(value[1])


def _gap(entry: dict[str, Any]) -> float:
    gap = as_float(entry.get("gap"))
    return gap if math.isfinite(gap) else _view(entry, "crop")[0] - _view(entry, "full")[0]


def _accuracy(entry: dict[str, Any]) -> float:
    """The benchmark's own number, else the accuracy of the full view."""
    own = as_float(entry.get("accuracy"))
    return own if math.isfinite(own) else _view(entry, "full")[0]


def _percent(value: float) -> str:
    return format_percent(value) if math.isfinite(value) else "\u2013"


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    return _percent(value) + number_note(interval_text(interval).strip())


def _change(value: float, interval: tuple[float, float] = _NO_INTERVAL) -> str:
    if not math.isfinite(value):
        return "\u2013"
    return difference(value, signed(100 * value, 1)) + number_note(interval_text(interval).strip())


def evidence_section(results: list[Results], baseline: list[Results]) -> str:
    """Accuracy and gap by relative evidence area, one block for each benchmark that has it; empty without any."""
    blocks = []
    for pair in _pairs(results, baseline):
        bins = read_bins(pair.entry.get("by_evidence_size"))
        before = same_sizes(bins, read_bins(pair.before.get("by_evidence_size")))
        charts = [chart for chart in (accuracy_chart(bins, before), gap_chart(bins, before)) if chart] if bins else []
        if not charts:
            continue
        source = f" ({pair.source})" if pair.source else ""
        views = legend([("full view", "var(--full)"), ("crop view", "var(--crop)")], "before" if before else "")
        gaps = legend([("gap", "var(--c3)")], "before" if before else "")
        cards = [f'<figure class="card">{c}{n}</figure>' for c, n in zip(charts, (views, gaps), strict=False)]
        rows = [
            [
                f"{area_text(one.low)} to {area_text(one.high)}",
                format_number(one.num_samples),
                _with_interval(one.full, one.full_interval),
                _with_interval(one.crop, one.crop_interval),
                points(one.gap),
            ]
            for one in bins
        ]
        table = numeric_table(["Evidence, of the image", "Samples", "Full view", "Crop view", "Gap, points"], rows)
        blocks.append(
            f'<h3>{escape(pair.name + source)}</h3><div class="pairs">{"".join(cards)}</div>'
            f"<details><summary>Numbers of each bin</summary>{table}</details>"
        )
    if not blocks:
        return ""
    return (
        '<p class="note">The smaller the evidence, the more a crop helps. Whiskers are 95% intervals; n is the number '
        f'of samples in a bin.</p><div class="stacked">{"".join(blocks)}</div>'
    )


def benchmarks_section(results: list[Results], baseline: list[Results]) -> str:
    """Every benchmark against the baseline, both views, and its categories; empty without results."""
    pairs = list(_pairs(results, baseline))
    if not pairs:
        return ""
    parts = [_accuracy_table(pairs)]
    if any(math.isfinite(_view(pair.entry, "crop")[0]) for pair in pairs):
        parts.append(_views_table(pairs))
    details = "".join(_details(pair) for pair in pairs)
    models = ", ".join(dict.fromkeys(str(file.data["model"]) for file in results if file.data.get("model")))
    note = f'<p class="note">Model: {escape(models)}. Intervals hold 95%.</p>' if models else ""
    return f'{note}<div class="pairs">{"".join(parts)}</div>{details}'


def _accuracy_table(pairs: list[_Pair]) -> str:
    compared = any(pair.before or pair.comparison for pair in pairs)
    rows = []
    for pair in pairs:
        now, before = _accuracy(pair.entry), _accuracy(pair.before)
        change = as_float(pair.comparison.get("difference"))
        if not math.isfinite(before):
            before = now - change
        row = [pair.title, _percent(now)]
        if compared:
            change = change if math.isfinite(change) else now - before
            row += [_percent(before), _change(change, _interval(pair.comparison.get("interval")))]
        rows.append(row)
    heads = ["Benchmark", "Accuracy", *(["Baseline", "Difference, points"] if compared else [])]
    return numeric_table(heads, rows, "Each benchmark's own accuracy")


def _views_table(pairs: list[_Pair]) -> str:
    rows = []
    with_before = any(math.isfinite(_gap(pair.before)) for pair in pairs)
    for pair in pairs:
        (full, full_interval), (crop, crop_interval) = (_view(pair.entry, view) for view in ("full", "crop"))
        if math.isfinite(crop):
            row = [pair.title, _with_interval(full, full_interval), _with_interval(crop, crop_interval)]
            row.append(points(_gap(pair.entry)))
            rows.append([*row, points(_gap(pair.before)) if pair.before else "\u2013"] if with_before else row)
    heads = ["Benchmark", "Full view", "Crop view", "Gap, points", *(["Gap before"] if with_before else [])]
    return numeric_table(heads, rows, "Full view and crop view")


def _details(pair: _Pair) -> str:
    """Categories and further metrics of one benchmark, folded."""
    categories = pair.entry.get("categories")
    before = pair.before.get("categories")
    old = before if isinstance(before, dict) else {}
    entries = {k: v for k, v in categories.items() if isinstance(v, dict)} if isinstance(categories, dict) else {}
    parts = []
    if entries:
        parts.append(_categories_table(entries, old))
    metrics = pair.entry.get("metrics")
    if isinstance(metrics, dict) and metrics:
        rows = [[escape(label(str(name))), format_number(as_float(value))] for name, value in metrics.items()]
        parts.append(numeric_table(["Metric", "Value"], rows))
    if not parts:
        return ""
    source = f" ({pair.source})" if pair.source else ""
    summary = f"<summary>{escape(pair.name + source)} in detail</summary>"
    return f'<details>{summary}<div class="pairs">{"".join(parts)}</div></details>'


def _categories_table(entries: dict[str, dict[str, Any]], before: dict[str, Any]) -> str:
    crop = any(math.isfinite(as_float(entry.get("crop"))) for entry in entries.values())
    rows = []
    for name, entry in entries.items():
        num, full = as_float(entry.get("num_samples")), as_float(entry.get("full"))
        note = number_note(f"{format_number(num)} samples") if math.isfinite(num) else ""
        row = [escape(str(name)) + note, _percent(full)]
        row += [_percent(as_float(entry.get("crop")))] if crop else []
        if before:
            old = before.get(name)
            row.append(_change(full - as_float(old.get("full") if isinstance(old, dict) else None)))
        rows.append(row)
    heads = ["Category", "Full view", *(["Crop view"] if crop else []), *(["Full view, change"] if before else [])]
    return numeric_table(heads, rows)
