"""Small charts as inline SVG text: line charts with a smoothed trend, stacked time, and the before/after gap bars."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from html import escape
from numbers import Real

import numpy as np

NAN = float("nan")
MAX_BINS = 240
"""Points a curve keeps at most: more would not show in a panel of 360 px."""

PAGE_COLOURS = {name: f"var(--{name})" for name in ("ink", "muted", "line", "full", "crop")}
PRINT_COLOURS = {"ink": "#1c2128", "muted": "#565f6b", "line": "#d9d7d2", "full": "#0b67a8", "crop": "#c65d00"}


def as_float(value: object) -> float:
    """`value` as a float; NaN for anything that is not a finite number, so that a hole in the data stays a hole."""
    number = float(value) if isinstance(value, Real) else NAN
    return number if math.isfinite(number) else NAN


def format_number(value: float, decimals: int | None = None) -> str:
    """A number for people: three or four significant digits, thousands separated, a true minus sign."""
    if not math.isfinite(value):
        return "n/a"
    size = abs(value)
    if decimals is not None:
        text = f"{value:,.{decimals}f}"
    elif value == int(value) and size < 1e15:
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
    step = next(factor * scale for factor in (1, 2, 2.5, 5, 10) if factor * scale >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high], with 2 and 5 times them when that would leave fewer than three."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        found = [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]
        if len(found) >= 3:
            break
    return found[:: max(1, len(found) // 5)]


def _tick_labels(values: list[float], percent: bool = False) -> list[str]:
    if percent:
        return [format_percent(value, 0) for value in values]
    largest = max((abs(value) for value in values), default=0.0)
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
    ) -> None:
        """Leave room on the left for the widest tick label of `y_range`; `whole` allows no ticks between counts."""
        self.width, self.height = size
        self.x_range, self.y_range, self.log = x_range, y_range, log
        self.y_ticks = log_ticks(*y_range) if log else ticks(*y_range, count=round(self.height / 48), whole=whole)
        each_its_own = [_tick_labels([value])[0] for value in self.y_ticks]
        self.y_labels = each_its_own if log else _tick_labels(self.y_ticks, percent)
        self.left = 12 + 6.4 * max((len(label) for label in self.y_labels), default=0)
        self.right, self.top, self.bottom = self.width - 12, 24, self.height - 36

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
        # A tick between two steps means nothing.
        x_ticks = ticks(*self.x_range, count=5, whole=True)
        for value, label in zip(x_ticks, _tick_labels(x_ticks), strict=True):
            x, anchor = self.x(value), "end" if self.x(value) > self.right - 8 else "middle"
            parts.append(f'<text class="tick" x="{x:.1f}" y="{self.bottom + 15}" text-anchor="{anchor}">{label}</text>')
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
        return (
            f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(label)}"{data}>{"".join(parts)}</svg>'
        )


@dataclass
class Series:
    """One curve: `y` over `x` (steps), in a CSS colour."""

    name: str
    colour: str
    x: list[float]
    y: list[float]


def _bins(num_points: int, most: int = MAX_BINS) -> list[np.ndarray]:
    return np.array_split(np.arange(num_points), min(num_points, most))


def _envelope(values: np.ndarray, most: int) -> list[int]:
    """Indices of the smallest and largest value of each bin: a thinned curve that keeps its spikes."""
    kept: list[int] = []
    for index in _bins(len(values), most):
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
    hover_x: list[float] = []
    rows = []
    as_text = format_percent if percent else format_number
    for one, (x, y) in zip(series, points, strict=True):
        trend, centres = y, list(range(len(y)))
        if not (exact or shade_between) and len(y) > 40:
            kept = _envelope(y, MAX_BINS // 2)
            parts.append(f'<path class="raw" d="{frame.path(x[kept], y[kept])}" style="stroke:{one.colour}"/>')
            trend = smooth(y, max(5, len(y) // 30))
            centres = [int(index[len(index) // 2]) for index in _bins(len(y))]
        parts.append(f'<path class="trend" d="{frame.path(x[centres], trend[centres])}" style="stroke:{one.colour}"/>')
        if shade_between:
            parts += [
                f'<circle cx="{frame.x(a):.1f}" cy="{frame.y(b):.1f}" r="3.2" style="fill:{one.colour}"/>'
                for a, b in zip(x, y, strict=True)
                if math.isfinite(b)
            ]
        hover_x = x[centres].tolist()
        rows.append([one.name, [as_text(value) for value in trend[centres]]])
    return frame.svg(parts, label, {"x": hover_x, "rows": rows, "name": x_label})


def stacked_chart(
    series: list[Series], *, label: str, y_label: str, x_label: str = "step", size: tuple[int, int] = (360, 200)
) -> str:
    """Parts of a whole over steps, means of equal runs of steps on top of each other; missing counts as nothing."""
    if not series or not series[0].x:
        return ""
    steps = np.array(series[0].x, dtype=float)
    bins = _bins(len(steps), 60)
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
