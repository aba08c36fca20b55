"""Results of recipes/evaluate.py in the report: the gap by evidence size, and benchmarks against a baseline."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_vopd.tools.report.bars import columns_chart, intervals_chart
from nemo_vopd.tools.report.charts import Spec
from nemo_vopd.tools.report.numbers import (
    DASH,
    MINUS,
    NAN,
    Interval,
    as_float,
    as_interval,
    format_area,
    format_interval,
    format_number,
    format_percent,
    label,
    points,
    signed,
)
from nemo_vopd.tools.report.parts import Cell, Legend, Names, Panel, Table
from nemo_vopd.tools.report.run_files import Results

_NO_INTERVAL = (NAN, NAN)
_VIEWS = ("full", "crop")


@dataclass
class EvidenceBin:
    """Accuracies over the samples whose evidence covers [low, high) of the image; NaN where one is not known."""

    low: float
    high: float
    num_samples: float
    full: float
    full_interval: Interval
    crop: float
    crop_interval: Interval

    @property
    def gap(self) -> float:
        """Crop-view accuracy less full-view accuracy."""
        return self.crop - self.full

    @property
    def name(self) -> str:
        """What the bin covers."""
        return f"{format_area(self.low)} to {format_area(self.high)}"


def read_bins(rows: object) -> list[EvidenceBin]:
    """The bins of a results file whose size is known, the smallest first; open ends get a finite one."""
    bins = []
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict):
            full, crop = (as_interval(row.get(f"{view}_interval")) for view in _VIEWS)
            low, high, num = (as_float(row.get(key)) for key in ("low", "high", "num_samples"))
            bins.append(EvidenceBin(low, high, num, as_float(row.get("full")), full, as_float(row.get("crop")), crop))
    bins = [one for one in bins if one.low > 0 or one.high > 0]
    borders = [edge for one in bins for edge in (one.low, one.high) if edge > 0]
    for one in bins:
        one.low = one.low if one.low > 0 else min(borders, default=NAN) / 4
        one.high = one.high if math.isfinite(one.high) else max(borders, default=NAN) * 4
    return sorted((one for one in bins if 0 < one.low <= one.high), key=lambda one: (one.low, one.high))


def same_sizes(bins: list[EvidenceBin], others: list[EvidenceBin]) -> list[EvidenceBin]:
    """`others` if they are of the same sizes as `bins`, else none: the two were measured on different samples."""
    same = len(bins) == len(others) and all(
        math.isclose(a.low, b.low) and math.isclose(a.high, b.high) for a, b in zip(bins, others, strict=True)
    )
    return others if same else []


@dataclass
class _Pair:
    """One benchmark of one result file, and its entry in the baseline's files (empty if there is none)."""

    source: str
    key: str
    entry: dict[str, Any]
    before: dict[str, Any]
    comparison: dict[str, Any]

    @property
    def title(self) -> Cell:
        """The benchmark's name, with its number of samples."""
        num = as_float(self.entry.get("num_samples"))
        notes = [f"{format_number(num)} samples"] if math.isfinite(num) else []
        return Cell(self.name, ", ".join([*notes, *([self.source] if self.source else [])]))

    @property
    def name(self) -> str:
        """The benchmark's name."""
        title = self.entry.get("title")
        return str(title) if title else "The gap" if self.key == "gap" else self.key

    @property
    def heading(self) -> str:
        """The benchmark's name, with its file where there are several."""
        return f"{self.name} ({self.source})" if self.source else self.name


def _pairs(results: list[Results], baseline: list[Results]) -> Iterator[_Pair]:
    for file in results:
        for key, entry in file.benchmarks.items():
            before = next((one.benchmarks[key] for one in baseline if key in one.benchmarks), {})
            source = file.name if len(results) > 1 else ""
            yield _Pair(source, key, entry, before, file.comparison.get(key, {}))


def _view(entry: dict[str, Any], view: str) -> tuple[float, Interval]:
    """Accuracy of one view and its interval."""
    value = entry.get(view)
    if not isinstance(value, dict):
        return as_float(value), _NO_INTERVAL
    return as_float(value.get("accuracy")), as_interval(value.get("interval"))


def _gap(entry: dict[str, Any]) -> float:
    gap = as_float(entry.get("gap"))
    return gap if math.isfinite(gap) else _view(entry, "crop")[0] - _view(entry, "full")[0]


