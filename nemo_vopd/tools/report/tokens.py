"""The token viewer of the report: what both policies thought at each token of a response."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_vopd.tools.report.examples_file import TokenTrace
from nemo_vopd.tools.report.numbers import NAN, as_float, format_number

LN2 = math.log(2)


@dataclass
class ShownToken:
    """A token of a response: its text, its colour from 0 to 1, and what is shown when it is chosen."""

    text: str
    heat: float
    student: str
    teacher: str
    divergence: str
    tops: list[tuple[str, float, float]]
    """Text and the probability of both policies: the sampled token first, then every other top token."""


def visible(token: str) -> str:
    """Token text with its white space made visible."""
    return token.replace(" ", "\u00b7").replace("\n", "\u21b5").replace("\t", "\u21e5") or "(empty)"


def shown_tokens(trace: TokenTrace) -> tuple[list[ShownToken], int]:
    """The tokens of a response, and the one at which the policies disagree most."""
    length = len(trace.tokens)

    def column(values: list[float]) -> list[float]:
        return [as_float(values[j]) if j < len(values) else NAN for j in range(length)]

    student, teacher = column(trace.student_log_probs), column(trace.teacher_log_probs)
    divergence = column(trace.divergence)
    known = [value if math.isfinite(value) else -1.0 for value in divergence]
    tokens = []
    for j, token in enumerate(trace.tokens):
        numbers = format_number(student[j], 3), format_number(teacher[j], 3), format_number(divergence[j], 4)
        tops = [top[j] if j < len(top) else [] for top in (trace.student_top, trace.teacher_top)]
        sampled = [math.exp(min(value, 0.0)) if math.isfinite(value) else NAN for value in (student[j], teacher[j])]
        heat = math.sqrt(min(max(known[j], 0.0) / LN2, 1.0))
        ranked = [(visible(token), sampled[0], sampled[1]), *_others(token, tops)]
        tokens.append(ShownToken(visible(token), heat, *numbers, ranked))
    return tokens, known.index(max(known)) if known else 0


def _others(token: str, tops: list) -> list[tuple[str, float, float]]:
    """The top tokens of both policies beside `token`, the most probable first."""
    others: dict[str, list[float]] = {}
    for who, top in enumerate(tops):
        for text, probability in top:
            if text != token and not math.isfinite(others.setdefault(text, [NAN, NAN])[who]):
                others[text][who] = min(max(as_float(probability), 0.0), 1.0)
    ranked = sorted(others.items(), key=lambda item: -max((p for p in item[1] if math.isfinite(p)), default=0.0))
    return [(visible(text), student, teacher) for text, (student, teacher) in ranked]
