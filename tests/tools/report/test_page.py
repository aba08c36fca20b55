"""The report page: well formed, complete, self-contained, escaped, and unmoved by holes in the data."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from xml.etree import ElementTree

import numpy as np
import pytest
import vl_convert

from nemo_vopd.tools.report.charts import Series, line_chart, readings, smooth, vega_bundle
from nemo_vopd.tools.report.examples_file import Answer, Examples, picture, read_examples, write_examples
from nemo_vopd.tools.report.header import gap_figure_svg
from nemo_vopd.tools.report.numbers import format_number
from nemo_vopd.tools.report.results import evidence_panels, read_bins
from nemo_vopd.tools.report.run_files import Run, read_results, read_run
from tests.tools.report.html_page import SECTIONS, page_of
from tests.tools.report.run_folder import SUMMARY, example, image, trace, write_lines, write_run

NAN = float("nan")
HOSTILE = "<script>alert(\"1\")</script> & 'more'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "new-run", summary=SUMMARY)


@pytest.fixture
def full(folder, tmp_path):
    return page_of(tmp_path / "report.html", read_run(folder))


def test_every_section_is_there_and_every_reference_resolves(full):
    _, page = full
    assert page.sections == SECTIONS
    assert len(page.ids) == len(set(page.ids))
    targets = [value.removeprefix("#") for value in page.values("href")]
    assert targets == SECTIONS
    targets += page.values("aria-controls") + page.values("aria-labelledby")
    assert set(targets) <= set(page.ids)


@pytest.mark.parametrize(
    ("kept", "sections"),
    [
        ([], []),
        (["status.json"], ["facts"]),
        (["metrics.jsonl"], ["curves", "drops"]),  # the metrics count drops too
        (["config.yaml"], ["data", "config"]),
        (["examples.json", "warmup.jsonl"], ["warmup", "examples", "tokens"]),
        (["results"], ["evidence", "benchmarks"]),
    ],
)
def test_a_section_without_content_is_left_out(folder, tmp_path, kept, sections):
    part = tmp_path / "part"
    part.mkdir()
    for name in kept:
        source = folder / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, part / name)
    _, page = page_of(part / "report.html", read_run(part))
    assert page.sections == sections
    assert page.tags.count("h2") == len(sections)


def test_headline_charts_and_facts(full):
    _, page = full
    assert "narrowed from 45.0 \u00b1 3.3 to 4.0 \u00b1 2.4 points: 91% of it is closed" in page.text
    assert "\u00b1 marks 95% intervals over 1,024 questions." in page.text
    for heading in ("Loss", "Gradient norm", "Top-k mass", "Time by phase", "Mismatch of engine and trainer"):
        assert heading in page.texts
    assert "learning rate 2e\u22126; responses 64" in page.text  # lines that never move are words, not charts
    for fact in ("1234", "1,832,448", "8 min 41 s", "3 min 20 s", "torch", "2.13.0", "NVIDIA H100 80GB HBM3"):
        assert fact in page.texts


@pytest.mark.parametrize(
    ("bbox", "shown"),
    [
        ((-6, 3, 30, 9), (0, 3, 12, 9)),
        ((2, -1e99, 7, 1e99), (2, 0, 7, 12)),
        ((12, 3, 30, 9), None),
        ((-9, -9, -1, -1), None),
        ((NAN, 0, 1, 1), None),
        (None, None),
    ],
)
def test_a_box_is_drawn_inside_its_image(bbox, shown, tmp_path):
    _, page = page_of(tmp_path / "report.html", Run("a", examples=Examples([example(bbox=bbox)])))
    edges = [[float(page.values(name)[0]) for name in ("x", "y")] for _ in range(shown is not None)]
    assert page.tags.count("rect") == (2 if shown else 0)
    if shown:
        sizes = [float(value) for tag, name, value in page.attributes if tag == "rect" and name in ("width", "height")]
        assert edges == [list(shown[:2])] and sizes[:2] == [shown[2] - shown[0], shown[3] - shown[1]]


def test_bins_of_evidence_keep_their_order_and_place():
    row = {"num_samples": 8, "full": 0.5, "full_interval": [0.2, 0.8], "crop": 0.9, "crop_interval": [0.7, 1.0]}
    bins = read_bins([row | {"low": 0.1, "high": None}, row | {"low": 0, "high": 0.1}, {"low": "x"}, None])
    assert [(one.low, one.high) for one in bins] == [(0.025, 0.1), (0.1, 0.4)]
    for same in ([0.01] * 5, [0.01, 0.0101, 0.5], [0.02]):
        bins = read_bins([row | {"low": low, "high": low} for low in same])
        for panel in evidence_panels(bins, bins, ("a", "b")):
            names = [one["band"] for one in panel.chart["data"]["values"]]
            assert len(set(names)) == len(same)  # bins of one size do not fall on top of each other


def test_every_chart_is_sound_vega(full):
    _, page = full
    assert len(page.charts) >= 20
    for chart in page.charts:
        vl_convert.vegalite_to_vega(chart)


def test_answers_are_marked_by_symbol_and_word(folder, tmp_path):
    run = Run("a", examples=Examples([example(), example(full_before=None, crop_before=Answer("8", None))]))
    _, page = page_of(tmp_path / "report.html", run)
    words = [word for word in page.texts if word in ("right:", "wrong:", "not asked")]
    assert words == ["wrong:", "right:", "right:", "wrong:", "not asked", "right:", "wrong:"]
    run.examples.examples = [example(full_before=None, crop_before=None, image=None, bbox=None, answer=None)]
    _, page = page_of(tmp_path / "report.html", run)
    assert "Before" not in page.texts and "After" in page.texts and "Full view" in page.texts


def test_token_viewer_opens_at_the_largest_divergence_and_is_reachable_by_keyboard(tmp_path):
    _, page = page_of(tmp_path / "report.html", Run("a", examples=Examples([], [trace()], "Sampled before training.")))
    assert page.values("aria-selected") == ["false", "true", "false"]
    assert page.values("tabindex") == ["-1", "0", "-1"]
    assert "\u00b7number" in page.texts and "\u00b7digit\u21b5" in page.texts
    assert "not among its top tokens" in page.texts and "Sampled before training." in page.text


def test_nothing_is_loaded_from_elsewhere(full):
    text, page = full
    own = text.replace(vega_bundle(), "")
    assert len(own) < len(text) - 500_000 and not re.search(r"https?:|//[a-z]+\.|@import|url\(", own)
    assert all(re.match(r"data:image/(png|jpeg);base64,", value) for value in page.values("src"))
    assert not {"link", "iframe", "object", "base"} & set(page.tags)


def hostile(value):
    """The same JSON with every text in it replaced."""
    if isinstance(value, dict):
        return {key: hostile(entry) for key, entry in value.items()} | {HOSTILE: HOSTILE}
    if isinstance(value, list):
        return [hostile(entry) for entry in value]
    return HOSTILE if isinstance(value, str) and not value.startswith("data:") else value


def test_text_is_escaped(folder, tmp_path):
    target = tmp_path / "<b>run"
    shutil.copytree(folder, target)
    for path in target.rglob("*"):
        if path.suffix == ".json":
            path.write_text(json.dumps(hostile(json.loads(path.read_text()))))
        elif path.suffix == ".jsonl":
            rows = [hostile(json.loads(line)) | {f"seconds_{HOSTILE}": 1.0, HOSTILE: 2.0} for line in path.open()]
            write_lines(path, rows)
    (target / "config.yaml").write_text(json.dumps({"data": {"path": str(target / "data")}, HOSTILE: {HOSTILE: 1}}))
    shutil.copy(target / "results" / "student.json", target / "results" / f"{HOSTILE.replace('/', '')}.json")
    run = read_run(target)
    run.notes.append(HOSTILE)
    text, page = page_of(tmp_path / "report.html", run, read_run(target), run.results)
    assert page.sections == SECTIONS
    assert page.tags.count("script") == 3 and "<b>run" not in text
    assert "alert(" in page.text and "<script>alert" not in text


def test_an_image_can_only_be_an_image():
    sound = picture(image())
    for uri in ("javascript:alert(1)", "data:text/html;base64,AAAA", sound.uri + '" onload="x', "https://a.b/c.png", 3):
        data = {"examples": [{"question": "a", "image": {"uri": uri, "width": 3, "height": 3}}]}
        assert read_examples(data).examples[0].image is None
    read = read_examples({"examples": [{"image": vars(sound)}, {"image": vars(sound) | {"width": NAN}}, "x"]})
    assert [one.image for one in read.examples] == [sound, None]


def test_examples_survive_their_file_and_large_images_are_bounded(tmp_path):
    large = picture(image((3000, 2000)))
    assert (
        large.uri.startswith("data:image/jpeg")
        and len(large.uri) < 400_000
        and (large.width, large.height) == (3000, 2000)
    )
    content = Examples([example(image=large)], [trace(divergence=[NAN, 0.5, 0.1])], "A note.")
    write_examples(tmp_path / "examples.json", content)
    read = read_examples(json.loads((tmp_path / "examples.json").read_text()))
    assert read.examples[0].image == large and read.examples[0].full_after == Answer("7.", True)
    assert read.traces[0].tokens == trace().tokens and read.traces[0].student_top == trace().student_top
    assert math.isnan(read.traces[0].divergence[0]) and read.note == "A note."


def test_holes_in_the_data_do_not_crash(folder, tmp_path):
    metrics = [{}, {"step": 1, "loss": NAN}, {"step": 2, "loss": math.inf}, {"loss": None, "lr": "x"}, {"step": 5}]
    for i, rows in enumerate((metrics, metrics + [{"step": 6, "loss": 0.5, "seconds_rollout": NAN}], [{"loss": 1.0}])):
        target = tmp_path / f"run{i}"
        shutil.copytree(folder, target)
        write_lines(target / "metrics.jsonl", rows)
        write_lines(target / "warmup.jsonl", rows)
        measured = [{"step": 0}, {"full_accuracy": NAN, "crop_accuracy": 0.5}, {"step": 9, "full_accuracy": 10**400}]
        write_lines(target / "evaluations.jsonl", measured)
        summary = {"full_accuracy_before": NAN, "gap_closed": None, "phases": {}, "wall_seconds": NAN, "odd": {"a": []}}
        (target / "summary.json").write_text(json.dumps(summary))
        (target / "status.json").write_text("[1]")
        (target / "config.yaml").write_text("a: [")
        with (target / "dropped.jsonl").open("a") as file:
            file.write('{"reason": 3}\nnull\n{"step": 12, "id"')
        entry = {"full": 3, "crop": {"accuracy": "x"}, "categories": [1], "metrics": 2, "by_evidence_size": {}}
        cases = {"a": entry, "b": 7, "c": {"categories": {"x": 1, "y": {}}, "by_evidence_size": [{"low": NAN}]}}
        (target / "results" / "odd.json").write_text(json.dumps({"results": cases, "comparison": [], "model": None}))
        run, other = read_run(target), read_run(folder)
        run.data_card = {"kept": None, "image_megapixels": {"edges": [1], "counts": [2]}, "sources": [3, {}], "crop": 1}
        run.examples = Examples(
            [example(bbox=(NAN, 0, 1, 1), image=picture(image((900, 9), "RGBA")), crop=picture(image((1, 1), "L")))],
            [
                trace(student_log_probs=[NAN], teacher_log_probs=[-math.inf] * 3, divergence=[NAN] * 3),
                trace(student_top=[], teacher_top=[[("a", NAN)]], divergence=[], image=None, crop=None),
                trace(tokens=[]),
            ],
        )
        for pair in ((run, other), (other, run), (run, None), (run, run)):
            _, page = page_of(tmp_path / "report.html", *pair)
            for name in ("d", "points", "cx", "cy", "x", "y", "width", "height"):
                assert not [value for value in page.values(name) if "nan" in value or "inf" in value]
        notes = page.texts  # of two runs, each under its name
        assert f"run{i}: status.json: no JSON object, left out" in notes
        assert f"run{i}: dropped.jsonl: 2 lines cut off or damaged, left out" in notes
        assert f"run{i}: config.yaml: no YAML of options, left out" in notes


LOSSES = [{"step": i, "loss": 1e308 * (-1) ** i, "lr": 10.0**i, "seconds_rollout": 1e308} for i in range(50)]
TWICE = '{"step": 1, "loss": 1e-320}\n{"step": 2, "loss": 2e-320, "a/b": 1, "a": {"b": 2}}\n'
CARDS = [
    {"sources": 5, "kept": [[]], "bytes": 1e300, "splits": [1], "dropped": "a", "crop": 3, "options": {"a": {"b": []}}},
    {"sources": {"a": 1}, "image_megapixels": {"edges": "ab", "counts": [1]}, "relative_box_area": [1], "with_box": {}},
    {"sources": [{"path": 3, "layout": [], "kept": "x", "dropped": [1]}], "dropped": {"a": "b", "c": 1e99}},
    {"image_megapixels": {"edges": [0, None, {}], "counts": ["x", 1e99], "median": []}, "bytes": -3},
]
RESULTS = [
    {"results": [1, {}], "comparison": [1], "model": [1]},
    {"results": {"a": {"accuracy": NAN, "full": {"accuracy": 1e300, "interval": "ab"}}, "b": {}, "c": []}},
    {"results": {"a": {"title": 3, "accuracy": "x", "full": [], "crop": {"accuracy": 0.5, "interval": [{}, "x"]},
                       "by_evidence_size": [{"low": 1e-320, "high": 1e99, "full": 1e99, "full_interval": "ab"}] * 2,
                       "gap": [], "categories": {"a": {"full": [], "num_samples": "x"}}, "metrics": {"f1": [1]}}},
     "comparison": {"a": {"difference": "x", "interval": 5}}},
]  # fmt: skip
DAMAGED = {
    "range": ("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in LOSSES)),
    "steps": ("metrics.jsonl", '{"step": 1e300, "loss": 1}\n{"step": -1e300, "loss": 2}\n{"step": 1e17, "loss": 3}\n'),
    "names and subnormals": ("metrics.jsonl", TWICE),
    "date": ("config.yaml", "a: 2020-13-45"),
    "digits": ("config.yaml", "a: " + "1" * 5000),
    "hexadecimal": ("config.yaml", "a: 0x" + "1" * 5000),
    "tag": ("config.yaml", "a: !!timestamp soon"),
    "cycle": ("config.yaml", "a: &a {b: *a}"),
    "long path": ("config.yaml", f"data: {{path: {'a' * 5000}}}"),
    "surrogate": ("dropped.jsonl", '{"step": 1, "id": "\\ud800", "reason": "r\\udfff", "detail": 3}'),
    "deep": ("summary.json", '{"a": ' + "[" * 900 + "]" * 900 + "}"),
    "progress": ("status.json", '{"step": 1e300, "max_steps": 1e99, "reason": []}'),
    **{f"card {i}": ("data/data_card.json", json.dumps(card)) for i, card in enumerate(CARDS)},
    **{f"results {i}": ("results/odd.json", json.dumps(one)) for i, one in enumerate(RESULTS)},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_does_not_keep_the_page_from_being_written(tmp_path, name):
    target = write_run(tmp_path / "run", num_steps=3)
    path, content = DAMAGED[name]
    (target / path).write_text(content, encoding="utf-8")
    run = read_run(target)
    for pair in ((run, None), (run, read_run(target))):
        _, page = page_of(tmp_path / "report.html", *pair)
        for attribute in ("d", "points", "cx", "cy", "x", "y", "width", "height"):
            assert not [one for one in page.values(attribute) if "nan" in one or "inf" in one]
        # a long option is folded and wrapped; a long number would widen the page
        assert name == "long path" or max(len(word) for text in page.texts for word in text.split()) < 120


def test_a_result_file_that_cannot_be_read_is_a_note(tmp_path):
    (tmp_path / "a.json").write_text("{")
    notes: list[str] = []
    assert read_results(tmp_path / "a.json", notes).benchmarks == {} and notes == ["a.json: no JSON object, left out"]


def test_the_files_of_a_quickstart_are_found_below_its_folder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "quick" / "train")
    shutil.move(tmp_path / "quick" / "train" / "summary.json", tmp_path / "quick" / "summary.json")
    run = read_run(tmp_path / "quick")
    assert run.name == "quick" and run.summary == SUMMARY and len(run.metrics.steps) == 300 and run.config["seed"] == 1


def test_a_long_run_makes_a_small_page_in_seconds(tmp_path):
    num, rng = 100_000, np.random.default_rng(0)
    noise = rng.normal(size=num)
    keys = ["loss", "grad_norm", "entropy", "lr", "tokens_per_second", "seconds_rollout", "seconds_student", "other"]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(num):
            numbers = ", ".join(f'"{key}": {i + noise[step]:.6g}' for i, key in enumerate(keys))
            file.write(f'{{"step": {step}, {numbers}}}\n')
    start = time.perf_counter()
    text, _ = page_of(tmp_path / "report.html", read_run(tmp_path), read_run(tmp_path))
    assert time.perf_counter() - start < 30
    assert len(text) < 2_000_000


@pytest.mark.parametrize("summary", [SUMMARY, {}, {"full_accuracy_before": NAN, "crop_accuracy_before": 0.5}])
def test_gap_figure_is_a_standalone_svg(summary):
    text = gap_figure_svg(summary)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in text and "nan" not in text


def test_gap_figure_heights_follow_accuracy():
    root = ElementTree.fromstring(gap_figure_svg(SUMMARY))
    bars = [path for path in root.iter("{http://www.w3.org/2000/svg}path") if path.get("aria-roledescription") == "bar"]
    heights = [abs(float(re.findall(r"v(-?[\d.]+)", bar.get("d", ""))[0])) for bar in bars]
    accuracies = [SUMMARY[f"{view}_accuracy_{when}"] for when in ("before", "after") for view in ("full", "crop")]
    assert np.allclose(np.array(heights) / heights[0], np.array(accuracies) / accuracies[0], atol=2e-3)


def test_smoothing_leaves_out_nan():
    values = np.array([1.0, NAN, 3.0, 5.0])
    assert smooth(values, 3).tolist() == [1.0, 2.0, 4.0, 4.0]
    assert np.isnan(smooth(np.array([NAN, NAN]), 3)).all()


def test_numbers_read_well():
    texts = {0.0: "0", 1234.5: "1,234", 0.12345: "0.123", 2e-6: "2e\u22126", -3.5: "\u22123.50", NAN: "n/a", 12: "12"}
    assert {value: format_number(value) for value in texts} == texts


def test_a_line_has_holes_and_long_curves_stay_small():
    holes = line_chart([Series("loss", "red", [0, 1, 2], [0.5, NAN, 1.0])], label="a", y_label="b")
    assert holes is not None and [row["y"] for row in holes["data"]["values"]] == [0.5, None, 1.0]
    steps = np.arange(20_000.0)
    chart = line_chart([Series("loss", "red", steps.tolist(), np.exp(-steps / 5000).tolist())], label="a", y_label="b")
    assert len(json.dumps(chart)) < 50_000


def test_the_pointer_reads_each_run_at_its_own_steps():
    ours, theirs = np.arange(0.0, 100.0, 10.0), np.arange(0.0, 45.0, 5.0)
    places, texts = readings([("a", ours, ours), ("b", theirs, 2 * theirs)], format_number)
    assert places == ours.tolist()
    assert texts[1] == ("b", ["0", "20", "40", "60", "80", "80", *["n/a"] * 4])
