"""From replies to numbers: grades, accuracy by view and category, the gap by evidence size, intervals, comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from nemo_vopd.tools.evaluation.answers import Answer
from nemo_vopd.tools.evaluation.benchmarks import Scoring
from nemo_vopd.tools.evaluation.choosing import extract_option
from nemo_vopd.tools.evaluation.extraction import extract_yes_no, same_text
from nemo_vopd.tools.evaluation.questions import OPTION, YES_NO

VIEWS = ("full", "crop")
MAX_SIZE_BINS, MIN_PER_BIN = 5, 8
RESAMPLES = 2000
_BLOCK = 100
Grades = dict[tuple[str, str], bool | None]


def exact_match(reply: str, answer: str) -> bool:
    """Whether reply and answer are the same words: spacing, case and a final full stop do not count."""
    words, wanted = (text.lower().rstrip(" .!").split() for text in (reply, answer))
    return words == wanted


def read_reply(reply: str, kind: str, options: Mapping[str, str]) -> str | None:
    """What the reply chooses: a letter, yes or no; of open questions the reply itself. None: it chooses nothing."""
    if kind == OPTION:
        return extract_option(reply, options)
    return extract_yes_no(reply) if kind == YES_NO else reply


def grade(reply: str, answer: str, kind: str, options: Mapping[str, str]) -> bool | None:
    """Whether `reply` is right; None where rules cannot tell (a judge may: nemo_vopd/tools/evaluation/judge.py).

    Options and yes/no: what is chosen decides, a reply that chooses nothing is left open. Open questions: right if
    the texts are the same, else open, as other words can say the same. An empty reply is wrong.
    """
    if not reply.strip():
        return False
    chosen = read_reply(reply, kind, options)
    if kind in (OPTION, YES_NO):
        return None if chosen is None else chosen == answer
    return True if exact_match(reply, answer) or same_text(reply, answer) else None


def grade_all(
    answers: Sequence[Answer], judge: Callable[[Sequence[Answer]], list[bool | None]] | None = None
) -> Grades:
    """(id, view) -> right, wrong or None (undecided); what rules leave open goes to `judge`."""
    grades: Grades = {(a.id, a.view): grade(a.reply, a.answer, a.kind, a.options) for a in answers}
    if judge is not None:
        left = [answer for answer in answers if grades[answer.id, answer.view] is None]
        for answer, right in zip(left, judge(left), strict=True):
            grades[answer.id, answer.view] = right
    return grades


def summarise(answers: Sequence[Answer], grades: Grades, scoring: Scoring, seed: int = 0) -> dict[str, Any]:
    """The numbers of one benchmark or data set (see docs/evaluation.md); undecided replies count as wrong.

    Accuracies are fractions.
    """
    mean_of = scoring.mean_of
    by_view = {view: [a for a in answers if a.view == view] for view in VIEWS}
    result: dict[str, Any] = {"num_samples": len({a.id for a in answers})}
    for view, part in by_view.items():
        if part:
            result[view] = {
                "accuracy": headline(part, grades, mean_of),
                "interval": _accuracy_interval(part, [bool(grades[a.id, a.view]) for a in part], mean_of, seed),
                "num_undecided": sum(grades[a.id, a.view] is None for a in part),
                "num_empty": sum(not a.reply.strip() for a in part),
            }
    result["accuracy"] = result["full" if by_view["full"] else "crop"]["accuracy"]
    both = {a.id for a in by_view["full"]} & {a.id for a in by_view["crop"]}
    if both:
        pair = [[a for a in by_view[view] if a.id in both] for view in VIEWS]
        result["num_both_views"] = len(both)
        result["gap"] = headline(pair[1], grades, mean_of) - headline(pair[0], grades, mean_of)
        result["by_evidence_size"] = by_evidence_size(pair[0], pair[1], grades)
    result["categories"] = _categories(by_view, grades)
    result["metrics"] = _yes_no_metrics(by_view["full"], grades)
    if scoring.pairs:
        result["metrics"] |= _pair_metrics(by_view["full"], grades)
    return result


def _accuracy_interval(answers: list[Answer], right: list[bool], mean_of: str, seed: int) -> list[float]:
    """95% interval of the headline; Wilson's where all draws would be the same, which is no certainty."""
    if all(right) or not any(right):
        num = len({a.cluster or a.id for a in answers})
        return list(wilson(num if all(right) else 0, num))
    return list(interval(answers, right, mean_of, seed))


