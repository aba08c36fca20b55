"""Two runs on one page, and results beside those of a baseline: which is which."""

from __future__ import annotations

import json
import re

import pytest

from nemo_vopd.tools.report.run_files import Results, names_apart, read_run
from tests.tools.report.html_page import page_of
from tests.tools.report.run_folder import SUMMARY, results, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "new-run", summary=SUMMARY)


def test_two_runs_are_overlaid_and_compared(folder, tmp_path):
    other = read_run(write_run(tmp_path / "base", num_steps=120, scale=3.0))
    text, page = page_of(tmp_path / "report.html", read_run(folder), other)
    assert "Vision-OPD: new-run and base" in page.text and "new-run: The regional-to-global gap" in page.text
    assert "Curves of new-run are solid, those of base dashed." in page.text
    assert len({row["curve"] for row in page.rows(kind="other")}) >= 14
    ours = {row["curve"] for row in page.rows(kind="trend")} - {"loss", "learning rate"}  # the warm-up's
    assert len(ours) >= 14 and all(name.endswith(", new-run") for name in ours)
    caption = "End values: means over the last tenth of the steps of each run. Difference: new-run \u2212 base, "
    assert caption in page.text and "Options that differ" in page.texts
    assert "optimizer.lr" in page.texts and "6e-06" in page.texts and "Time by phase, base" in page.texts
    assert "distill.teacher.rate" not in page.texts  # the same in both
    rows = re.findall(
        r'<th scope="row">Loss</th><td>([^<]*)</td><td>([^<]*)</td><td>\u2212[^<]*<span[^>]*>([^<]*)', text
    )
    assert len(rows) == 1 and float(rows[0][0]) < float(rows[0][1]) and re.fullmatch(r"\u00b1 0\.\d+", rows[0][2])
    rows = re.findall(r'<th scope="row">Distinct neighbouring pairs</th>.*?</tr>', text)
    assert len(rows) == 1 and "within noise" in rows[0]  # drawn from the same numbers


def test_both_runs_are_named_wherever_there_are_two(folder, tmp_path):
    other = read_run(write_run(tmp_path / "base", num_steps=120, scale=3.0))
    text, page = page_of(tmp_path / "report.html", read_run(folder), other)
    legends = re.findall(r'<div class="legend">(.*?)</div>', text, re.DOTALL)
    compared = [legend for legend in legends if 'class="dashed"' in legend]
    assert len(compared) >= 14 and all(
        re.search(r'class="solid"></i>new-run', legend) and re.search(r'class="dashed"></i>base', legend)
        for legend in compared
    )
    for heads in (["Benchmark", "new-run", "base", "Difference, points"], ["", "new-run", "base", "Difference"]):
        assert "".join(f'<th scope="col">{head}</th>' for head in heads) in re.sub(r"\s*\n\s*", "", text)
    captions = re.findall(r"<caption>([^<]*)</caption>", text)
    for words in ("own accuracy. Difference: new-run \u2212 base", "gap of new-run, beside the gap of base"):
        assert any(words in caption for caption in captions)
    assert captions.count("new-run") >= 2 and captions.count("base") >= 2  # accuracy over steps, and bins
    alone = re.findall(r'<h2 id="(\w+)-title">[^<]*<small>new-run</small>', text)
    assert alone == ["warmup", "examples", "tokens", "drops", "data", "facts"]
    assert not re.search("Baseline|view before|gap before", page.text + json.dumps(page.charts))
    _, page = page_of(tmp_path / "files.html", read_run(folder), None, [Results("old-model", results(0.0))])
    assert "old-model" in page.texts and "Gap of old-model" in page.texts


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    for first, second, names in (
        ("runs/a", "runs/b", ("a", "b")),
        ("runs/a/train", "runs/b/train", ("a", "b")),
        ("runs/a/1/train", "runs/b/2/train", ("a/1", "b/2")),
        ("runs/quick", "runs/quick/train", ("quick", "quick/train")),
        ("runs/a", "old/runs/a", ("runs", "old/runs")),
    ):
        assert names_apart(tmp_path / first, tmp_path / second) == names


def test_results_are_compared_with_a_baseline(folder, tmp_path):
    run, baseline = read_run(folder), Results("base", results(0.0))
    run.results[0].data["comparison"] = {"vstar": {"difference": 0.123, "interval": [0.05, 0.2], "num_samples": 191}}
    _, page = page_of(tmp_path / "report.html", run, baseline=[baseline])
    assert "V* Bench" in page.texts and "+12.3" in page.texts and "[5.0, 20.0]" in page.texts
    assert "+12.0" in page.texts  # without a paired bootstrap, the plain difference
    assert "direct_attributes" in page.texts and "F1" in page.texts and "\u2013" in page.texts
    assert len(page.rows(when="before")) == 5
    assert len([row for row in page.rows() if row.get("low") is not None and row["low"] < row["high"]]) == 20
    _, page = page_of(tmp_path / "alone.html", read_run(folder))
    assert "Baseline" not in page.texts and "82.0%" in page.texts and "Accuracy" in page.texts
    run.results[0].data["comparison"]["vstar"]["baseline"] = "/data/old-model.json"
    _, page = page_of(tmp_path / "file.html", run)  # evaluate.py compared it
    assert "old-model" in page.texts and "+12.3" in page.texts
