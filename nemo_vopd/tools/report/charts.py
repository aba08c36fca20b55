"""Charts as Vega-Lite specifications, drawn by the page itself or as an SVG file.

The page brings Vega along (`vega_bundle`) and gives colours as CSS variables, which follow the reader's light or dark
scheme. Every chart reads its values under the pointer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_vopd.tools.report.numbers import NAN, format_number, format_percent

Spec = dict[str, Any]
MAX_BINS = 240
"""Points that a curve keeps at most: more would not show in a panel of 360 px."""
_MAX_BARS = 60
PAGE_COLOURS = {name: f"var(--{name})" for name in ("ink", "muted", "line", "full", "crop", "card")}
PRINT_COLOURS = {
    "ink": "#1c2128", "muted": "#565f6b", "line": "#d9d7d2", "full": "#0b67a8", "crop": "#c65d00", "card": "#ffffff",
}  # fmt: skip
_FONT = "system-ui, -apple-system, Segoe UI, sans-serif"
STROKES: dict[str, Spec] = {
    "raw": {"strokeWidth": 1, "opacity": 0.3},
    "trend": {"strokeWidth": 2},
    "other": {"strokeWidth": 1.3, "strokeDash": [5, 3]},
}


@dataclass
class Series:
    """One curve: `y` over `x` (steps), in a CSS colour."""

    name: str
    colour: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    dashed: bool = False
    """Whether it belongs to the run to compare with: such a curve is thin, and without its raw values."""


@functools.cache
def vega_bundle() -> str:
    """The JavaScript of Vega, Vega-Lite and vegaEmbed, which takes two seconds to make."""
    import vl_convert  # a large library that only a written page needs

    return vl_convert.javascript_bundle()  # type: ignore[call-arg]


def as_svg(spec: Spec) -> str:
    """The chart as the text of an SVG file."""
    import vl_convert

    return vl_convert.vegalite_to_svg(spec, show_warnings=False)


def frame(layers: list[Spec], name: str, height: int, colours: dict[str, str] = PAGE_COLOURS, **more: Any) -> Spec:
    """A chart called `name`, as wide as its place and `height` pixels high; `more` are properties of its top level."""
    quiet = {"labelColor": colours["muted"], "titleColor": colours["muted"]}
    axis = quiet | {"gridColor": colours["line"], "domainColor": colours["muted"], "ticks": False, "labelPadding": 6}
    config = {
        "font": _FONT,
        "view": {"stroke": None},
        "axis": axis | {"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal"},
        "axisX": {"grid": False},
        "axisY": {"domain": False, "titleAngle": 0, "titleAlign": "left", "titleAnchor": "start", "titleY": -10}
        | {"titleX": -30},
        "line": {"strokeCap": "round", "strokeJoin": "round"},
        "legend": quiet | {"orient": "bottom", "title": None, "labelFontSize": 12},
        "text": {"color": colours["ink"]},
    }
    frame = {"width": "container", "height": height, "background": "transparent", "padding": 2}
    return {"description": name, **frame, "layer": layers, "config": config, **more}


def number(value: float) -> float | None:
    """`value` in as many digits as a chart can show; None for a hole."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def ticks(values: np.ndarray) -> Spec:
    """How d3 writes the ticks of an axis over `values`, if not as it does by itself."""
    largest = np.abs(values).max(initial=0.0)
    shape = "~e" if largest < 1e-3 or largest >= 1e15 else "~s" if largest >= 1e4 else ""
    return {"format": shape} if shape else {}


def _steps(x_label: str, steps: np.ndarray) -> Spec:
    """The axis of steps: a tick between two of them means nothing."""
    axis = {"title": x_label, "tickMinStep": 1, "tickCount": 5, "labelFlush": True, **ticks(steps)}
    return {"field": "x", "type": "quantitative", "scale": {"nice": False, "zero": False}, "axis": axis}


