"""A written page as tests look at it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nemo_vopd.tools.report.page import write_report
from nemo_vopd.tools.report.run_files import Run

VOID = {"meta", "img", "br"}
SECTIONS = [
    "accuracy", "evidence", "benchmarks", "curves", "warmup", "examples", "tokens", "drops", "data", "config", "facts",
]  # fmt: skip


class Page(HTMLParser):
    """Checks nesting, and keeps ids, links and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.charts: list[dict] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data)
        elif data.startswith("[") and self.open[-1] == "script":
            self.charts = json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]

    def rows(self, **values) -> list[dict]:
        """The rows of all charts that have these values."""
        found = [row for chart in self.charts for row in chart.get("data", {}).get("values", [])]
        return [row for row in found if all(row.get(name) == value for name, value in values.items())]

    @property
    def sections(self) -> list[str]:
        return [one for one in self.ids if one in SECTIONS]


def page_of(path: Path, run: Run, other: Run | None = None, baseline=()) -> tuple[str, Page]:
    """The text of the page that is written to `path`, and the page."""
    write_report(path, run, other, baseline)
    assert not list(path.parent.glob("*.partial"))
    text = path.read_text(encoding="utf-8")
    return text, Page(text)
