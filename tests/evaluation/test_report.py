"""The report page: well formed, complete, self-contained, escaped, and unmoved by holes in the data."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from nemo_vopd.evaluation.report import Example, TokenTrace, gap_figure_svg, write_report
from nemo_vopd.evaluation.svg import Frame, Series, format_number, line_chart, smooth, ticks

VOID = {"meta", "img", "br"}
NAN = float("nan")
HOSTILE = "<script>alert(\"1\")</script> & 'more'"
SUMMARY = {
    "full_accuracy_before": 0.5,
    "full_accuracy_after": 0.9,
    "crop_accuracy_before": 0.95,
    "crop_accuracy_after": 0.94,
    "gap_closed": 0.911,
    "wall_seconds": 521.3,
    "seed": 1234,
    "teacher_view": "crop",
    "num_parameters": 1832448,
    "phases": {"warmup": 200.0, "training": 300.0},
    "versions": {"torch": "2.9.1"},
}


class Page(HTMLParser):
    """Checks nesting, and keeps ids, links and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
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

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def image(size: int = 12, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (size, size))


def example(**changes) -> Example:
    fields = dict(
        image=image(), bbox=(2, 3, 7, 9), crop=image(4), question="Which digit?", answer="7",
        full_before="1", full_after="7.", crop_before=" 7", crop_after="",
    )  # fmt: skip
    return Example(**(fields | changes))


def trace(**changes) -> TokenTrace:
    fields = dict(
        image=image(), crop=image(4), question="Which digit?", tokens=["The", " digit\n", "<eos>"],
        student_log_probs=[-0.1, -1.0, -0.01], teacher_log_probs=[-0.2, -4.0, -0.02], divergence=[0.01, 0.4, 0.0],
        student_top=[[("The", 0.9)], [(" digit\n", 0.37), (" mark", 0.3)], [("<eos>", 0.99)]],
        teacher_top=[[("The", 0.8)], [(" number", 0.9), (" mark", 0.05)], [("<eos>", 0.98)]],
    )  # fmt: skip
    return TokenTrace(**(fields | changes))


def page_of(tmp_path, **changes) -> tuple[str, Page]:
    metrics = [
        {"step": i, "loss": math.exp(-i / 20), "grad_norm": 1.0, "seconds_rollout": 0.2, "seconds_student": 0.1,
         "student_topk_mass": 0.99, "teacher_topk_mass": 0.98, "distinct_2": 0.5}
        for i in range(100)
    ]  # fmt: skip
    content = dict(
        title="Quickstart", summary=SUMMARY, metrics=metrics,
        warmup=[{"step": i, "loss": 1.0, "lr": 1e-3} for i in (0, 1)],
        evaluations=[{"step": s, "full_accuracy": 0.5 + s / 200, "crop_accuracy": 0.95} for s in (0, 40, 80)],
        examples=[example()], traces=[trace()],
    )  # fmt: skip
    path = tmp_path / "run" / "report.html"
    write_report(path, **(content | changes))
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


EMPTY = dict(summary={}, metrics=[], warmup=[], evaluations=[], examples=[], traces=[])


@pytest.mark.parametrize("changes", [{}, EMPTY], ids=["full", "empty"])
def test_every_section_is_there_and_every_reference_resolves(tmp_path, changes):
    _, page = page_of(tmp_path, **changes)
    assert {"gap", "accuracy", "curves", "warmup", "examples", "tokens", "facts"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    targets = [value.removeprefix("#") for value in page.values("href")]
    targets += page.values("aria-controls") + page.values("aria-labelledby")
    assert set(targets) <= set(page.ids)


def test_headline_charts_and_facts(tmp_path):
    _, page = page_of(tmp_path)
    assert "narrowed from 45.0 to 4.0 points: 91% of it is closed" in page.text
    for heading in ("Loss", "Gradient norm", "Top-k mass", "Time by phase", "Distinct 2"):
        assert heading in page.texts
    assert "Entropy of the student" not in page.texts
    for fact in ("1234", "1,832,448", "8 min 41 s", "3 min 20 s", "torch", "2.9.1"):
        assert fact in page.texts


def test_answers_are_marked_by_symbol_and_word(tmp_path):
    _, page = page_of(tmp_path)
    assert [word for word in page.texts if word in ("right:", "wrong:")] == ["wrong:", "right:", "right:", "wrong:"]
    assert [value for value in page.values("class") if value.startswith("mark")] == [
        "mark wrong", "mark right", "mark right", "mark wrong",
    ]  # fmt: skip


def test_token_viewer_opens_at_the_largest_divergence_and_is_reachable_by_keyboard(tmp_path):
    _, page = page_of(tmp_path)
    assert page.values("aria-selected") == ["false", "true", "false"]
    assert page.values("tabindex") == ["-1", "0", "-1"]
    assert "\u00b7number" in page.texts and "\u00b7digit\u21b5" in page.texts
    assert "not among its top tokens" in page.texts


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    text, page = page_of(tmp_path)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)
    assert all(value.startswith("data:image/png;base64,") for value in page.values("src"))
    assert not {"link", "iframe", "object", "base"} & set(page.tags)


