"""Small charts as inline SVG text: numbers for people, the frame of a chart, and curves with a smoothed trend."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from numbers import Real

import numpy as np

NAN = float("nan")
MAX_BINS = 240
"""Points a curve keeps at most: more would not show in a panel of 360 px."""
ABSURD = 1e100
"""Numbers beyond it are damage, not measurements."""
LARGE = 400
"""Wider charts have a row to themselves on a phone."""
_EXPONENT_FROM = 1e15


def as_float(value: object) -> float:
    """`value` as a float; NaN for anything that is no number or an absurd one, so that a hole stays a hole.

    Sizes beyond ABSURD count as missing and their inverses as zero: no sum, range or ratio of the rest overflows.
    """
    # JSON may hold integers beyond the range of floats
    if not isinstance(value, Real) or (isinstance(value, int) and value.bit_length() > 1000):
        return NAN
    number = float(value)
    if not abs(number) <= ABSURD:
        return NAN
    return number if abs(number) >= 1 / ABSURD else 0.0


def format_number(value: float, decimals: int | None = None) -> str:
    """A number for people: three or four significant digits, thousands separated, a true minus sign."""
    if not math.isfinite(value):
        return "n/a"
    size = abs(value)
    if size >= _EXPONENT_FROM:
        text = f"{value:.3g}".replace("e+", "e")
    elif decimals is not None:
        text = f"{value:,.{decimals}f}"
    elif value == int(value):
        text = f"{int(value):,}"
    elif size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    else:
        text = f"{value:,.{max(0, 2 - math.floor(math.log10(size)))}f}"
        text = text.rstrip("0") if size < 0.01 else text
    return text.replace("-", "\u2212")


def format_percent(fraction: float, decimals: int = 1) -> str:
    """A fraction as a percentage."""
    return f"{format_number(100 * fraction, decimals)}%" if math.isfinite(fraction) else "n/a"


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean of `values` [N] that leaves out NaN; the window shrinks at both ends."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    index = np.arange(len(values))
    low, high = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), NAN)


def ticks(low: float, high: float, count: int = 4, whole: bool = False) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high], about `count` of them."""
    raw = max((high - low) / count, 1.0 if whole else 0.0)
    scale = 10.0 ** math.floor(math.log10(raw))
    steps = [factor * scale for factor in (1, 2, 2.5, 5, 10) if not (whole and factor * scale == 2.5)]
    step = next(step for step in steps if step >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high], with 2 and 5 times them when that would leave fewer than three."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        found = [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]
        if len(found) >= 3:
            break
    return found[:: max(1, len(found) // 5)]


def tick_labels(values: list[float], percent: bool = False) -> list[str]:
    """Texts of round numbers on one axis, all with the same number of decimals."""
    if percent:
        return [format_percent(value, 0) for value in values]
    largest = max((abs(value) for value in values), default=0.0)
    if largest >= _EXPONENT_FROM:
        return [format_number(value) for value in values]
    if largest >= 1e4:
        return [f"{format_number(value / 1e3)}k" if value else "0" for value in values]
    step = min((b - a for a, b in zip(values, values[1:], strict=False)), default=largest)
    if largest < 1e-3 or step <= 0:
        return [format_number(float(f"{value:.6g}")) for value in values]
    decimals = next((d for d in range(6) if abs(step * 10**d - round(step * 10**d)) < 1e-6), 6)
    return [format_number(value, decimals) for value in values]


class Frame:
    """The plotting area of one chart: data to pixels, and the axes."""

    def __init__(
        self,
        size: tuple[int, int],
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        log: bool = False,
        percent: bool = False,
        whole: bool = False,
        room_below: int = 36,
        x_ticks: list[tuple[float, str]] | None = None,
    ) -> None:
        """Leave room on the left for the widest tick label of `y_range`; `whole` allows no ticks between counts.

        `room_below` is the height under the plot in pixels; `x_ticks` are places and their labels, for an axis that
        does not count steps.
        """
        self.width, self.height = size
        self.x_range, self.y_range, self.log = x_range, y_range, log
        self.y_ticks = log_ticks(*y_range) if log else ticks(*y_range, count=round(self.height / 48), whole=whole)
        each_its_own = [tick_labels([value])[0] for value in self.y_ticks]
        self.y_labels = each_its_own if log else tick_labels(self.y_ticks, percent)
        # the page shows a large chart shrunk on a phone, with larger letters
        letter = 8.0 if self.width > LARGE else 6.4
        self.left = 12 + letter * max((len(label) for label in self.y_labels), default=0)
        self.right, self.top, self.bottom = self.width - 12, 24, self.height - room_below
        if x_ticks is None:
            values = ticks(*x_range, count=5, whole=True)  # a tick between two steps means nothing
            x_ticks = list(zip(values, tick_labels(values), strict=True))
        self.x_ticks = x_ticks

    def x(self, value: float) -> float:
        """Horizontal pixel of `value`."""
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        """Vertical pixel of `value`; NaN where a logarithmic axis cannot show it."""
        low, high = self.y_range
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value) if value > 0 else NAN
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def axes(self, x_label: str, y_label: str) -> list[str]:
        """Horizontal grid lines, tick labels and the two axis labels."""
        parts = [f'<text class="axis-label" x="2" y="12">{escape(y_label)}</text>']
        for value, label in zip(self.y_ticks, self.y_labels, strict=True):
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{self.left:.1f} {y:.1f}H{self.right}"/>')
            parts.append(
                f'<text class="tick" x="{self.left - 6:.1f}" y="{y + 3.8:.1f}" text-anchor="end">{label}</text>'
            )
        parts.append(f'<path class="axis" d="M{self.left:.1f} {self.bottom}H{self.right}"/>')
        for value, label in self.x_ticks:
            x, anchor = self.x(value), "end" if self.x(value) > self.right - 8 else "middle"
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{self.bottom + 15}" text-anchor="{anchor}">{escape(label)}</text>'
            )
        middle = (self.left + self.right) / 2
        parts.append(
            f'<text class="axis-label" x="{middle:.1f}" y="{self.height - 5}" text-anchor="middle">'
            f"{escape(x_label)}</text>"
        )
        return parts

    def path(self, xs: np.ndarray, ys: np.ndarray) -> str:
        """The `d` of a line through the points, lifted over every NaN."""
        parts, down = [], False
        for x, y in zip(xs, ys, strict=True):
            pixel_y = self.y(y)
            if not (math.isfinite(x) and math.isfinite(pixel_y)):
                down = False
                continue
            # The tiny stroke keeps a point without neighbours visible (round caps).
            parts.append(f"L{self.x(x):.1f} {pixel_y:.1f}" if down else f"M{self.x(x):.1f} {pixel_y:.1f}h.01")
            down = True
        return "".join(parts)

    def svg(self, parts: list[str], label: str, hover: dict | None = None) -> str:
        """The finished element; `hover` lets the page's script read values under the pointer."""
        data = ""
        if hover is not None:
            box = [round(value, 1) for value in (self.left, self.right, self.top, self.bottom)]
            data = f' data-hover="{escape(json.dumps(hover | {"box": box, "range": self.x_range}))}"'
            parts = [*parts, f'<path class="cursor" d="M0 {self.top}V{self.bottom}" visibility="hidden"/>']
        kind = "chart large" if self.width > LARGE else "chart"
        return (
            f'<svg class="{kind}" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(label)}"{data}>{"".join(parts)}</svg>'
        )