def _accuracy(entry: dict[str, Any]) -> float:
    """The benchmark's own number, else the accuracy of the full view."""
    own = as_float(entry.get("accuracy"))
    return own if math.isfinite(own) else _view(entry, "full")[0]


def _percent(value: float, interval: Interval = _NO_INTERVAL) -> Cell:
    return Cell(format_percent(value) if math.isfinite(value) else DASH, format_interval(interval))


def _change(value: float, interval: Interval = _NO_INTERVAL) -> Cell:
    if not math.isfinite(value):
        return Cell(DASH)
    kind = "plus" if value > 5e-4 else "minus" if value < -5e-4 else ""
    return Cell(signed(100 * value, 1), format_interval(interval), kind)


def evidence_section(results: list[Results], baseline: list[Results], names: Names) -> list[dict[str, Any]]:
    """Accuracy and gap by relative evidence area, one block for each benchmark that has it."""
    blocks = []
    for pair in _pairs(results, baseline):
        bins = read_bins(pair.entry.get("by_evidence_size"))
        before = same_sizes(bins, read_bins(pair.before.get("by_evidence_size")))
        panels = evidence_panels(bins, before, names)
        captions = names if before else ("", "")
        tables = [_bins_table(one, caption) for one, caption in zip((bins, before), captions, strict=True) if one]
        if panels:
            blocks.append({"heading": pair.heading, "panels": panels, "tables": tables})
    return blocks


def _bins_table(bins: list[EvidenceBin], caption: str) -> Table:
    rows: list[list[Cell | str]] = []
    for one in bins:
        accuracies = [_percent(one.full, one.full_interval), _percent(one.crop, one.crop_interval)]
        rows.append([one.name, format_number(one.num_samples), *accuracies, points(one.gap)])
    return Table(["Evidence, of the image", "Samples", "Full view", "Crop view", "Gap, points"], rows, caption)


def evidence_panels(bins: list[EvidenceBin], before: list[EvidenceBin], run_names: Names) -> list[Panel]:
    """Charts of accuracy and gap of each bin; `before` (of the same sizes, or none) hollow and dashed."""
    # bins of one size are told apart by their number
    names = [f"{one.name}\nn = {format_number(one.num_samples)}" for one in bins]
    names = [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]
    samples = ("samples", [format_number(one.num_samples) for one in bins])
    now, then = (f", {name}" for name in run_names) if before else ("", "")
    solid, dashed = run_names if before else ("", "")
    panels, title = [], "relative evidence area"
    if any(math.isfinite(value) for one in bins for value in (one.full, one.crop)):
        curves: dict[str, list[Spec]] = {}
        texts = []
        for view in _VIEWS:
            curves[view] = [_bar(getattr(one, view), getattr(one, f"{view}_interval")) for one in bins]
            texts.append((f"{view} view{now}", [" ".join(filter(None, _text(one, view))) for one in bins]))
            if before:
                curves[f"{view} before"] = [
                    _bar(getattr(one, view), getattr(one, f"{view}_interval")) for one in before
                ]
                texts.append((f"{view} view{then}", [format_percent(getattr(one, view)) for one in before]))
        name = "Accuracy of both views by relative evidence area"
        chart = intervals_chart(names, curves, [*texts, samples], label=name, title=title)
        views = [("full view", "var(--full)"), ("crop view", "var(--crop)")]
        panels.append(Panel("", chart, legend=Legend(views, solid, dashed)))
    if any(math.isfinite(one.gap) for one in bins):
        texts = [(f"gap{now}", [f"{points(one.gap)} points" for one in bins])]
        if before:
            texts.append((f"gap{then}", [f"{points(one.gap)} points" for one in before]))
        gaps = [[100 * one.gap for one in group] for group in (bins, before)]
        words = {"label": "The gap by relative evidence area", "title": title, "y_label": "gap, points"}
        chart = columns_chart(names, gaps[0], gaps[1], [*texts, samples], **words)
        panels.append(Panel("", chart, legend=Legend([("gap", "var(--c3)")], solid, dashed)))
    return panels


def _text(one: EvidenceBin, view: str) -> tuple[str, str]:
    return format_percent(getattr(one, view)), format_interval(getattr(one, f"{view}_interval"))