def _right_by(
    answers: Sequence[Answer], grades: Grades, names: Callable[[Answer], Iterable[str]]
) -> dict[str, list[bool]]:
    """Whether the answers of each group are right; `names` are the groups of an answer."""
    groups: dict[str, list[bool]] = {}
    for a in answers:
        for name in names(a):
            groups.setdefault(name, []).append(bool(grades[a.id, a.view]))
    return groups


def headline(answers: Sequence[Answer], grades: Grades, mean_of: str) -> float:
    """Accuracy over questions, or the mean of the categories' accuracies."""
    groups = _right_by(answers, grades, lambda a: [a.category if mean_of == "categories" else ""])
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
    asked = [a for a in answers if a.kind == YES_NO]
    if not asked or len(asked) < len(answers):
        return {}
    # a judge can find a reply right that rules cannot read
    said = [a.answer if grades[a.id, a.view] else read_reply(a.reply, a.kind, a.options) for a in asked]
    yes = sum(s == "yes" for s in said)
    hits = sum(s == "yes" == a.answer for s, a in zip(said, asked, strict=True))
    precision = hits / yes if yes else 0.0
    recall = hits / max(1, sum(a.answer == "yes" for a in asked))
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "yes_ratio": yes / len(asked)}


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
    groups: dict[int, list[tuple[float, str]]] = {}
    for size, name in known:
        groups.setdefault(int(np.searchsorted(edges, size, side="left")), []).append((size, name))
    bins = []
    for part in groups.values():
        row: dict[str, Any] = {"low": part[0][0], "high": part[-1][0], "num_samples": len(part)}
        for view in VIEWS:
            right = sum(bool(grades[name, view]) for _, name in part)
            row[view], row[f"{view}_interval"] = right / len(part), list(wilson(right, len(part)))
        bins.append(row)
    return bins if len(bins) > 1 else []


def wilson(right: int, num: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion."""
    centre = (right + z * z / 2) / (num + z * z)
    half = z / (num + z * z) * math.sqrt(right * (num - right) / num + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def interval(answers: Sequence[Answer], values: Sequence[float], mean_of: str, seed: int) -> tuple[float, float]:
    """95% bootstrap interval of the headline of `values` (one for each answer), images drawn with replacement.

    Questions about one image are drawn together: HR-Bench asks each four times, POPE six.
    """
    groups = sorted({a.category for a in answers}) if mean_of == "categories" else [""]
    clusters = {name: i for i, name in enumerate(dict.fromkeys(a.cluster or a.id for a in answers))}
    sums, counts = np.zeros((2, len(clusters), len(groups)))
    for a, value in zip(answers, values, strict=True):
        place = clusters[a.cluster or a.id], groups.index(a.category) if mean_of == "categories" else 0
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
    scoring: Scoring,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Difference in full-view accuracy to a baseline on the questions both answered, with its paired 95% interval.

    Where the baseline has both views: "gap_closed", that difference over the baseline's gap.
    """
    baseline = {a.id: (a.question, a.cluster) for a in theirs if a.view == "full"}
    shared = [a for a in ours if a.view == "full" and baseline.get(a.id) == (a.question, a.cluster)]
    if not shared:
        return None
    mine, other = ([float(bool(g[a.id, "full"])) for a in shared] for g in (our_grades, their_grades))
    differences = [x - y for x, y in zip(mine, other, strict=True)]
    low, high = interval(shared, differences, scoring.mean_of, seed)
    value = headline(shared, our_grades, scoring.mean_of) - headline(shared, their_grades, scoring.mean_of)
    result = {"difference": value, "interval": [low, high], "num_samples": len(shared)}
    names = {a.id for a in shared}
    crops = [a for a in theirs if a.view == "crop" and a.id in names]
    if len(crops) == len(shared):
        other_full = headline(shared, their_grades, scoring.mean_of)
        their_gap = headline(crops, their_grades, scoring.mean_of) - other_full
        if their_gap > 0:
            result["gap_closed"] = value / their_gap
    return result
