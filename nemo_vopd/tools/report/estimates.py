"""Numbers with their uncertainty: the ends of a noisy curve, and accuracies over a number of questions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nemo_vopd.tools.report.numbers import NAN, format_number

_WINDOW = 0.1
"""Share of the steps that the mean at either end is taken over."""
_FEWEST = 5
"""Number of steps in such a window at least, where half of the steps are as many."""


@dataclass(frozen=True)
class Estimate:
    """A number and its uncertainty."""

    value: float
    margin: float = NAN
    """Half the width of its 95% interval; NaN where it is not known."""

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference of two independent estimates."""
        return Estimate(self.value - other.value, math.hypot(self.margin, other.margin))

    @property
    def is_noise(self) -> bool:
        """Whether its 95% interval holds zero; an unknown interval holds nothing."""
        return abs(self.value) <= self.margin

    def text(self, as_text: Callable[[float], str] = format_number) -> str:
        """`value ± margin`."""
        return f"{as_text(self.value)} {self.margin_text(as_text)}".strip()

    def margin_text(self, as_text: Callable[[float], str] = format_number) -> str:
        """`± margin`; empty where there is none, or it is not known."""
        return f"\u00b1 {as_text(float(f'{self.margin:.2g}'))}" if self.margin > 0 else ""


def ends(values: np.ndarray) -> tuple[Estimate, Estimate]:
    """Means over the first and the last tenth of the finite `values` [N]; NaN where there are none."""
    known = values[np.isfinite(values)]
    size = max(round(_WINDOW * len(known)), min(_FEWEST, len(known) // 2), 1)
    return _mean(known[:size]), _mean(known[-size:])


def _mean(values: np.ndarray) -> Estimate:
    if len(values) < 3:
        return Estimate(float(values.mean()) if len(values) else NAN)
    # Student's t at 95%, rounded up: 2.8 with 4 degrees of freedom, 2.1 with 20
    factor = 2 + 4 / (len(values) - 1)
    return Estimate(float(values.mean()), factor * float(values.std(ddof=1)) / math.sqrt(len(values)))


def accuracy(share: float, num_questions: float) -> Estimate:
    """`share` of `num_questions` answered rightly, with the interval of Agresti and Coull."""
    if not num_questions >= 1:
        return Estimate(share)
    total = num_questions + 4
    centre = min(max((share * num_questions + 2) / total, 0.0), 1.0)
    return Estimate(share, 1.96 * math.sqrt(centre * (1 - centre) / total))
