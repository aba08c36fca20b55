"""Bars and bands as Vega-Lite specifications: histograms, evidence sizes, accuracy before and after."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nemo_vopd.tools.report.charts import PAGE_COLOURS, STROKES, Spec, frame, number, table, ticks
from nemo_vopd.tools.report.numbers import INFINITE, as_float, format_number, format_percent, points


def _bands(names: list[str], title: str, **axis: Any) -> Spec:
    """The axis of places side by side, whose labels may have several lines."""
    lines = {"labelExpr": "split(datum.label, '\\n')", "labelAngle": 0, "labelOverlap": True}
    return {"field": "band", "type": "nominal", "sort": names, "axis": {"title": title, **lines, **axis}}


def _band_reader(bands: Spec, names: list[str], place_name: str, texts: list[tuple[str, list[str]]]) -> Spec:
    """An invisible bar over each band, with a tooltip."""
    rows = table(
        band=names, at=[name.split("\n")[0] for name in names], **{f"t{i}": t for i, (_, t) in enumerate(texts)}
    )
    tooltip = [{"field": f"t{i}", "title": name} for i, (name, _) in enumerate(texts)]
    return {
        "data": {"values": rows},
        "mark": {"type": "bar", "opacity": 0},
        "encoding": {
            "x": bands,
            "y": {"value": 0},
            "y2": {"value": "height"},
            "tooltip": [{"field": "at", "title": place_name}, *tooltip],
        },
    }


def histogram(edges: list, counts: list, *, label: str, x_label: str, as_text=format_number) -> Spec | None:
    """Counts between neighbouring `edges`, each bar as wide as the others; None if they do not fit."""
    numbers, borders = [as_float(count) for count in counts], [as_float(edge) for edge in edges]
    numbers = [max(number, 0.0) if math.isfinite(number) else 0.0 for number in numbers]
    if len(borders) != len(numbers) + 1 or not any(numbers):
        return None
    texts = [as_text(edge) if math.isfinite(edge) else INFINITE for edge in borders]
    names = [f"{low} to {high}" for low, high in zip(texts, texts[1:], strict=False)]
    names = [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]
    # a label stands at the lower edge of its bar
    at_edges = {"bandPosition": 0, "labelExpr": "split(datum.label, ' to ')[0]", "labelFlush": False}
    bands = _bands(names, x_label, **at_edges)
    axis = {"title": "records", "tickCount": 4, "tickMinStep": 1, **ticks(np.array(numbers))}
    y = {"field": "y", "type": "quantitative", "axis": axis}
    bars = {"mark": {"type": "bar", "color": "var(--c3)"}, "encoding": {"x": bands, "y": y}}
    reader = _band_reader(bands, names, x_label, [("records", [format_number(number) for number in numbers])])
    return frame([bars, reader], label, 150, data={"values": table(band=names, y=numbers)})


def intervals_chart(
    names: list[str], curves: dict[str, list[Spec]], texts: list[tuple[str, list[str]]], *, label: str, title: str
) -> Spec:
    """Accuracies of each band with their intervals: filled dots for `full` and `crop`, hollow ones for those before.

    `curves` maps `full`, `crop`, `full before`, `crop before` to rows of `y`, `low` and `high`, one for each name.
    """
    rows = [
        {"band": name, "curve": curve, **row}
        for curve, column in curves.items()
        for name, row in zip(names, column, strict=True)
    ]
    bands = _bands(names, title)
    colours = {"domain": list(curves), "range": [f"var(--{curve.split()[0]})" for curve in curves]}
    encoding = {
        "x": bands,
        "xOffset": {"field": "curve", "sort": sorted(curves, key=lambda name: (" " not in name, name != "full"))},
        "y": {"field": "y", "type": "quantitative", "scale": {"domain": [0, 1], "clamp": True}}
        | {"axis": {"title": "accuracy", "format": "%", "tickCount": 5}},
        "color": {"field": "curve", "scale": colours, "legend": None},
    }
    whiskers = {"mark": {"type": "rule", "strokeWidth": 1.3, "opacity": 0.75}}
    whiskers["encoding"] = encoding | {"y": encoding["y"] | {"field": "low"}, "y2": {"field": "high"}}
    layers = [whiskers]
    for before in (True, False):
        chosen = {"transform": [{"filter": f"{'' if before else '!'}test(/before/, datum.curve)"}]}
        line = {"type": "line", **STROKES["other" if before else "trend"]}
        dot = {"type": "point", "size": 45, "opacity": 1, "filled": not before, "strokeWidth": 1.6}
        layers += [{**chosen, "mark": line, "encoding": encoding}, {**chosen, "mark": dot, "encoding": encoding}]
    return frame([*layers, _band_reader(bands, names, "evidence", texts)], label, 210, data={"values": rows})


def columns_chart(
    names: list[str], now: list[float], before: list[float], texts: list[tuple[str, list[str]]], **words: str
) -> Spec:
    """Columns of each band, hollow ones beside them for `before`; `words` are label, title and y_label."""
    groups = {"before": before, "now": now} if before else {"now": now}
    rows = [
        {"band": name, "when": when, "y": number(value)}
        for when, column in groups.items()
        for name, value in zip(names, column, strict=True)
    ]
    bands = _bands(names, words["title"])
    y = {"field": "y", "type": "quantitative", "axis": {"title": words["y_label"], "tickCount": 5}}
    encoding = {"x": bands, "xOffset": {"field": "when", "sort": list(groups)}, "y": y}
    marks: dict[str, Spec] = {
        "now": {"type": "bar", "color": "var(--c3)"},
        "before": {"type": "bar", "filled": False, "stroke": "var(--c3)", "strokeWidth": 1.4, "strokeDash": [3, 2]},
    }
    layers = [
        {"transform": [{"filter": f"datum.when == '{when}'"}], "mark": marks[when], "encoding": encoding}
        for when in groups
    ]
    reader = _band_reader(bands, names, "evidence", texts)
    return frame([*layers, reader], words["label"], 210, data={"values": rows})


def gap_bars(
    accuracies: dict[str, tuple[float, float]], name: str, colours: dict[str, str] = PAGE_COLOURS, **more: Any
) -> Spec:
    """Bars of (full, crop) accuracy for each moment, with the gap between them marked in points."""
    rows, gaps = [], []
    for moment, pair in accuracies.items():
        for view, value in zip(("full view", "crop view"), pair, strict=True):
            text = format_percent(value)
            rows.append({"moment": moment, "slot": view, "y": number(min(max(value, 0.0), 1.0)), "text": text})
        full, crop = pair
        if math.isfinite(crop - full):
            text = f"gap\n{points(crop - full)}\npoints"
            gaps.append({"moment": moment, "slot": "gap", "y": number(full), "y2": number(crop), "text": text})
    slots = ["full view", "crop view", "gap"]
    bold = {"labelColor": colours["ink"], "labelFontSize": 13, "labelFontWeight": "bold", "labelAngle": 0}
    place = {
        "x": {"field": "moment", "type": "nominal", "sort": list(accuracies), "axis": {"title": None, **bold}}
        | {"scale": {"paddingInner": 0.25}},
        "xOffset": {"field": "slot", "scale": {"domain": slots}},
        "y": {"field": "y", "type": "quantitative", "scale": {"domain": [0, 1]}}
        | {"axis": {"title": None, "format": "%", "tickCount": 5, "labelFontSize": 12}},
    }
    colour = {"field": "slot", "scale": {"domain": slots[:2], "range": [colours["full"], colours["crop"]]}}
    line = {"color": colours["ink"], "strokeWidth": 1.5}
    end = {"type": "tick", "orient": "horizontal", "size": 14, "thickness": 1.5, "color": colours["ink"]}
    beside = {"type": "text", "fontSize": 11, "align": "left", "dx": 8, "lineBreak": "\n", "baseline": "middle"}
    ends = [{"mark": end, "encoding": place | {"y": place["y"] | {"field": field}}} for field in ("y", "y2")]
    middle = {"transform": [{"calculate": "clamp((datum.y + datum.y2) / 2, 0.12, 0.9)", "as": "middle"}]}
    text = {"field": "text", "type": "nominal"}
    bars = {"mark": {"type": "bar"}, "encoding": place | {"color": colour}}
    above = {"type": "text", "dy": -7, "fontSize": 13, "fontWeight": 600}
    layers = [
        {"layer": [bars, {"mark": above, "encoding": place | {"text": text}}], "data": {"values": rows}},
        {
            "layer": [
                {"mark": {"type": "rule", **line}, "encoding": place | {"y2": {"field": "y2"}}},
                *ends,
                {"mark": beside, "encoding": place | {"y": place["y"] | {"field": "middle"}, "text": text}, **middle},
            ],
            "data": {"values": gaps},
        },
    ]
    return frame(layers, name, 250, colours, **more)
