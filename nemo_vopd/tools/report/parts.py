"""What the sections of the report are made of; templates/parts.html.j2 turns it into HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nemo_vopd.tools.report.charts import Spec

Names = tuple[str, str]
"""What a run and the one that it is compared with are called; the second is empty where there is none."""


@dataclass
class Cell:
    """A cell of a table: its text, small print below it, and `plus` or `minus` for a gain or a loss."""

    text: str
    note: str = ""
    kind: str = ""
    code: bool = False


@dataclass
class Table:
    """Names in the first column, numbers in the others."""

    heads: list[str]
    rows: Sequence[Sequence[Cell | str]]
    caption: str = ""

    @property
    def has_long_names(self) -> bool:
        """Whether a word in the first column leaves a narrow screen no room for numbers beside it."""
        names = (row[0] if isinstance(row[0], str) else f"{row[0].text} {row[0].note}" for row in self.rows)
        return any(len(word) > 15 for name in names for word in name.split())


@dataclass
class Facts:
    """Names and values."""

    caption: str
    rows: list[tuple[str, str]]


@dataclass
class Legend:
    """Names and CSS colours of what a chart shows, and the names of two runs that are compared in it."""

    entries: list[tuple[str, str]] = field(default_factory=list)
    solid: str = ""
    """Name of the run whose curves are solid, and whose dots and columns are filled."""
    dashed: str = ""
    """Name of the run whose curves are dashed, and whose dots and columns are hollow."""


@dataclass
class Panel:
    """A card with a chart, its heading, one number and its legend."""

    heading: str
    chart: Spec
    value: str = ""
    legend: Legend = field(default_factory=Legend)


@dataclass
class Counts:
    """A line for each name with a bar as long as its count."""

    rows: list[tuple[str, float]]
    heading: str = ""

    @property
    def largest(self) -> float:
        """The count whose bar is the longest."""
        return max((number for _, number in self.rows), default=0.0) or 1.0

    @classmethod
    def ranked(cls, counts: dict[str, float], heading: str = "") -> Counts:
        """The positive counts, the largest first."""
        rows = sorted(((str(name), num) for name, num in counts.items() if num > 0), key=lambda row: -row[1])
        return cls(rows, heading)
