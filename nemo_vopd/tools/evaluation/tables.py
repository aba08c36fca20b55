"""Results as text for a terminal."""

from __future__ import annotations

from typing import Any

_VIEWS = ("full", "crop")


def table(result: dict[str, Any], published: int | None, comparison: dict[str, Any] | None) -> str:
    """The result of one benchmark (`summarise`) in lines: headline, views, categories, sizes, comparison.

    `published` is the number of questions of the whole benchmark, where it is known.
    """
    total = f" of {published}" if published and published != result["num_samples"] else ""
    views = [view for view in _VIEWS if view in result]
    lines = [f"\n{result['title']}: {result['num_samples']} questions{total}"]
    rows = [["", "questions", *(f"{view} view" for view in views)]]
    rows.append(["accuracy", "", *(_percent(result[view]["accuracy"]) for view in views)])
    rows.append(
        ["95% interval", "", *("{:.1f} to {:.1f}".format(*_hundred(result[view]["interval"])) for view in views)]
    )
    for key, name in (("num_undecided", "undecided, counted wrong"), ("num_empty", "empty replies among them")):
        if any(result[view][key] for view in views):
            rows.append([name, "", *(str(result[view][key]) for view in views)])
    for name, part in result["categories"].items():
        rows.append([f"  {name}", str(part["num_samples"]), *(_percent(part.get(view)) for view in views)])
    for part in result.get("by_evidence_size", []):
        name = f"  evidence {_percent(part['low'], 2)} to {_percent(part['high'], 2)} of the image"
        rows.append([name, str(part["num_samples"]), *(_percent(part[view]) for view in views)])
    for name, value in result["metrics"].items():
        rows.append([f"  {name.replace('_', ' ')}", "", _percent(value)])
    if "gap" in result:
        rows.append(["gap (crop less full)", str(result["num_both_views"]), _points(result["gap"])])
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(2 + len(views))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=False))]
        lines.append("  ".join(cells).rstrip())
    if comparison is not None:
        low, high = _hundred(comparison["interval"])
        lines.append(f"against the baseline {_points(comparison['difference'])} ({low:+.1f} to {high:+.1f}), full view")
        if "gap_closed" in comparison:
            lines[-1] += f": {_percent(comparison['gap_closed'])} of its gap closed"
    return "\n".join(lines)


def _percent(value: float | None, decimals: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{decimals}f}%"


def _points(value: float) -> str:
    return f"{100 * value:+.1f} points"


def _hundred(pair: list[float]) -> list[float]:
    return [100 * value for value in pair]
