"""Results as text for a terminal."""

from __future__ import annotations

from typing import Any

from nemo_vopd.tools.evaluation.benchmarks import Benchmark

_VIEWS = ("full", "crop")


def table(benchmark: Benchmark | None, result: dict[str, Any], comparison: dict[str, Any] | None) -> str:
    """The result of one benchmark (`summarise`) in lines: headline, views, categories, sizes, comparison."""
    total = f" of {benchmark.num_questions}" if benchmark and benchmark.num_questions else ""
    if benchmark and benchmark.num_questions == result["num_samples"]:
        total = ""
    views = [view for view in _VIEWS if view in result]
    lines = [f"\n{result['title']}: {result['num_samples']} questions{total}"]
    rows = [["", "questions", *(f"{view} view" for view in views)]]
    rows.append(["accuracy", "", *(_percent(result[view]["accuracy"]) for view in views)])
    rows.append(["95% interval", "", *(_between(result[view]["interval"]) for view in views)])
    if any(result[view]["num_undecided"] for view in views):
        rows.append(["undecided, counted wrong", "", *(str(result[view]["num_undecided"]) for view in views)])
    if any(result[view]["num_empty"] for view in views):
        rows.append(["empty replies among them", "", *(str(result[view]["num_empty"]) for view in views)])
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
        low, high = (f"{100 * value:+.1f}" for value in comparison["interval"])
        lines.append(f"against the baseline {_points(comparison['difference'])} ({low} to {high}), full view")
        if "gap_closed" in comparison:
            lines[-1] += f": {_percent(comparison['gap_closed'])} of its gap closed"
    return "\n".join(lines)


def _percent(value: float | None, decimals: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{decimals}f}%"


def _points(value: float) -> str:
    return f"{100 * value:+.1f} points"


def _between(pair: list[float]) -> str:
    return f"{100 * pair[0]:.1f} to {100 * pair[1]:.1f}"