def _bar(value: float, interval: Interval) -> Spec:
    """What the chart draws; JSON has no NaN."""
    numbers = zip(("y", "low", "high"), (value, *interval), strict=True)
    return {name: min(max(number, 0.0), 1.0) if math.isfinite(number) else None for name, number in numbers}


def benchmarks_section(results: list[Results], baseline: list[Results], names: Names) -> dict[str, Any]:
    """Every benchmark against the baseline, both views, and its categories; empty without results."""
    pairs = list(_pairs(results, baseline))
    if not pairs:
        return {}
    tables = [_accuracy_table(pairs, names)]
    if any(math.isfinite(_view(pair.entry, "crop")[0]) for pair in pairs):
        tables.append(_views_table(pairs, names))
    details = [(pair.heading, found) for pair in pairs if (found := _details(pair, names))]
    models = ", ".join(dict.fromkeys(str(file.data["model"]) for file in results if file.data.get("model")))
    return {"models": models, "tables": tables, "details": details}


def _accuracy_table(pairs: list[_Pair], names: Names) -> Table:
    compared = any(pair.before or pair.comparison for pair in pairs)
    files = {Path(str(pair.comparison["baseline"])).stem for pair in pairs if "baseline" in pair.comparison}
    then = names[1] or ", ".join(sorted(files)) or "Baseline"
    rows = []
    for pair in pairs:
        now, before = _accuracy(pair.entry), _accuracy(pair.before)
        change = as_float(pair.comparison.get("difference"))
        if not math.isfinite(before):
            before = now - change
        row = [pair.title, _percent(now)]
        if compared:
            change = change if math.isfinite(change) else now - before
            row += [_percent(before), _change(change, as_interval(pair.comparison.get("interval")))]
        rows.append(row)
    if not compared:
        return Table(["Benchmark", "Accuracy"], rows, "Each benchmark's own accuracy")
    caption = f"Each benchmark's own accuracy. Difference: {names[0]} {MINUS} {then}"
    return Table(["Benchmark", names[0], then, "Difference, points"], rows, caption)


def _views_table(pairs: list[_Pair], names: Names) -> Table:
    rows = []
    with_before = any(math.isfinite(_gap(pair.before)) for pair in pairs)
    for pair in pairs:
        views = [_view(pair.entry, view) for view in _VIEWS]
        if math.isfinite(views[1][0]):
            row = [pair.title, *(_percent(*view) for view in views), points(_gap(pair.entry))]
            rows.append([*row, points(_gap(pair.before)) if pair.before else DASH] if with_before else row)
    heads = ["Benchmark", "Full view", "Crop view", "Gap, points"]
    if not with_before:
        return Table(heads, rows, "Full view and crop view")
    caption = f"Full view, crop view and gap of {names[0]}, beside the gap of {names[1]}"
    return Table([*heads, f"Gap of {names[1]}"], rows, caption)


def _details(pair: _Pair, names: Names) -> list[Table]:
    """Categories and further metrics of one benchmark."""
    categories, before, metrics = (
        one if isinstance(one, dict) else {}
        for one in (pair.entry.get("categories"), pair.before.get("categories"), pair.entry.get("metrics"))
    )
    entries = {str(name): entry for name, entry in categories.items() if isinstance(entry, dict)}
    tables = [_categories_table(entries, before, names)] if entries else []
    rows = [[label(str(name)), format_number(as_float(value))] for name, value in metrics.items()]
    return [*tables, Table(["Metric", "Value"], rows)] if rows else tables


def _categories_table(entries: dict[str, dict[str, Any]], before: dict[str, Any], names: Names) -> Table:
    crop = any(math.isfinite(as_float(entry.get("crop"))) for entry in entries.values())
    rows = []
    for name, entry in entries.items():
        num, full = as_float(entry.get("num_samples")), as_float(entry.get("full"))
        row = [Cell(name, f"{format_number(num)} samples" if math.isfinite(num) else ""), _percent(full)]
        row += [_percent(as_float(entry.get("crop")))] if crop else []
        if before:
            old = before.get(name)
            row.append(_change(full - as_float(old.get("full") if isinstance(old, dict) else None)))
        rows.append(row)
    heads = ["Category", "Full view", *(["Crop view"] if crop else [])]
    if not before:
        return Table(heads, rows)
    return Table([*heads, "Difference of full view"], rows, f"{names[0]}; difference: {names[0]} {MINUS} {names[1]}")