def test_text_is_escaped(tmp_path):
    hostile = example(question=HOSTILE, answer=HOSTILE, full_before=HOSTILE)
    tokens = trace(question=HOSTILE, tokens=[HOSTILE, "b", "c"], student_top=[[(HOSTILE + "x", 0.5)], [], []])
    facts = SUMMARY | {"note": HOSTILE, HOSTILE: 1, "versions": {HOSTILE: HOSTILE}}
    metrics = [{"step": 0, HOSTILE: 1.0, "seconds_" + HOSTILE: 1.0}]
    text, page = page_of(tmp_path, title=HOSTILE, summary=facts, metrics=metrics, examples=[hostile], traces=[tokens])
    assert page.tags.count("script") == 1
    assert "alert(" in page.text and "<script>alert" not in text


def test_holes_in_the_data_do_not_crash(tmp_path):
    metrics = [{}, {"step": 1, "loss": NAN}, {"step": 2, "loss": math.inf}, {"loss": None, "lr": "x"}, {"step": 5}]
    for rows in (metrics, metrics + [{"step": 6, "loss": 0.5, "seconds_rollout": NAN}], [{"step": 3, "loss": 1.0}]):
        _, page = page_of(
            tmp_path,
            summary={
                "full_accuracy_before": NAN,
                "gap_closed": None,
                "phases": {},
                "wall_seconds": NAN,
                "odd": {"a": []},
            },
            metrics=rows,
            warmup=rows,
            evaluations=[{"step": 0}, {"full_accuracy": NAN, "crop_accuracy": 0.5}, {"step": 9, "full_accuracy": 0.1}],
            examples=[example(bbox=(NAN, 0, 1, 1), image=image(900, "RGBA"), crop=image(1, "L"), answer="")],
            traces=[
                trace(student_log_probs=[NAN], teacher_log_probs=[-math.inf] * 3, divergence=[NAN] * 3),
                trace(student_top=[], teacher_top=[[("a", NAN)]], divergence=[]),
                trace(tokens=[]),
            ],
        )
        assert "was not measured" in page.text
        for value in page.values("d") + page.values("points") + page.values("cx") + page.values("height"):
            assert "nan" not in value and "inf" not in value


@pytest.mark.parametrize("summary", [SUMMARY, {}, {"full_accuracy_before": NAN, "crop_accuracy_before": 0.5}])
def test_gap_figure_is_a_standalone_svg(summary):
    text = gap_figure_svg(summary)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in text and "nan" not in text


def test_gap_figure_heights_follow_accuracy():
    root = ElementTree.fromstring(gap_figure_svg(SUMMARY))
    bars = [
        float(bar.get("height", ""))
        for bar in root.iter("{http://www.w3.org/2000/svg}rect")
        if bar.get("width") == "54"
    ]
    accuracies = [SUMMARY[f"{view}_accuracy_{when}"] for when in ("before", "after") for view in ("full", "crop")]
    assert np.allclose(np.array(bars) / bars[0], np.array(accuracies) / accuracies[0], atol=2e-3)


def test_smoothing_leaves_out_nan():
    values = np.array([1.0, NAN, 3.0, 5.0])
    assert smooth(values, 3).tolist() == [1.0, 2.0, 4.0, 4.0]
    assert np.isnan(smooth(np.array([NAN, NAN]), 3)).all()


def test_ticks_are_round_and_inside():
    assert ticks(0, 1, 4) == [0, 0.25, 0.5, 0.75, 1]
    assert ticks(0.3, 0.9, 3) == pytest.approx([0.4, 0.6, 0.8])
    assert ticks(0, 2, 4, whole=True) == [0, 1, 2]


def test_numbers_read_well():
    texts = {0.0: "0", 1234.5: "1,234", 0.12345: "0.123", 2e-6: "2e\u22126", -3.5: "\u22123.50", NAN: "n/a", 12: "12"}
    assert {value: format_number(value) for value in texts} == texts


def test_a_line_is_lifted_over_nan_and_long_curves_stay_small():
    frame = Frame((100, 100), (0, 3), (0, 1))
    assert frame.path(np.arange(4.0), np.array([0.0, 1.0, NAN, 1.0])).count("M") == 2
    steps = np.arange(20_000.0)
    chart = line_chart([Series("loss", "red", steps.tolist(), np.exp(-steps / 5000).tolist())], label="a", y_label="b")
    assert len(chart) < 25_000
