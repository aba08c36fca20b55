"""Benchmark files with faults: what cannot be used is left out with a reason and counted, and nothing is made up."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_vopd.errors import OptionError
from nemo_vopd.tools.evaluation.asking import read_answers
from nemo_vopd.tools.evaluation.benchmark_files import _files, read_benchmark, read_rows
from nemo_vopd.tools.evaluation.benchmarks import BENCHMARKS, Row
from nemo_vopd.tools.evaluation.evaluate import evaluate
from nemo_vopd.tools.evaluation.questions import OPTION, Question, told_apart
from tests.tools.evaluation.published import NUM, PUBLISHED, Server, png, reply, tsv, which
from tests.tools.evaluation.test_benchmarks import FORMS, served

NOTHING: Row = dict.fromkeys("ABCD")
CHOICES = "multi-choice options"
FEW = "lists fewer than two options"
DEEP = "[" + "-" * 200_000 + "1]"


def first_row(folder: Path, name: str, form: str) -> tuple[Row, Callable[[Row], Question]]:
    """The first row in the given form of a benchmark, and what makes a question of it."""
    PUBLISHED[name][form](folder)
    source, files = _files(BENCHMARKS[name], folder)
    return next(iter(read_rows(files[0], source.columns))), lambda row: source.question(row, files[0])


@pytest.mark.parametrize(
    "name,form,cells,reason",
    [
        ("vstar", "parquet", {"text": "What is it?"}, FEW),
        ("vstar", "parquet", {"text": None}, "has no question"),
        ("vstar", "tsv", NOTHING, FEW),
        ("vstar", "tsv", NOTHING | {"A": "red", "B": "nan"}, FEW),
        ("vstar", "tsv", {"question": "\u200b?"}, "has no question"),
        ("vstar", "tsv", {"image": "val/images/0001"}, "has 'val/images/0001' in place of an image"),
        ("zoombench", "parquet", {"response": None}, "has no answer"),
        ("zoombench", "parquet", {"response": "nan"}, "has no answer"),
        ("zoombench", "parquet", {"response": "E"}, "has the answer 'E', which is none of its options A, B, C, D"),
        ("hrbench-4k", "parquet", NOTHING, FEW),
        ("hrbench-4k", "parquet", {"A": ["red"]}, "has a list in place of a text"),
        ("mme-realworld", "parquet", {CHOICES: float("nan")}, FEW),
        ("mme-realworld", "parquet", {CHOICES: ["red", "blue"]}, FEW),
        ("mme-realworld", "parquet", {CHOICES: ["red", "blue"], "A": "red", "B": "blue"}, FEW),
        ("mme-realworld-lite", "tsv", {CHOICES: "[{['a']}]"}, FEW),
        ("mme-realworld-lite", "tsv", {CHOICES: DEEP}, FEW),
        ("mme-realworld-lite", "tsv", {CHOICES: '["(A) red", "(B) blue", null]'}, FEW),
        ("visualprobe", "json", {"solution": None}, "has no answer"),
        ("visualprobe", "json", {"solution": [float("nan"), " "]}, "has no answer"),
        ("visualprobe", "json", {"solution": {"text": "Exit 0"}}, "has a dict in place of a text"),
        ("visualprobe", "json", {"problem": None}, "has no question"),
        ("visualprobe", "json", {"problem": "<image>\n"}, "has no question"),
        ("visualprobe", "json", {"images": ["../../secret.png"]}, "which is outside the folder"),
        ("visualprobe", "json", {"images": ["/etc/hostname"]}, "which is outside the folder"),
        ("visualprobe", "json", {"images": ["a.png", "b.png"]}, "has 2 images in place of one"),
        ("mmvp", "tsv", {"index": ""}, "has the index '', which is no whole number"),
        ("mmvp", "csv", {"Index": "1.5"}, "has the index '1.5', which is no whole number"),
        ("mmvp", "csv", {"Options": "(a) Open"}, FEW),
        ("cv-bench", "parquet", {"prompt": "What is it?"}, FEW),
        ("cv-bench", "parquet", {"prompt": "What is it?", "A": "red", "B": "blue"}, FEW),
        ("mmstar", "parquet", {"question": "What is it?"}, FEW),
        ("pope", "tsv", {"question": " "}, "has no question"),
    ],
)  # fmt: skip
def test_a_row_without_question_options_or_key_has_a_reason(name, form, cells, reason, tmp_path):
    (tmp_path.parent / "secret.png").write_bytes(png(0))
    row, question = first_row(tmp_path, name, form)
    question(row)
    with pytest.raises(ValueError, match=reason):
        question(row | cells)


VALUES = [None, float("nan"), float("inf"), 0, 1.5, True, "", "nan", "\ufeff", "x\0", "F", "[1, [2]]", "[1], 2", DEEP]
VALUES += [[], ["x"], [None], {}, {"bytes": b""}, {"bytes": None, "path": "x.png"}, b"", b"x", ["(A) x"], "9" * 5000]


@pytest.mark.parametrize("name,form", FORMS)
def test_whatever_a_cell_holds_nothing_is_made_up(name, form, tmp_path):
    row, question = first_row(tmp_path, name, form)
    asked = 0
    for column in row:
        for value in VALUES:
            try:
                q = question(row | {column: value})
            except (ValueError, OSError):
                continue
            asked += 1
            assert (
                q.answer and q.answer not in ("None", "nan") and "None" not in q.prompt and re.search(r"\w", q.prompt)
            )
            if q.kind == OPTION:
                assert len(q.options) > 1 and q.answer in q.options and all(q.options.values())
    assert asked


def test_any_of_several_solutions_is_right(tmp_path):
    row, question = first_row(tmp_path, "visualprobe", "json")
    found = question(row | {"solution": ["Exit 0", None, "exit zero"]})
    assert [found.answer, *found.other_answers] == ["Exit 0", "exit zero"]


def rewritten(file: Path, change: Callable[[list[Row]], None]) -> None:
    """Write `file`, a table, anew after `change` to its rows."""
    rows = list(read_rows(file, []))
    change(rows)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        tsv(file, "," if file.suffix == ".csv" else "\t", **columns)


def replying(name: str):
    return Server(lambda text, image: reply(name, *which(image))).running()


def test_used_and_not_used_are_all_that_were_read(tmp_path, capsys):
    PUBLISHED["zoombench"]["parquet"](tmp_path / "zoom")
    broken = {"bytes": b"no image", "path": ""}

    def change(rows):
        rows[0]["image"] = rows[1]["crop_image"] = broken
        rows[2] |= {"image": broken, "crop_image": broken}
        rows[3]["response"] = None
        rows[4]["crop_image"] = None

    rewritten(tmp_path / "zoom" / "data" / "test.parquet", change)
    options = ["benchmark=zoombench", f"data.path={tmp_path}/zoom", f"output={tmp_path}/out.json"]
    with replying("zoombench") as server:
        result = evaluate(served(server.url, *options))["results"]["zoombench"]
        assert (result["num_samples"], result["num_unusable"], result["num_both_views"]) == (4, 2, 1)
        out = capsys.readouterr().out
        assert "questions used without one of their views: 2 (z0, full view" in out
        assert "  not used: 2 of 6 questions\n" in out
        assert "z2, full view: unreadable_image" in out and "row 4: has no answer" in out
        sizes = {
            (a.id, a.view): a.evidence for a in read_answers(tmp_path / "out.zoombench.answers.jsonl", "output")[1]
        }
        assert sizes["z0", "crop"] is None and sizes["z1", "full"] is None and sizes["z5", "full"] == 1 / 6
        result = evaluate(served(server.url, *options, "views=[crop]"))["results"]["zoombench"]
        assert (result["num_samples"], result["num_unusable"]) == (2, 4)
        assert "z4: has neither a box nor a crop" in capsys.readouterr().out


@pytest.mark.parametrize(
    "form,index,unusable,pairs",
    [
        ("tsv", ["0", "1", "2", "3", "4", "5"], 0, 1 / 3),
        ("tsv", ["1.0", "2.0", "3.0", "4.0", "5.0", "6.0"], 0, 1 / 3),
        ("csv", ["1.0", "2.0", "3.0", "4.0", "5.0", "6.0"], 0, 1 / 3),
        ("tsv", ["1", "2", "2", "4", "5", "6"], 1, 1 / 2),
        ("tsv", ["1", "2", "", "4", "5", "6"], 1, 1 / 2),
        ("tsv", ["0", "1", "2", "3", "4", "5", "no image"], 1, 0),  # counted from 0, which the second row tells too
        ("tsv", ["101", "102", "103", "104", "105", "106"], 0, 1 / 3),
    ],
)  # fmt: skip
def test_pairs_of_mmvp_however_its_questions_are_numbered(form, index, unusable, pairs, tmp_path):
    PUBLISHED["mmvp"][form](tmp_path)
    column = "Index" if form == "csv" else "index"

    def change(rows):
        for row, number in zip(rows, index, strict=False):
            row[column] = number
        if "no image" in index:
            rows[0]["image"] = ""

    rewritten(tmp_path / ("Questions.csv" if form == "csv" else "MMVP.tsv"), change)
    with replying("mmvp") as server:
        result = evaluate(served(server.url, "benchmark=mmvp", f"data.path={tmp_path}"))["results"]["mmvp"]
    assert (result["num_samples"], result["num_unusable"]) == (NUM - unusable, unusable)
    assert result["metrics"] == {"pair_accuracy": pytest.approx(pairs)}


def test_no_two_questions_have_one_name():
    names = ["7", "7", "7#2", "7#2", "7#2#2", "x", "7"]
    for given in (names, names[::-1]):
        seen: dict[str, int] = {}
        assert len({told_apart(name, seen) for name in given}) == len(names)


@pytest.mark.parametrize(
    "cells,column",
    [
        ({1: '"Stop'}, "question"),  # to the end of the file
        ({1: '"Stop', 4: 'what"'}, "question"),
        ({2: '"Stop', 3: 'what"'}, "question"),
        ({1: 'Who says "Stop"?', 4: '6" by 4"'}, None),
        ({1: '"Who says ""Stop""?\nAnd\twhy?"'}, None),
    ],
)  # fmt: skip
def test_rows_that_a_quotation_mark_hides_are_told(cells, column, tmp_path):
    PUBLISHED["vstar"]["tsv"](tmp_path)
    file = tmp_path / "VStarBench.tsv"
    rows = [line.split("\t") for line in file.read_text().splitlines()]
    for number, text in cells.items():
        rows[number][2] = text
    file.write_text("".join("\t".join(row) + "\n" for row in rows))
    if column is None:
        questions = list(read_benchmark(BENCHMARKS["vstar"], tmp_path, []))
        assert len(questions) == NUM and "Stop" in questions[0].prompt
    else:
        rule = f"VStarBench.tsv: has further rows in column {column} of row {min(cells)}: a quotation mark"
        with pytest.raises(OptionError, match=rule):
            next(read_benchmark(BENCHMARKS["vstar"], tmp_path, []))


@pytest.mark.parametrize(
    "name,form,file", [("vstar", "tsv", "VStarBench.tsv"), ("mmstar", "parquet", "mmstar.parquet")]
)
def test_a_copy_of_a_file_is_not_asked_again(name, form, file, tmp_path):
    PUBLISHED[name][form](tmp_path)
    (tmp_path / file).rename(tmp_path / f"a{(tmp_path / file).suffix}")
    shutil.copy(tmp_path / f"a{Path(file).suffix}", tmp_path / f"b{Path(file).suffix}")
    unusable: list[str] = []
    assert len(list(read_benchmark(BENCHMARKS[name], tmp_path, unusable))) == len(unusable) == NUM
    assert re.fullmatch(rf"b\.{form}, row 1: is in .*/a\.{form} too", unusable[0])


def test_a_part_that_is_missing_from_the_mean_is_told(tmp_path, capsys):
    PUBLISHED["cv-bench"]["parquet"](tmp_path)
    with replying("cv-bench") as server:
        config = served(server.url, "benchmark=cv-bench", f"data.path={tmp_path}")
        evaluate(config)
        assert "no questions of" not in capsys.readouterr().out
        (tmp_path / "test_3d.parquet").unlink()
        assert evaluate(config)["results"]["cv-bench"]["accuracy"] == 0.75
    assert "  no questions of 3D: the accuracy is the mean of the others\n" in capsys.readouterr().out
