"""From replies to numbers: accuracy by view and category, the gap by evidence size, intervals, comparisons, a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from nemo_vopd.tools.evaluation.asking import Answer
from nemo_vopd.tools.evaluation.extraction import extract_yes_no
from nemo_vopd.tools.evaluation.questions import YES_NO, grade

VIEWS = ("full", "crop")
MAX_SIZE_BINS, MIN_PER_BIN = 5, 8
RESAMPLES = 2000
_BLOCK = 100
Grades = dict[tuple[str, str], bool | None]
"""(id, view) -> right, wrong or None (undecided, which counts as wrong)."""


def grade_all(
    answers: Sequence[Answer], judge: Callable[[Sequence[Answer]], list[bool | None]] | None = None
) -> Grades:
    """The grade of each answer; what rules leave open goes to `judge`."""
    grades: Grades = {(a.id, a.view): grade(a.reply, a.accepted, a.kind, a.options) for a in answers}
    if judge is not None:
        left = [answer for answer in answers if grades[answer.id, answer.view] is None]
        for answer, right in zip(left, judge(left), strict=True):
            grades[answer.id, answer.view] = right
    return grades


def summarise(
    answers: Sequence[Answer], grades: Grades, *, by_category: bool = False, pairs: bool = False, seed: int = 0
) -> dict[str, Any]:
    """The numbers of one benchmark or data set (see docs/evaluation.md); accuracies are fractions.

    `by_category` and `pairs` are those of a `Benchmark`.
    """
    by_view = {view: [a for a in answers if a.view == view] for view in VIEWS}
    result: dict[str, Any] = {"num_samples": len({a.id for a in answers})}
    for view, part in by_view.items():
        if part:
            result[view] = {
                "accuracy": headline(part, grades, by_category),
                "interval": _accuracy_interval(part, grades, by_category, seed),
                "num_undecided": sum(grades[a.id, a.view] is None for a in part),
                "num_empty": sum(not a.reply.strip() for a in part),
            }
    result["accuracy"] = result["full" if by_view["full"] else "crop"]["accuracy"]
    if both := {a.id for a in by_view["full"]} & {a.id for a in by_view["crop"]}:
        full, crop = ([a for a in by_view[view] if a.id in both] for view in VIEWS)
        result["num_both_views"] = len(both)
        result["gap"] = headline(crop, grades, by_category) - headline(full, grades, by_category)
        result["by_evidence_size"] = by_evidence_size(full, crop, grades)
    result["categories"] = _categories(by_view, grades)
    result["metrics"] = _yes_no_metrics(by_view["full"], grades)
    if pairs:
        result["metrics"] |= _pair_metrics(by_view["full"], grades)
    return result


def _right_by(
    answers: Sequence[Answer], grades: Grades, names: Callable[[Answer], Iterable[str]]
) -> dict[str, list[bool]]:
    """Whether the answers of each group are right; `names` are the groups of an answer."""
    groups: dict[str, list[bool]] = {}
    for a in answers:
        for name in names(a):
            groups.setdefault(name, []).append(bool(grades[a.id, a.view]))
    return groups


def headline(answers: Sequence[Answer], grades: Grades, by_category: bool) -> float:
    """Accuracy over questions, or the mean of the categories' accuracies."""
    groups = _right_by(answers, grades, lambda a: [a.category if by_category else ""])
    return sum(sum(group) / len(group) for group in groups.values()) / max(1, len(groups))


def _categories(by_view: dict[str, list[Answer]], grades: Grades) -> dict[str, dict[str, float]]:
    def names(a: Answer) -> set[str]:
        return {a.category, f"{a.category} / {a.subcategory}" if a.subcategory else a.category}

    result: dict[str, dict[str, float]] = {}
    for view, answers in by_view.items():
        for name, group in sorted(_right_by(answers, grades, names).items()):
            if name:
                result.setdefault(name, {"num_samples": len(group)})[view] = sum(group) / len(group)
    return result


def _yes_no_metrics(answers: list[Answer], grades: Grades) -> dict[str, float]:
    """POPE's: precision, recall and F1 of "yes", and how often it is said."""
    if not answers or any(a.kind != YES_NO for a in answers):
        return {}
    # a judge can find a reply right that rules cannot read
    said = [a.answer if grades[a.id, a.view] else extract_yes_no(a.reply) for a in answers]
    yes = said.count("yes")
    hits = sum(s == "yes" == a.answer for s, a in zip(said, answers, strict=True))
    precision = hits / yes if yes else 0.0
    recall = hits / max(1, sum(a.answer == "yes" for a in answers))
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "yes_ratio": yes / len(answers)}


