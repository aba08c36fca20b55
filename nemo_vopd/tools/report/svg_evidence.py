"""Charts over relative evidence size as inline SVG text: accuracies with their intervals, and the gap."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_vopd.tools.report.svg import Frame, as_float, format_number, format_percent, log_ticks

SIZE = (460, 290)
_ROOM_BELOW = 58
_LEAST_APART = 30
"""Pixels between the middles of two bins, so that their whiskers can be told apart."""
Interval = tuple[float, float]


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


def read_bins(rows: object) -> list[EvidenceBin]:
    """The bins of a results file that can be placed on a logarithmic axis, by size; open ends get a finite one."""
    bins = []
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict):
            full, crop = (_interval(row.get(f"{view}_interval")) for view in ("full", "crop"))
            low, high, num = (as_float(row.get(key)) for key in ("low", "high", "num_samples"))
            bins.append(EvidenceBin(low, high, num, as_float(row.get("full")), full, as_float(row.get("crop")), crop))
    bins = [one for one in bins if one.low > 0 or one.high > 0]
    borders = [edge for one in bins for edge in (one.low, one.high) if edge > 0]
    for one in bins:
        one.low = one.low if one.low > 0 else min(borders, default=math.nan) / 4
        one.high = one.high if math.isfinite(one.high) else max(borders, default=math.nan) * 4
    return sorted((one for one in bins if 0 < one.low <= one.high), key=lambda one: (one.low, one.high))


def _interval(value: object) -> Interval:
    pair = value if isinstance(value, list | tuple) and len(value) == 2 else (math.nan, math.nan)
    return as_float(pair[0]), as_float(pair[1])


def area_text(fraction: float) -> str:
    """A share of the image's area, without digits that say nothing."""
    return f"{fraction * 100:.3g}%" if math.isfinite(fraction) else "n/a"


class _Axis:
    """The axis that both charts share, with the number of samples below each bin.

    It is logarithmic in the area, unless bins would fall on top of each other: then they stand side by side.
    """

    def __init__(self, bins: list[EvidenceBin], y_range: tuple[float, float], percent: bool) -> None:
        logs = [(math.log10(one.low), math.log10(one.high)) for one in bins]
        middles = [(low + high) / 2 for low, high in logs]
        low, high = min(low for low, _ in logs), max(high for _, high in logs)
        apart = min((b - a for a, b in zip(middles, middles[1:], strict=False)), default=math.inf)
        self.bins, self.spans = bins, logs
        if apart <= (high - low) * _LEAST_APART / SIZE[0]:
            self.spans = [(i - 0.4, i + 0.4) for i in range(len(bins))]
            self.places, x_range = [float(i) for i in range(len(bins))], (-0.6, len(bins) - 0.4)
            # shares of a few bins fit under them; of many, each other one
            every = math.ceil(len(bins) / 7)
            ticks = [(float(i), area_text(one.high)) for i, one in enumerate(bins) if i % every == 0]
        else:
            pad = 0.06 * (high - low) or 0.5
            self.places, x_range = middles, (low - pad, high + pad)
            values = log_ticks(10 ** x_range[0], 10 ** x_range[1])
            ticks = [(math.log10(value), area_text(value)) for value in values]
        self.frame = Frame(SIZE, x_range, y_range, percent=percent, room_below=_ROOM_BELOW, x_ticks=ticks)

    def centres(self) -> list[float]:
        """The horizontal pixel of the middle of each bin."""
        return [self.frame.x(place) for place in self.places]

    def room(self) -> float:
        """Pixels between the two nearest bins."""
        centres = self.centres()
        return min((b - a for a, b in zip(centres, centres[1:], strict=False)), default=80.0)

    def parts(self, y_label: str) -> list[str]:
        """Axes, what each bin covers, and as many sample counts as have room."""
        frame = self.frame
        parts = frame.axes("relative evidence area", y_label)
        for low, high in self.spans:
            parts.append(f'<path class="covers" d="M{frame.x(low):.1f} {frame.bottom}H{frame.x(high):.1f}"/>')
        free = 0.0
        for i, (one, x) in enumerate(zip(self.bins, self.centres(), strict=True)):
            text = ("n = " if i == 0 else "") + format_number(one.num_samples)
            half = 3.1 * len(text)
            if x - half >= free:
                parts.append(
                    f'<text class="tick" x="{x:.1f}" y="{frame.bottom + 31}" text-anchor="middle">{text}</text>'
                )
                free = x + half + 4
        return parts

    def svg(self, parts: list[str], label: str, rows: list) -> str:
        """The element, with a reading for each bin."""
        names = [f"{area_text(one.low)} to {area_text(one.high)}" for one in self.bins]
        counts = [["samples", [format_number(one.num_samples) for one in self.bins]]]
        readings = {"x": self.places, "labels": names, "name": "evidence", "rows": [*rows, *counts]}
        return self.frame.svg(parts, label, readings)