@dataclass
class Series:
    """One curve: `y` over `x` (steps), in a CSS colour."""

    name: str
    colour: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    dashed: bool = False
    """A run to compare with: thin, and without its raw values."""


def bins_of(num_points: int, most: int = MAX_BINS) -> list[np.ndarray]:
    """The indices 0 .. num_points - 1 in at most `most` runs of about equal length."""
    return np.array_split(np.arange(num_points), min(num_points, most))


def _envelope(values: np.ndarray, most: int) -> list[int]:
    """Indices of the smallest and largest value of each bin: a thinned curve that keeps its spikes."""
    kept: list[int] = []
    for index in bins_of(len(values), most):
        known = index[np.isfinite(values[index])]
        if len(known):
            kept += sorted({int(known[values[known].argmin()]), int(known[values[known].argmax()])})
        else:
            kept.append(int(index[0]))
    return kept


def _padded_range(values: np.ndarray, log: bool, percent: bool) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if log:
        return low / 1.15, high * 1.15
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    # A quantity that comes near zero is read against zero.
    low = 0.0 if 0 <= low <= 0.5 * high else low - pad
    high += pad
    return (max(low, 0.0), min(high, 1.0)) if percent and high - low > 2 * pad else (low, high)


def line_chart(
    series: list[Series],
    *,
    label: str,
    y_label: str,
    x_label: str = "step",
    size: tuple[int, int] = (360, 200),
    allow_log: bool = False,
    percent: bool = False,
    exact: bool = False,
    shade_between: bool = False,
) -> str:
    """Curves over steps: each raw value faint, the moving mean on top; an empty text if nothing is finite.

    `allow_log` takes a logarithmic axis if the values span more than a factor of 50. `exact` draws the values as
    they are: for what is scheduled, not measured. `shade_between` does so too, marks each point, and fills the area
    between the first two series: for a few evaluations.
    """
    points = [(np.array(s.x, dtype=float), np.array(s.y, dtype=float)) for s in series]
    finite = [y[np.isfinite(y)] for _, y in points]
    values = np.concatenate(finite) if finite else np.array([])
    if not len(values):
        return ""
    log = allow_log and values.min() > 0 and values.max() / values.min() > 50
    steps = np.concatenate([x for x, _ in points])
    x_range = (float(steps.min()), float(steps.max()))
    if x_range[0] == x_range[1]:
        x_range = (x_range[0] - 1, x_range[1] + 1)
    y_range = _padded_range(values, log, percent)
    frame = Frame(size, x_range, y_range, log, percent, whole=bool((values == values.round()).all()))
    parts = frame.axes(x_label, y_label + (", log scale" if log else ""))
    if shade_between and len(points) > 1:
        (x, low), (_, high) = points[:2]
        for i in range(len(x) - 1):
            if np.isfinite([low[i], low[i + 1], high[i], high[i + 1]]).all():
                corners = [(x[i], low[i]), (x[i + 1], low[i + 1]), (x[i + 1], high[i + 1]), (x[i], high[i])]
                outline = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in corners)
                parts.append(f'<polygon class="gap-area" points="{outline}"/>')
    curves = []
    for one, (x, y) in zip(series, points, strict=True):
        trend, centres = y, list(range(len(y)))
        if not (exact or shade_between) and len(y) > 40:
            if not one.dashed:
                kept = _envelope(y, MAX_BINS // 2)
                parts.append(f'<path class="raw" d="{frame.path(x[kept], y[kept])}" style="stroke:{one.colour}"/>')
            trend = smooth(y, max(5, len(y) // 30))
        if len(y) > MAX_BINS:
            centres = [int(index[len(index) // 2]) for index in bins_of(len(y))]
        shown = "trend other" if one.dashed else "trend"
        path = frame.path(x[centres], trend[centres])
        parts.append(f'<path class="{shown}" d="{path}" style="stroke:{one.colour}"/>')
        if shade_between and not one.dashed:
            parts += [
                f'<circle cx="{frame.x(a):.1f}" cy="{frame.y(b):.1f}" r="3.2" style="fill:{one.colour}"/>'
                for a, b in zip(x[centres], y[centres], strict=True)
                if math.isfinite(b)
            ]
        curves.append((one.name, x[centres], trend[centres]))
    as_text = format_percent if percent else format_number
    return frame.svg(parts, label, {**_readings(curves, as_text), "name": x_label})


def _readings(curves: list[tuple[str, np.ndarray, np.ndarray]], as_text: Callable[[float], str]) -> dict:
    """What the pointer reads: the steps of the longest curve, and the value of each curve at the nearest of its own."""
    grid = max((x for _, x, _ in curves), key=lambda x: (x[-1] - x[0], len(x)) if len(x) else (-1.0, 0))
    rows = []
    for name, x, y in curves:
        if not len(x):
            continue
        nearest = np.searchsorted((x[1:] + x[:-1]) / 2, grid)
        reach = 1.5 * max(np.diff(x).max(initial=1.0), np.diff(grid).max(initial=1.0))
        known = np.abs(x[nearest] - grid) <= reach
        rows.append([name, [as_text(float(y[i])) if ok else "n/a" for i, ok in zip(nearest, known, strict=True)]])
    return {"x": grid.tolist(), "rows": rows}