def _pair_metrics(answers: list[Answer], grades: Grades) -> dict[str, float]:
    """MMVP's: questions 2k-1 and 2k are one pair, right only together."""
    pairs = _right_by(answers, grades, lambda a: [str((int(a.id) - 1) // 2)])
    whole = [pair for pair in pairs.values() if len(pair) == 2]
    return {"pair_accuracy": sum(map(all, whole)) / len(whole)} if whole else {}


def by_evidence_size(full: list[Answer], crop: list[Answer], grades: Grades) -> list[dict[str, Any]]:
    """Accuracy of both views in up to five groups of much the same number, from the smallest evidence to the largest.

    "low" and "high" are the least and the most relative area in a group (evidence over image); equal areas stay
    together. No groups where there are too few samples or sizes for two.
    """
    crops = {a.id for a in crop}
    known = sorted((a.evidence, a.id) for a in full if a.evidence is not None and a.id in crops)
    num_bins = min(MAX_SIZE_BINS, len(known) // MIN_PER_BIN)
    if num_bins < 2:
        return []
    edges = np.quantile([size for size, _ in known], np.arange(1, num_bins) / num_bins)
    bins = []
    for _, group in groupby(known, lambda pair: int(np.searchsorted(edges, pair[0], side="left"))):
        part = list(group)
        row: dict[str, Any] = {"low": part[0][0], "high": part[-1][0], "num_samples": len(part)}
        for view in VIEWS:
            right = sum(bool(grades[name, view]) for _, name in part)
            row[view], row[f"{view}_interval"] = right / len(part), list(wilson(right, len(part)))
        bins.append(row)
    return bins if len(bins) > 1 else []


def _accuracy_interval(answers: list[Answer], grades: Grades, by_category: bool, seed: int) -> list[float]:
    """95% interval of the headline; Wilson's where all draws would be the same, which is no certainty."""
    right = [bool(grades[a.id, a.view]) for a in answers]
    if len(set(right)) > 1:
        return list(interval(answers, right, by_category, seed))
    num = len({a.cluster or a.id for a in answers})
    return list(wilson(num if right[0] else 0, num))


def wilson(right: int, num: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion."""
    centre = (right + z * z / 2) / (num + z * z)
    half = z / (num + z * z) * math.sqrt(right * (num - right) / num + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def interval(answers: Sequence[Answer], values: Sequence[float], by_category: bool, seed: int) -> tuple[float, float]:
    """95% bootstrap interval of the headline of `values` (one for each answer), images drawn with replacement.

    Questions about one image are drawn together: HR-Bench asks each four times, POPE six.
    """
    columns = {name: i for i, name in enumerate(sorted({a.category if by_category else "" for a in answers}))}
    clusters = {name: i for i, name in enumerate(dict.fromkeys(a.cluster or a.id for a in answers))}
    sums, counts = np.zeros((2, len(clusters), len(columns)))
    for a, value in zip(answers, values, strict=True):
        place = clusters[a.cluster or a.id], columns[a.category if by_category else ""]
        sums[place] += value
        counts[place] += 1
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES // _BLOCK):
        weights = rng.multinomial(len(clusters), np.full(len(clusters), 1 / len(clusters)), size=_BLOCK)
        with np.errstate(invalid="ignore"):  # a small category may not be drawn at all
            drawn.append(np.nanmean((weights @ sums) / (weights @ counts), axis=1))
    low, high = np.nanpercentile(np.concatenate(drawn), [2.5, 97.5])
    return float(low), float(high)


def compare(
    ours: Sequence[Answer],
    our_grades: Grades,
    theirs: Sequence[Answer],
    their_grades: Grades,
    *,
    by_category: bool = False,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Difference in full-view accuracy to a baseline on the questions both answered, with its paired 95% interval.

    Where the baseline has both views: "gap_closed", that difference over the baseline's gap.
    """
    baseline = {a.id: (a.question, a.cluster) for a in theirs if a.view == "full"}
    shared = [a for a in ours if a.view == "full" and baseline.get(a.id) == (a.question, a.cluster)]
    if not shared:
        return None
    differences = [float(bool(our_grades[a.id, "full"])) - bool(their_grades[a.id, "full"]) for a in shared]
    low, high = interval(shared, differences, by_category, seed)
    their_accuracy = headline(shared, their_grades, by_category)
    value = headline(shared, our_grades, by_category) - their_accuracy
    result = {"difference": value, "interval": [low, high], "num_samples": len(shared)}
    names = {a.id for a in shared}
    crops = [a for a in theirs if a.view == "crop" and a.id in names]
    if len(crops) == len(shared) and (gap := headline(crops, their_grades, by_category) - their_accuracy) > 0:
        result["gap_closed"] = value / gap
    return result


def table(result: dict[str, Any], published: int | None, comparison: dict[str, Any] | None) -> str:
    """The result of one benchmark (`summarise`) in lines: headline, views, categories, sizes, comparison.

    `published` is the number of questions of the whole benchmark, where it is known.
    """
    total = f" of {published}" if published and published != result["num_samples"] else ""
    views = [result[view] for view in VIEWS if view in result]
    names = [view for view in VIEWS if view in result]
    rows = [["", "questions", *(f"{name} view" for name in names)]]
    rows.append(["accuracy", "", *(f"{view['accuracy']:.1%}" for view in views)])
    intervals = ([100 * end for end in view["interval"]] for view in views)
    rows.append(["95% interval", "", *(f"{low:.1f} to {high:.1f}" for low, high in intervals)])
    for key, label in (("num_undecided", "undecided, counted wrong"), ("num_empty", "empty replies among them")):
        if any(view[key] for view in views):
            rows.append([label, "", *(str(view[key]) for view in views)])
    parts = [(f"  {name}", part) for name, part in result["categories"].items()]
    for part in result.get("by_evidence_size", []):
        parts.append((f"  evidence {part['low']:.2%} to {part['high']:.2%} of the image", part))
    for label, part in parts:
        rows.append([label, str(part["num_samples"]), *(f"{part[n]:.1%}" if n in part else "" for n in names)])
    rows += [[f"  {name.replace('_', ' ')}", "", f"{value:.1%}"] for name, value in result["metrics"].items()]
    if "gap" in result:
        rows.append(["gap (crop less full)", str(result["num_both_views"]), _points(result["gap"])])
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    lines = [f"\n{result['title']}: {result['num_samples']} questions{total}"]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=False))]
        lines.append("  ".join(cells).rstrip())
    if comparison is not None:
        low, high = (100 * end for end in comparison["interval"])
        lines.append(f"against the baseline {_points(comparison['difference'])} ({low:+.1f} to {high:+.1f}), full view")
        if "gap_closed" in comparison:
            lines[-1] += f": {comparison['gap_closed']:.1%} of its gap closed"
    return "\n".join(lines)


def _points(value: float) -> str:
    return f"{100 * value:+.1f} points"
