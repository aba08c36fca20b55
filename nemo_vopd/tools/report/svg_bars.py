"""Bars as inline SVG text: time by phase, the before/after gap, histograms."""

from __future__ import annotations

import math
from html import escape

import numpy as np

from nemo_vopd.tools.report.svg import Frame, Series, as_float, bins_of, format_number, format_percent

PAGE_COLOURS = {name: f"var(--{name})" for name in ("ink", "muted", "line", "full", "crop")}
PRINT_COLOURS = {"ink": "#1c2128", "muted": "#565f6b", "line": "#d9d7d2", "full": "#0b67a8", "crop": "#c65d00"}


def stacked_chart(
    series: list[Series], *, label: str, y_label: str, x_label: str = "step", size: tuple[int, int] = (360, 200)
) -> str:
    """Parts of a whole over steps, means of equal runs of steps on top of each other; missing counts as nothing."""
    if not series or not len(series[0].x):
        return ""
    steps = np.array(series[0].x, dtype=float)
    bins = bins_of(len(steps), 60)
    parts_of = np.array([[np.nan_to_num(np.array(s.y, dtype=float))[i].mean() for i in bins] for s in series])
    tops = parts_of.cumsum(axis=0)
    if tops.max() <= 0:
        return ""
    edges = [*(float(steps[i[0]]) - 0.5 for i in bins), float(steps[-1]) + 0.5]
    frame = Frame(size, (edges[0], edges[-1]), (0.0, float(tops.max()) * 1.05))
    parts = frame.axes(x_label, y_label)
    for k, one in enumerate(series):
        lower = tops[k - 1] if k else np.zeros(len(bins))
        up = "".join(
            f"L{frame.x(a):.1f} {frame.y(t):.1f}L{frame.x(b):.1f} {frame.y(t):.1f}"
            for a, b, t in zip(edges, edges[1:], tops[k], strict=False)
        )
        down = "".join(
            f"L{frame.x(b):.1f} {frame.y(t):.1f}L{frame.x(a):.1f} {frame.y(t):.1f}"
            for a, b, t in reversed(list(zip(edges, edges[1:], lower, strict=False)))
        )
        parts.append(f'<path class="stack" d="M{up[1:]}{down}Z" style="fill:{one.colour}"/>')
    hover = {"x": [float(steps[i[len(i) // 2]]) for i in bins], "name": x_label}
    hover["rows"] = [[s.name, [f"{format_number(v)} s" for v in row]] for s, row in zip(series, parts_of, strict=True)]
    return frame.svg(parts, label, hover)


def gap_bars(accuracies: dict[str, tuple[float, float]], colours: dict[str, str], top: int = 24) -> str:
    """The inside of a 480 x 330 SVG: bars of (full, crop) accuracy for each moment, with the gap in brackets."""
    left, right, bottom = 44, 470, 274
    ink, muted, line = colours["ink"], colours["muted"], colours["line"]

    def y(value: float) -> float:
        return bottom - min(max(value, 0.0), 1.0) * (bottom - top)

    def text(x: float, baseline: float, content: str, fill: str, extra: str = "") -> str:
        return f'<text x="{x:.1f}" y="{baseline:.1f}" fill="{fill}" {extra}>{escape(content)}</text>'

    parts = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<path d="M{left} {y(value):.1f}H{right}" stroke="{muted if value == 0 else line}"/>')
        parts.append(text(left - 6, y(value) + 4, f"{100 * value:.0f}%", muted, 'text-anchor="end" font-size="12"'))
    middle = 'text-anchor="middle" font-size="13"'
    for group, (moment, (full, crop)) in enumerate(accuracies.items()):
        x = left + 18 + group * (right - left) / 2
        for i, (name, value) in enumerate((("full", full), ("crop", crop))):
            bar = x + i * 62
            if math.isfinite(value):
                rise = bottom - y(value)
                parts.append(
                    f'<rect x="{bar:.1f}" y="{y(value):.1f}" width="54" height="{rise:.1f}" fill="{colours[name]}"/>'
                )
            known = value if math.isfinite(value) else 0.0
            parts.append(text(bar + 27, y(known) - 6, format_percent(value), ink, f'{middle} font-weight="600"'))
            parts.append(text(bar + 27, bottom + 18, f"{name} view", muted, 'text-anchor="middle" font-size="12"'))
        parts.append(text(x + 58, bottom + 40, moment, ink, f'{middle} font-weight="600"'))
        if math.isfinite(full) and math.isfinite(crop):
            low, high, at = y(full), y(crop), x + 128
            # The full-view level, carried across the crop bar to the bracket.
            parts.append(f'<path d="M{x + 54:.1f} {low:.1f}H{at}" stroke="{ink}" stroke-dasharray="3 3" fill="none"/>')
            bracket = f"M{at - 7} {high:.1f}H{at}V{low:.1f}H{at - 7}"
            parts.append(f'<path d="{bracket}" stroke="{ink}" stroke-width="1.5" fill="none"/>')
            # Baselines 16 apart around the bracket's middle, kept between the top of the chart and the axis.
            centre = min(max((low + high) / 2, top + 14), bottom - 34)
            parts.append(text(at + 7, centre - 3, "gap", muted, 'font-size="12"'))
            parts.append(text(at + 7, centre + 13, format_number(100 * (crop - full), 1), ink, 'font-weight="700"'))
            parts.append(text(at + 7, centre + 28, "points", muted, 'font-size="12"'))
    return f'<g font-size="15" font-family="system-ui, -apple-system, Segoe UI, sans-serif">{"".join(parts)}</g>'


def histogram(
    edges: list, counts: list, *, label: str, x_label: str, as_text=format_number, size: tuple[int, int] = (360, 200)
) -> str:
    """Counts between neighbouring `edges`, each bar as wide as the others; an empty text if they do not fit."""
    numbers, borders = [as_float(count) for count in counts], [as_float(edge) for edge in edges]
    numbers = [max(number, 0.0) if math.isfinite(number) else 0.0 for number in numbers]
    if len(borders) != len(numbers) + 1 or not any(numbers):
        return ""
    names = [as_text(edge) if math.isfinite(edge) else "\u221e" for edge in borders]
    # as many labels as fit beside each other
    every = math.ceil(len(names) * (7 * max(map(len, names)) + 10) / (size[0] - 60))
    places = [(float(i), name) for i, name in enumerate(names) if i % every == 0]
    frame = Frame(size, (0.0, float(len(numbers))), (0.0, 1.08 * max(numbers)), whole=True, x_ticks=places)
    parts = frame.axes(x_label, "records")
    for i, number in enumerate(numbers):
        left, right, top = frame.x(i) + 0.75, frame.x(i + 1) - 0.75, frame.y(number)
        place = f'x="{left:.1f}" y="{top:.1f}" width="{max(right - left, 0.1):.1f}" height="{frame.bottom - top:.1f}"'
        parts.append(f'<rect class="column" {place}/>')
    between = [f"{low} to {high}" for low, high in zip(names, names[1:], strict=False)]
    readings = {"x": [i + 0.5 for i in range(len(numbers))], "labels": between, "name": x_label}
    readings["rows"] = [["records", [format_number(number) for number in numbers]]]
    return frame.svg(parts, label, readings)