def accuracy_chart(bins: list[EvidenceBin], before: list[EvidenceBin]) -> str:
    """Accuracy of each bin on both views with whiskers; `before` (of the same sizes, or none) hollow and dashed.

    Empty if nothing is known.
    """
    if not any(math.isfinite(value) for one in bins for value in (one.full, one.crop)):
        return ""
    axis = _Axis(bins, (0.0, 1.0), percent=True)
    parts, rows = axis.parts("accuracy"), []
    for group, shift in ((before, -4.0), (bins, 4.0 if before else 0.0)):
        for view, nudge in (("full", -1.5), ("crop", 1.5)):
            parts += _curve(axis, group, view, shift + nudge, hollow=group is before)
    for view in ("full", "crop"):
        texts = [format_percent(getattr(one, view)) + interval_text(getattr(one, f"{view}_interval")) for one in bins]
        rows.append([f"{view} view", texts])
        if before:
            rows.append([f"{view} view before", [format_percent(getattr(one, view)) for one in before]])
    return axis.svg(parts, "Accuracy of both views by relative evidence area", rows)


def _curve(axis: _Axis, bins: list[EvidenceBin], view: str, shift: float, hollow: bool) -> list[str]:
    frame, parts, points = axis.frame, [], []
    colour = f"var(--{view})"
    for one, centre in zip(bins, axis.centres(), strict=bool(bins)):
        value, (low, high) = getattr(one, view), getattr(one, f"{view}_interval")
        x = centre + shift
        if math.isfinite(low) and math.isfinite(high):
            bottom, top = (frame.y(min(max(edge, 0.0), 1.0)) for edge in (low, high))
            ends = f"M{x - 3:.1f} {top:.1f}h6M{x - 3:.1f} {bottom:.1f}h6"
            parts.append(f'<path class="whisker" d="M{x:.1f} {top:.1f}V{bottom:.1f}{ends}" style="stroke:{colour}"/>')
        if math.isfinite(value):
            points.append((x, frame.y(min(max(value, 0.0), 1.0))))
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    if len(points) > 1:
        parts.append(f'<path class="trend{" other" if hollow else ""}" d="M{line}" style="stroke:{colour}"/>')
    inside = "var(--card)" if hollow else colour
    style = f'style="fill:{inside};stroke:{colour}"'
    return parts + [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.6" {style}/>' for x, y in points]


def gap_chart(bins: list[EvidenceBin], before: list[EvidenceBin]) -> str:
    """The gap of each bin in points as columns; `before` hollow beside it. Empty if nothing is known."""
    known = [one.gap for one in [*bins, *before] if math.isfinite(one.gap)]
    if not any(math.isfinite(one.gap) for one in bins):
        return ""
    low, high = 100 * min(*known, 0.0), 100 * max(*known, 0.0)
    pad = 0.06 * (high - low) or 1.0
    axis = _Axis(bins, (low - (pad if low < 0 else 0), high + pad), percent=False)
    parts, frame = axis.parts("gap, points"), axis.frame
    parts.append(f'<path class="axis" d="M{frame.left:.1f} {frame.y(0):.1f}H{frame.right}"/>')
    width = min(0.8 * axis.room() / (2 if before else 1), 30.0)
    for group, shift, shown in ((before, -width, "column hollow"), (bins, 0.0 if before else -width / 2, "column")):
        for one, centre in zip(group, axis.centres(), strict=bool(group)):
            if math.isfinite(one.gap):
                top, bottom = sorted((frame.y(100 * one.gap), frame.y(0)))
                place = f'x="{centre + shift:.1f}" y="{top:.1f}" width="{width:.1f}" height="{bottom - top:.1f}"'
                parts.append(f'<rect class="{shown}" {place}/>')
    rows = [["gap", [f"{format_number(100 * one.gap, 1)} points" for one in bins]]]
    if before:
        rows.append(["gap before", [f"{format_number(100 * one.gap, 1)} points" for one in before]])
    return axis.svg(parts, "The gap by relative evidence area", rows)


def same_sizes(bins: list[EvidenceBin], others: list[EvidenceBin]) -> list[EvidenceBin]:
    """`others` if they are of the same sizes as `bins`, else none: the two were measured on different samples."""
    same = len(bins) == len(others) and all(
        math.isclose(a.low, b.low) and math.isclose(a.high, b.high) for a, b in zip(bins, others, strict=True)
    )
    return others if same else []


def interval_text(interval: Interval) -> str:
    """` [low, high]` in percent, empty if it is not known."""
    low, high = interval
    known = math.isfinite(low) and math.isfinite(high)
    return f" [{format_number(100 * low, 1)}, {format_number(100 * high, 1)}]" if known else ""