def table(**columns: Any) -> list[Spec]:
    """The rows of a table of equally long columns."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _cursor(x: Spec, places: Sequence[float], texts: list[tuple[str, list[str]]]) -> Spec:
    """A rule at the step nearest to the pointer, and a tooltip with the text of each curve there."""
    nearest = {"type": "point", "on": "pointermove", "clear": "pointerout", "nearest": True, "encodings": ["x"]}
    return {
        "data": {"values": table(step=places, **dict(texts))},
        "params": [{"name": "at", "select": nearest}],
        # the whole row: of single fields Vega-Lite loses those of words when it looks for the nearest
        "mark": {"type": "rule", "color": PAGE_COLOURS["ink"], "strokeDash": [2, 3], "tooltip": {"content": "data"}},
        "encoding": {
            "x": x | {"field": "step"},
            "opacity": {"condition": {"param": "at", "empty": False, "value": 1}, "value": 0},
        },
    }


def bins_of(num_points: int, most: int = MAX_BINS) -> list[np.ndarray]:
    """The indices 0 .. num_points - 1 in at most `most` runs of about equal length."""
    return np.array_split(np.arange(num_points), min(num_points, most))


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean of `values` [N] that leaves out NaN; the window shrinks at both ends."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    index = np.arange(len(values))
    low, high = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), NAN)


def _envelope(values: np.ndarray, most: int) -> list[int]:
    """Indices of the smallest and largest value of each bin: a thinned curve that keeps its spikes."""
    kept: list[int] = []
    for index in bins_of(len(values), most):
        known = index[np.isfinite(values[index])]
        found = {int(known[values[known].argmin()]), int(known[values[known].argmax()])} if len(known) else {index[0]}
        kept += sorted(int(i) for i in found)
    return kept


def line_chart(
    series: list[Series],
    *,
    label: str,
    y_label: str,
    allow_log: bool = False,
    percent: bool = False,
    exact: bool = False,
    shade_between: bool = False,
    height: int = 150,
) -> Spec | None:
    """Curves over steps: each raw value faint, the moving mean on top; None if nothing is finite.

    `allow_log` takes a logarithmic axis if the values span more than a factor of 50. `exact` draws the values as
    they are: for what is scheduled, not measured. `shade_between` does so too, marks each point, and fills the area
    between the first two series: for a few evaluations.
    """
    curves = [(one, np.array(one.x, dtype=float), np.array(one.y, dtype=float)) for one in series]
    values = np.concatenate([y[np.isfinite(y)] for _, _, y in curves]) if curves else np.array([])
    if not len(values):
        return None
    log = allow_log and values.min() > 0 and values.max() / values.min() > 50
    x = _steps("step", np.concatenate([x for _, x, _ in curves]))
    rows, shown = [], []
    for one, steps, y in curves:
        trend, kept = y, np.arange(len(y))
        if not (exact or shade_between) and len(y) > 40:
            if not one.dashed:
                rows += _points(one.name, "raw", steps, y, _envelope(y, MAX_BINS // 2))
            trend = smooth(y, max(5, len(y) // 30))
        if len(y) > MAX_BINS:
            kept = np.array([index[len(index) // 2] for index in bins_of(len(y))])
        rows += _points(one.name, "other" if one.dashed else "trend", steps, trend, kept)
        shown.append((one.name, steps[kept], trend[kept]))
    lines = {
        "x": x,
        "y": {"field": "y", "type": "quantitative", **_y_axis(values, y_label, log, percent)},
        "color": {"field": "curve", "scale": _colours(series), "legend": None},
    }
    layers = [_shade(curves[0][2], curves[1], x, lines["y"])] if shade_between and len(curves) > 1 else []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        points_too = {"point": {"filled": True, "size": 40}} if shade_between and kind == "trend" else {}
        mark = {"type": "line", **STROKES[kind], **points_too}
        layers.append({"transform": [{"filter": f"datum.kind == '{kind}'"}], "mark": mark, "encoding": lines})
    places, texts = readings(shown, format_percent if percent else format_number)
    return frame([*layers, _cursor(x, places, texts)], label, height, data={"values": rows})


def _points(curve: str, kind: str, x: np.ndarray, y: np.ndarray, kept: Sequence[int] | np.ndarray) -> list[Spec]:
    return [{"curve": curve, "kind": kind, "x": number(x[i]), "y": number(y[i])} for i in kept]


def _colours(series: list[Series]) -> Spec:
    return {"domain": [one.name for one in series], "range": [one.colour for one in series]}


def _y_axis(values: np.ndarray, y_label: str, log: bool, percent: bool) -> Spec:
    low, high = float(values.min()), float(values.max())
    # A quantity that comes near zero is read against zero.
    scale: Spec = {"type": "log"} if log else {"zero": 0 <= low <= 0.5 * high}
    scale["nice"] = not percent
    if low == high:
        pad = 0.05 * abs(high) or 1.0
        scale["domain"] = [low - pad, high + pad]
    axis: Spec = {"title": y_label + (", log scale" if log else ""), "tickCount": 4}
    axis |= {"format": "%"} if percent else ticks(values)
    if not log and not percent and (values == values.round()).all():
        axis["tickMinStep"] = 1
    return {"scale": scale, "axis": axis}


def _shade(low: np.ndarray, other: tuple[Series, np.ndarray, np.ndarray], x: Spec, y: Spec) -> Spec:
    """The area between two curves at the steps of the second one."""
    _, steps, high = other
    pairs = [(s, a, b) for s, a, b in zip(steps, low, high, strict=True) if math.isfinite(a) and math.isfinite(b)]
    rows = [{"x": number(s), "y": number(a), "y2": number(b)} for s, a, b in pairs]
    mark = {"type": "area", "color": PAGE_COLOURS["muted"], "opacity": 0.16}
    return {"data": {"values": rows}, "mark": mark, "encoding": {"x": x, "y": y, "y2": {"field": "y2"}}}


def readings(
    curves: list[tuple[str, np.ndarray, np.ndarray]], as_text: Callable[[float], str]
) -> tuple[list[float], list[tuple[str, list[str]]]]:
    """What the pointer reads: the steps of the longest curve, and the value of each curve at the nearest of its own."""
    grid = max((x for _, x, _ in curves), key=lambda x: (x[-1] - x[0], len(x)) if len(x) else (-1.0, 0))
    texts = []
    for name, x, y in curves:
        if len(x):
            nearest = np.searchsorted((x[1:] + x[:-1]) / 2, grid)
            reach = 1.5 * max(np.diff(x).max(initial=1.0), np.diff(grid).max(initial=1.0))
            known = np.abs(x[nearest] - grid) <= reach
            texts.append((name, [as_text(float(y[i])) if ok else "n/a" for i, ok in zip(nearest, known, strict=True)]))
    return grid.tolist(), texts


def stacked_chart(series: list[Series], *, label: str, y_label: str) -> Spec | None:
    """Parts of a whole over steps: means over equal runs of steps on top of each other; missing counts as nothing."""
    if not series or not len(series[0].x):
        return None
    steps = np.array(series[0].x, dtype=float)
    bins = bins_of(len(steps), _MAX_BARS)
    parts = np.array([[np.nan_to_num(np.array(one.y, dtype=float))[i].mean() for i in bins] for one in series])
    tops = parts.cumsum(axis=0)
    if tops.max() <= 0:
        return None
    edges = [*(float(steps[i[0]]) - 0.5 for i in bins), float(steps[-1]) + 0.5]
    rows = []
    for one, top, part in zip(series, tops, parts, strict=True):
        columns = edges[:-1], edges[1:], map(number, top - part), map(number, top)
        rows += [{"part": one.name, "x": a, "x2": b, "y": c, "y2": d} for a, b, c, d in zip(*columns, strict=True)]
    x = _steps("step", steps)
    bars = {
        "mark": {"type": "rect", "opacity": 0.85},
        "encoding": {
            "x": x,
            "x2": {"field": "x2"},
            "y": {"field": "y", "type": "quantitative", "axis": {"title": y_label, "tickCount": 4}},
            "y2": {"field": "y2"},
            "color": {"field": "part", "scale": _colours(series), "legend": None},
        },
    }
    texts = [(one.name, [f"{format_number(v)} s" for v in row]) for one, row in zip(series, parts, strict=True)]
    places = [float(steps[i[len(i) // 2]]) for i in bins]
    return frame([bars, _cursor(x, places, texts)], label, 150, data={"values": rows})
