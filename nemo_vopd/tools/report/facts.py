"""The report's tables of facts: the data set, dropped records, options and their differences, versions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import yaml

from nemo_vopd.tools.report.bars import histogram
from nemo_vopd.tools.report.numbers import DASH, as_float, fact, file_size, format_area, format_number, label
from nemo_vopd.tools.report.parts import Cell, Counts, Facts, Panel, Table
from nemo_vopd.tools.report.run_files import Run

_PREFIX = "dropped_by_reason/"
_COUNTED = ("kept", "with_answer", "with_box", "with_crop", "with_hint", "rotated", "flat")
_HISTOGRAMS = {
    "image_megapixels": ("Image size", "megapixels", "Median image, megapixels", format_number, "{:g}".format),
    "relative_box_area": (
        "Relative box area", "share of the image", "Median box, of the image", format_area, format_area,
    ),
}  # fmt: skip


def drops_section(run: Run) -> dict[str, Any]:
    """What was dropped, by reason, with examples; empty when nothing was."""
    counts: dict[str, float] = dict(run.drops.counts)
    if not counts:  # dropped.jsonl is missing; the metrics counted too
        columns = {key.removeprefix(_PREFIX): v for key, v in run.metrics.columns.items() if key.startswith(_PREFIX)}
        counts = {reason: float(np.nansum(values)) for reason, values in columns.items()}
    ranked = Counts.ranked(counts)
    examples = [(reason, found) for reason, _ in ranked.rows if (found := run.drops.examples.get(reason))]
    return {"counts": ranked, "examples": examples} if ranked.rows else {}


def data_section(card: dict[str, Any]) -> dict[str, Any]:
    """What recipes/prepare_data.py counted in the data set; empty without a card."""
    facts = [(label(key), fact(key, card[key])) for key in _COUNTED if key in card]
    if math.isfinite(size := as_float(card.get("bytes"))):
        facts.append(("Size", file_size(size)))
    facts += [(f"Split {name}", fact("", number)) for name, number in _of(card, "splits").items()]
    panels = []
    for key, (heading, x_label, median_name, as_text, edge_text) in _HISTOGRAMS.items():
        counted = _of(card, key)
        if math.isfinite(median := as_float(counted.get("median"))):
            facts.append((median_name, as_text(median)))
        edges, counts = counted.get("edges"), counted.get("counts")
        if isinstance(edges, list) and isinstance(counts, list):
            chart = histogram(edges, counts, label=f"{heading} of the records", x_label=x_label, as_text=edge_text)
            panels += [Panel(heading, chart)] if chart else []
    dropped = {str(reason): as_float(num) for reason, num in _of(card, "dropped").items()}
    options = {"crop": "Crop", "options": "Options of prepare_data.py"}
    tables = [Facts("Records", facts)] if facts else []
    asked = [
        Facts(name, [(str(option).replace("_", " "), fact("", value)) for option, value in _of(card, key).items()])
        for key, name in options.items()
        if _of(card, key)
    ]
    counts = Counts.ranked(dropped, "Dropped when it was prepared")
    shown = {"cards": tables, "panels": panels, "dropped": counts if counts.rows else None, "options": asked}
    shown["sources"] = _sources(card)
    return shown if any(shown.values()) else {}


def _of(card: dict[str, Any], key: str) -> dict[str, Any]:
    value = card.get(key)
    return value if isinstance(value, dict) else {}


def _sources(card: dict[str, Any]) -> Table | None:
    listed = card.get("sources")
    rows = []
    for one in listed if isinstance(listed, list) else []:
        if isinstance(one, dict):
            dropped = one.get("dropped")
            num = sum(as_float(n) for n in dropped.values()) if isinstance(dropped, dict) else as_float(dropped)
            name = str(one.get("path", "")) + (f" ({one['layout']})" if one.get("layout") else "")
            numbers = [as_float(one.get("kept")), num, as_float(one.get("weight"))]
            rows.append([name, *(format_number(n) if math.isfinite(n) else DASH for n in numbers)])
    return Table(["Source", "Kept", "Dropped", "Weight"], rows) if rows else None


def config_section(run: Run, other: Run | None) -> dict[str, Any]:
    """The configuration; with two runs the options that differ. Empty if it was not written."""
    texts = [
        (one.name, yaml.safe_dump(one.config, sort_keys=False, allow_unicode=True))
        for one in (run, other)
        if one is not None and one.config
    ]
    if len(texts) < 2 or other is None:
        return {"texts": texts, "differences": None, "same": False} if texts else {}
    ours, theirs = (dict(flat_options({**one.config, **_versions(one)})) for one in (run, other))
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    rows = [[Cell(key, code=True), *(_value(one, key) for one in (ours, theirs))] for key in keys]
    table = Table(["Option", run.name, other.name], rows, "Options that differ") if rows else None
    return {"texts": texts, "differences": table, "same": not rows}


def _versions(run: Run) -> dict[str, Any]:
    return {
        f"({key})": run.environment[key] for key in ("layout", "implementations", "versions") if key in run.environment
    }


def _value(options: dict[str, Any], key: str) -> Cell:
    return Cell(str(options[key]), code=True) if key in options else Cell(DASH)


def flat_options(options: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values, as they are typed."""
    for key, value in options.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from flat_options(value, f"{name}.")
        else:
            yield name, "null" if value is None else str(value).lower() if isinstance(value, bool) else value


def facts_section(run: Run) -> list[Facts]:
    """Summary, status, implementations and versions as tables."""
    summary = {**run.summary, **({"status": run.status} if run.status else {}), **run.environment}
    flat = [(label(str(key)), fact(str(key), value)) for key, value in summary.items() if not isinstance(value, dict)]
    tables = [Facts("Run", flat)] if flat else []
    for key, facts in summary.items():
        if isinstance(facts, dict) and facts:
            # Phases are seconds whatever their own names are.
            unit = " seconds" if "seconds" in str(key) or "phases" in str(key) else ""
            rows = [(str(name).replace("_", " "), fact(f"{name}{unit}", value)) for name, value in facts.items()]
            tables.append(Facts(label(str(key)), rows))
    return tables
