"""What a record says in unusual ways is understood, or refused by name."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nemo_vopd.data.record_fields import check_answers, check_question
from nemo_vopd.errors import OptionError
from nemo_vopd.images import UnusableSample
from nemo_vopd.tools.prepare.prepare import prepare
from tests.tools.prepare.test_prepare import stored
from tests.tools.prepare.test_sources import BOXES, FULL, asked, lines, said

IMAGE = {"image": "images/0.jpg", "bbox": BOXES[0]}
TURNS = [asked("user", "<image>what?"), asked("assistant", "cat")]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "images").mkdir(parents=True)
    (tmp_path / "in" / "images" / "0.jpg").write_bytes(FULL[0])
    return tmp_path


def prepared(folder, rows):
    """(stored records, {reason: number of those that are dropped})"""
    lines(folder / "in" / "data.jsonl", rows)
    result = prepare(folder / "in" / "data.jsonl", folder / "out", overwrite=True, workers=1, progress=False)
    return [json.loads(part["json"]) for part in stored(folder / "out").values()], result["dropped"]


@pytest.mark.parametrize("blank", [None, "", " \n", "\u200b", [], ["", None]])
def test_blank_answers_are_none(folder, blank):
    """They are not counted, and hide neither the next column nor the reply in a conversation."""
    rows = [
        {**IMAGE, "question": "what?", "answer": blank},
        {**IMAGE, "question": "what?", "answer": blank, "solution": "cat"},
        {**IMAGE, "messages": TURNS, "answer": blank},
    ]
    metas, _ = prepared(folder, rows)
    assert [meta["answer"] for meta in metas] == [None, "cat", "cat"]
    assert json.loads((folder / "out" / "data_card.json").read_text())["with_answer"] == 2
    assert check_answers(blank) == []
    assert check_answers(["cat", *(blank if isinstance(blank, list) else [blank])]) == ["cat"]


@pytest.mark.parametrize("text", ["", " ", "\u200b", "\ufeff", "\0", "<image>", "<image> <image>", "<image>\n<image>"])
@pytest.mark.parametrize("column", ["question", "problem"])
def test_questions_without_visible_text_are_empty(folder, text, column):
    rows = [{**IMAGE, column: text}, {**IMAGE, column: f"<image>\n<image> what?{text.strip()}"}]
    metas, dropped = prepared(folder, rows)
    assert dropped == {"empty_question": 1}
    assert metas[0]["question"].strip(" \u200b\ufeff\0") == "what?"
    with pytest.raises(UnusableSample, match="empty_question"):
        check_question(text.replace("<image>", ""))


def test_the_first_column_that_holds_something_is_taken(folder):
    """Tables fill what a record does not say with null."""
    empty = {"images": None, "bbox": None, "query": "", "id": None}
    full = {"image": "images/0.jpg", "box": BOXES[0], "problem": "what?", "uid": "u"}
    metas, dropped = prepared(folder, [{**empty, **full}, {**full, "uid": "v", "bboxes": []}])
    assert [meta["id"] for meta in metas] == ["u", "v"] and not dropped
    assert all((meta["question"], meta["bbox"]) == ("what?", BOXES[0]) for meta in metas)


def test_conversations_in_other_clothes(folder):
    """As JSON text, and in tables that have both pairs of names and null in one of them."""
    told = [json.dumps(TURNS), " " + json.dumps([said("human", "what?"), said("gpt", "cat")], indent=1)]
    both = [{**turn, "role": None, "content": None} for turn in (said("human", "what?"), said("gpt", "cat"))]
    rows = [{**IMAGE, "messages": text} for text in (*told, TURNS, both)]
    metas, dropped = prepared(folder, [*rows, {**IMAGE, "messages": str(TURNS)}])
    assert [(meta["question"], meta["answer"]) for meta in metas] == [("what?", "cat")] * 4
    assert dropped == {"malformed_record": 1}
    assert "the conversation is a text that is no JSON" in (folder / "out" / "dropped.jsonl").read_text()
    pq.write_table(
        pa.table({"image": FULL[:2], "conversations": [both, both], "bbox": BOXES[:2]}), folder / "table.parquet"
    )
    prepare(folder / "table.parquet", folder / "2", progress=False)
    assert [json.loads(part["json"])["answer"] for part in stored(folder / "2").values()] == ["cat", "cat"]


def test_images_as_lists(folder):
    """Of one path, as LLaVA writes it also in JSON, and of the numbers of their bytes."""
    row = {"bbox": BOXES[0], "question": "what?"}
    given = [["images/0.jpg"], [{"path": "images/0.jpg"}], ["images/0.jpg", "images/1.jpg"], [], [1, "images/0.jpg"]]
    metas, dropped = prepared(folder, [{**row, "image": image} for image in given])
    assert len(metas) == 2 and dropped == {"several_images": 2, "missing_image": 1}
    numbers = [list(data) for data in FULL[:2]]
    shapes = {
        "image": (numbers, pa.list_(pa.uint8())),
        "images": ([[one] for one in numbers], pa.list_(pa.list_(pa.uint8()))),
    }
    for name, (values, form) in shapes.items():
        table = pa.table({name: pa.array(values, form), "question": ["a", "b"], "bbox": BOXES[:2]})
        pq.write_table(table, folder / f"{name}.parquet")
        prepare(folder / f"{name}.parquet", folder / name, progress=False)
        assert [part["image"] for part in stored(folder / name).values()] == FULL[:2]


LIST = json.dumps([{**IMAGE, "question": "what?"}] * 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{LIST}\n{LIST}", "goes on after the end of its list .record 4, byte"),
        (f"{LIST}\n{json.dumps(IMAGE)}\n", "goes on after the end of its list"),
        (LIST + " " * 3_000_000 + "x", "goes on after the end of its list"),
        (LIST.encode("utf-16"), "is UTF-16 or UTF-32; convert it to UTF-8"),
        ("\n".join([json.dumps(IMAGE)] * 3).encode("utf-16-le"), "is UTF-16 or UTF-32"),
        ("\n".join([json.dumps(IMAGE)] * 3).encode("utf-16-be"), "is UTF-16 or UTF-32"),
        (json.dumps(IMAGE).encode("utf-32-le"), "is UTF-16 or UTF-32"),
    ],
)
def test_files_of_which_a_part_would_be_lost(folder, text, words):
    source = folder / "in" / "data.json"
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(OptionError, match=f"source=.*data.json: {words}"):
        prepare(source, folder / "out", progress=False)
    source.write_text(LIST + " \n" * 1_000_000)
    assert prepare(source, folder / "out", progress=False) == {"kept": 3, "dropped": {}}


def test_a_mark_of_the_encoding_before_an_empty_line(folder):
    record = json.dumps({**IMAGE, "question": "what?"})
    (folder / "in" / "data.jsonl").write_bytes(f"\ufeff\r\n\r\n{record}\r\n".encode())
    assert prepare(folder / "in" / "data.jsonl", folder / "out", progress=False) == {"kept": 1, "dropped": {}}
    (part,) = stored(folder / "out").values()
    assert json.loads(part["json"])["id"] == "data-00000003"


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        ([0, 2], "train-00001-of-00004.parquet, train-00003-of-00004.parquet"),
        ([1, 2, 4], "train-00003-of-00004.parquet"),
        ([3], "train-00000-of-00004.parquet, train-00001-of-00004.parquet, train-00002-of-00004.parquet"),
        ([0, 1, 2, 3], None),
        ([1, 2, 3, 4], None),  # some programs count from 1
    ],
)
def test_parts_that_were_not_downloaded(tmp_path, there, missing):
    table = pa.table({"image": FULL[:1], "question": ["what?"], "bbox": BOXES[:1]})
    (tmp_path / "in").mkdir()
    for part in there:
        pq.write_table(table, tmp_path / "in" / f"train-{part:05d}-of-00004.parquet")
    pq.write_table(table, tmp_path / "in" / "test-00000-of-00003.parquet")  # of the other split nothing is asked
    options = {"split": "train", "progress": False}
    if missing:
        with pytest.raises(OptionError, match=f"source=.*/in: lacks {missing}; "):
            prepare(tmp_path / "in", tmp_path / "out", **options)
    else:
        assert prepare(tmp_path / "in", tmp_path / "out", **options)["kept"] == 4


def test_dark_images_are_counted(folder, capsys):
    Image.linear_gradient("L").point(lambda value: value // 16).save(folder / "in" / "images" / "dark.png")
    prepared(folder, [{**IMAGE, "question": "what?"}, {**IMAGE, "image": "images/dark.png", "question": "what?"}])
    assert "1 images are nearly black" in capsys.readouterr().out
