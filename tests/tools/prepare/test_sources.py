"""Every form of source gives the same records; what is missing or ambiguous is told in one line."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nemo_vopd.config import CropConfig, DataConfig
from nemo_vopd.data.encoder import cut_crop
from nemo_vopd.decoding import load_with_box
from nemo_vopd.errors import OptionError
from nemo_vopd.tools.prepare.options import Columns
from nemo_vopd.tools.prepare.prepare import prepare
from nemo_vopd.tools.prepare.sources import open_sources
from tests.tools.prepare.test_prepare import stored

NUM = 7


def jpeg(index, size=(60, 40)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (30 * index, 90, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


FULL = [jpeg(i) for i in range(NUM)]
CROPS = [jpeg(i, (20, 20)) for i in range(NUM)]
BOXES = [[i, 2, i + 20, 30] for i in range(NUM)]


@pytest.fixture
def folder(tmp_path):
    """Images as files, as a published copy of Vision-OPD-6K has them."""
    for name, images in (("images", FULL), ("teacher_images", CROPS)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for index, data in enumerate(images):
            (tmp_path / "in" / name / f"{index}.jpg").write_bytes(data)
    return tmp_path


def check(source, output, *, crops=True, boxes=False, answers=True, **options):
    """Prepare and compare with what was put in."""
    assert prepare(source, output, shard_size=3, workers=1, progress=False, **options) == {"kept": NUM, "dropped": {}}
    parts = list(stored(output).values())
    metas = [json.loads(part["json"]) for part in parts]
    assert [part["image"] for part in parts] == FULL
    assert [part.get("crop") for part in parts] == (CROPS if crops else [None] * NUM)
    assert [meta["bbox"] for meta in metas] == (BOXES if boxes else [None] * NUM)
    assert [meta["question"] for meta in metas] == [f"what is {i}?" for i in range(NUM)]
    assert [meta["answer"] for meta in metas] == [f"it is {i}" if answers else None for i in range(NUM)]
    return [meta["id"] for meta in metas]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def six_k(index):
    return {
        "images": [f"images/{index}.jpg"],
        "teacher_images": [f"teacher_images/{index}.jpg"],
        "problem": f"<image>\nwhat is {index}?",
        "answer": f"it is {index}",
    }


def structs(images, path=None):
    return [{"bytes": data, "path": path} for data in images]


def test_a_folder_of_vision_opd_6k(folder):
    lines(folder / "in" / "train.jsonl", map(six_k, range(NUM)))
    assert open_sources([folder / "in"])[0].layout == "Vision-OPD-6K"
    assert check(folder / "in", folder / "out")[0] == "train-00000001"


@pytest.mark.parametrize("prefix", ["", "images/"])
def test_images_that_are_still_packed(folder, prefix):
    lines(folder / "in" / "train.jsonl", map(six_k, range(NUM)))
    images = folder / "in" / "images"
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as tar:
        for path in sorted(images.iterdir()):
            tar.add(path, prefix + path.name)
            path.unlink()
    cut = len(whole.getvalue()) // 2
    (images / "images.tar.gz.part-aa").write_bytes(whole.getvalue()[:cut])
    (images / "images.tar.gz.part-ab").write_bytes(whole.getvalue()[cut:])
    target = folder / "in" if prefix else images
    with pytest.raises(OptionError, match="still packed in images/images.tar.gz.part-aa") as caught:
        prepare(folder / "in", folder / "out", progress=False)
    assert caught.value.remedy == f"unpack it: cat {images}/images.tar.gz* | tar -xz -C {target}"


def pack(folder, how):
    """`folder` (images) in an archive, as `how` says; (archive, beginning of the remedy) of what is left."""
    root, name = folder.parent, folder.name
    if how == "folder's entry":
        archive = folder / "x.tar.gz"
        with tarfile.open(archive.with_suffix(".new"), "w:gz") as tar:
            tar.add(folder, name, filter=lambda entry: None if entry.name.endswith(".new") else entry)
        remedy = f"cat {archive} | tar -xz -C {root}"
    elif how == "plain, of the files":
        archive = root / f"{name}.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(folder, ".")
        remedy = f"mkdir -p {folder} && cat {archive} | tar -x -C {folder}"
    else:
        archive = (folder if "inside" in how else root) / f"{name}.zip"
        prefix = f"{name}/" if "folder" in how else ""
        with zipfile.ZipFile(archive.with_suffix(".new"), "w") as file:
            for image in sorted(folder.glob("*.jpg")):
                file.write(image, prefix + image.name)
        remedy = f"unzip {archive} -d {root if prefix else folder}"
    for image in folder.glob("*.jpg"):
        image.unlink()
    if archive.parent == root:
        shutil.rmtree(folder)
    if archive.with_suffix(".new").exists():
        archive.with_suffix(".new").rename(archive)
    return archive, remedy


HOW_PACKED = [
    "folder's entry",
    "plain, of the files",
    "zip inside",
    "zip inside, with folder",
    "zip beside, with folder",
]


@pytest.mark.parametrize("name", ["images", "teacher_images"])
@pytest.mark.parametrize("how", HOW_PACKED)
def test_the_remedy_unpacks(folder, how, name):
    lines(folder / "in" / "train.jsonl", map(six_k, range(NUM)))
    archive, remedy = pack(folder / "in" / name, how)
    with pytest.raises(OptionError, match=f"still packed in {archive.relative_to(folder / 'in')};") as caught:
        prepare(folder / "in", folder / "out", progress=False)
    assert caught.value.remedy == f"unpack it: {remedy}"
    if remedy.startswith("unzip"):  # which need not be here
        with zipfile.ZipFile(archive) as file:
            file.extractall(remedy.split()[-1])
    else:
        subprocess.run(remedy, shell=True, check=True)
    check(folder / "in", folder / "out")


def test_a_zip_in_pieces(folder):
    lines(folder / "in" / "train.jsonl", map(six_k, range(NUM)))
    archive, _ = pack(folder / "in" / "images", "zip beside, with folder")
    archive.with_name("images.zip.001").write_bytes(archive.read_bytes()[:2000])
    archive.with_name("images.zip.002").write_bytes(archive.read_bytes()[2000:])
    archive.unlink()
    with pytest.raises(OptionError) as caught:
        prepare(folder / "in", folder / "out", progress=False)
    joined = f"{folder}/in/images-joined.zip"
    assert caught.value.remedy == f"unpack it: cat {archive}* > {joined} && unzip {joined} -d {folder}/in"


def split_tables(folder, *names):
    """A parquet folder with files of one row, which differ in their answer: the file's name."""
    for name in names:
        row = {"image": FULL[0], "question": "q", "bbox": BOXES[0], "answer": name}
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([row]), folder / name)
    return folder


def answers(output):
    return [json.loads(part["json"])["answer"] for part in stored(output).values()]


@pytest.mark.parametrize(
    ("test", "train"),
    [("test.parquet", "train.parquet"), ("dev_1.parquet", "train-a.parquet"), ("c/val/0.parquet", "c/train/0.parquet")],
)
def test_splits_by_their_names(folder, test, train):
    source = split_tables(folder / "hub", test, train)
    with pytest.raises(OptionError, match="split=null: .* has the splits .*train.*; set split=train$"):
        prepare(source, folder / "out", progress=False)
    prepare(source, folder / "out", split="train", progress=False)
    assert answers(folder / "out") == [train]


def test_names_that_tell_of_no_split(folder):
    source = split_tables(folder / "hub", "trains.parquet", "tested.parquet")
    with pytest.raises(OptionError, match="split=dev: .* has no splits; set split=null"):
        prepare(source, folder / "out", split="dev", progress=False)
    assert prepare(source, folder / "out", progress=False)["kept"] == 2


def test_split_is_for_the_sources_that_have_splits(folder):
    hub = split_tables(folder / "hub", "test.parquet", "train.parquet")
    none = split_tables(folder / "none", "part.parquet")
    lines(folder / "in" / "data.jsonl", map(six_k, range(NUM)))
    sources = [hub, none, folder / "in", folder / "in" / "data.jsonl"]
    prepare(sources, folder / "out", split="test", progress=False)
    counts = [len(answers(folder / "out" / name)) for name in ("hub", "none", "in", "data")]
    assert answers(folder / "out" / "hub") == ["test.parquet"] and counts == [1, 1, NUM, NUM]
    (folder / "in" / "data.jsonl").rename(folder / "in" / "train.jsonl")
    with pytest.raises(OptionError, match="is a folder with train.jsonl"):
        prepare([hub, folder / "in"], folder / "2", split="test", progress=False)


@pytest.mark.parametrize("form", ["own.jsonl", "own.parquet"])
def test_fields_of_structs_must_be_there(folder, form):
    rows = [{"image": f"images/{i}.jpg", "question": "q", "bbox": BOXES[i], "more": {"gold": "g"}} for i in range(NUM)]
    source = folder / "in" / form
    pq.write_table(pa.Table.from_pylist(rows), source) if form == "own.parquet" else lines(source, [{}, *rows])
    for name in ("more.nope", "more.gold.deep", "question.gold", "nope.gold"):
        with pytest.raises(OptionError, match=f"columns.answer={name}: is no column of .*bbox, image, more"):
            prepare(source, folder / "out", columns=Columns(answer=name), progress=False)
    prepare(source, folder / "out", columns=Columns(answer="more.gold"), progress=False)
    assert answers(folder / "out") == ["g"] * NUM


def test_the_parquet_that_training_code_derives(folder):
    rows = [
        {
            "prompt": [{"role": "system", "content": "think"}, {"role": "user", "content": f"<image>what is {i}?"}],
            "images": [{"path": f"images/{i}.jpg"}],
            "bbox_images": [{"path": str(folder / "in" / "teacher_images" / f"{i}.jpg")}],
            "reward_model": {"ground_truth": f"it is {i}", "style": "rule"},
            "extra_info": {"index": i, "split": "train"},
        }
        for i in range(NUM)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "in" / "train.parquet", row_group_size=2)
    check(folder / "in" / "train.parquet", folder / "out")
    (folder / "elsewhere").mkdir()
    (folder / "in" / "train.parquet").rename(folder / "elsewhere" / "train.parquet")
    moved = folder / "elsewhere" / "train.parquet"
    with pytest.raises(OptionError, match="no record can be used .missing_image 7"):
        prepare(moved, folder / "none", progress=False)
    check(moved, folder / "rooted", image_root=folder / "in")


def test_parquet_with_image_bytes(folder):
    plain = {"image": FULL, "query": [f"what is {i}?" for i in range(NUM)], "bbox": BOXES, "id": list(range(NUM))}
    pq.write_table(pa.table(plain), folder / "plain.parquet")
    ids = check(folder / "plain.parquet", folder / "1", crops=False, boxes=True, answers=False)
    assert ids == [str(i) for i in range(NUM)]
    rows = {
        "images": [[image] for image in structs(FULL, "x.jpg")],
        "teacher_images": [[image] for image in structs(CROPS)],
        "problem": [f"<image>what is {i}?" for i in range(NUM)],
        "solution": [f"it is {i}" for i in range(NUM)],
    }
    table, data = pa.table(rows), folder / "hub" / "data"
    data.mkdir(parents=True)
    pq.write_table(table.slice(0, 4), data / "train-00000-of-00002.parquet", row_group_size=1)
    pq.write_table(table.slice(4), data / "train-00001-of-00002.parquet")
    assert check(folder / "hub", folder / "2")[-1] == "hub-00000007"
    pq.write_table(table.slice(0, 1), data / "test-00000-of-00001.parquet")
    with pytest.raises(OptionError, match="split=null: .* has the splits test, train"):
        prepare(folder / "hub", folder / "3", progress=False)
    check(folder / "hub", folder / "3", split="train")
    assert prepare(folder / "hub", folder / "4", split="test", progress=False)["kept"] == 1


def test_what_datasets_saves(folder):
    datasets = pytest.importorskip("datasets")
    columns = {"image": structs(FULL), "question": [f"what is {i}?" for i in range(NUM)], "box": BOXES}
    columns["response"] = [f"it is {i}" for i in range(NUM)]
    whole = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    whole.save_to_disk(folder / "one", num_shards=2)
    check(folder / "one", folder / "1", crops=False, boxes=True)
    datasets.DatasetDict({"train": whole, "test": whole.select([4, 2])}).save_to_disk(folder / "two")
    with pytest.raises(OptionError, match="split=dev: .* has the splits train, test"):
        prepare(folder / "two", folder / "2", split="dev", progress=False)
    check(folder / "two", folder / "2", split="train", crops=False, boxes=True)
    prepare(folder / "two", folder / "3", split="test", progress=False)
    assert [part["image"] for part in stored(folder / "3").values()] == [FULL[4], FULL[2]]
    next((folder / "one").glob("*.arrow")).unlink()
    with pytest.raises(OptionError, match="lacks data-"):
        prepare(folder / "one", folder / "4", progress=False)


def test_columns_by_name(folder):
    rows = [
        {"photo": f"images/{i}.jpg", "text": {"q": f"what is {i}?"}, "where": BOXES[i], "gold": f"it is {i}", "key": -i}
        for i in range(NUM)
    ]
    lines(folder / "in" / "own.jsonl", rows)
    source = folder / "in" / "own.jsonl"
    with pytest.raises(OptionError) as caught:
        prepare(source, folder / "out", progress=False)
    assert str(caught.value) == (
        f"columns.image=null: {source} has none of the columns images, image; it has gold, key, photo, text, where; "
        "say which one it is: columns.image=NAME"
    )
    named = Columns(image="photo", question="text.q", bbox="where", answer="gold", id="key")
    assert check(source, folder / "out", crops=False, boxes=True, columns=named)[3] == "-3"
    with pytest.raises(OptionError, match="columns.answer=golden: is no column of .* has gold, key"):
        prepare(source, folder / "2", columns=Columns(answer="golden"), progress=False)
    assert sorted(path.name for path in folder.iterdir()) == ["in", "out"]


@pytest.mark.parametrize(
    ("box_format", "given"),
    [
        ("xyxy", [6, 10, 30, 30]),
        ("xywh", [6, 10, 24, 20]),
        ("xyxy_unit", [0.1, 0.25, 0.5, 0.75]),
        ("xyxy_1000", [100, 250, 500, 750]),
    ],
)
def test_box_formats(folder, box_format, given, capsys):
    row = {"image": "images/0.jpg", "question": "q"}
    wrong = [[*given[:2], *given[:2]], given[:3], [*given[:3], "4"], [*given[:3], float("nan")], [*given[:3], True]]
    lines(folder / "in" / "boxes.jsonl", [{**row, "bbox": given}, *({**row, "bbox": box} for box in wrong)])
    source = folder / "in" / "boxes.jsonl"
    if box_format == "xywh":
        wrong[0] = [6, 10, 0, 20]
        lines(source, [{**row, "bbox": given}, *({**row, "bbox": box} for box in wrong)])
    result = prepare(source, folder / "out", bbox_format=box_format, progress=False)
    assert result == {"kept": 1, "dropped": {"malformed_record": 4, "empty_box": 1}}
    (part,) = stored(folder / "out").values()
    assert json.loads(part["json"])["bbox"] == [6, 10, 30, 30]
    if box_format == "xyxy_unit":
        prepare(source, folder / "pixels", progress=False)
        assert "bbox_format=xyxy_unit" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["png", "tif"])  # Pillow turns TIFFs itself
@pytest.mark.parametrize("frame", ["upright", "stored"])
@pytest.mark.parametrize("box_format", ["xyxy", "xyxy_unit"])
def test_boxes_of_images_that_exif_turns(folder, frame, box_format, kind, capsys):
    """Drawn upright or on the stored pixels: the teacher's crop shows what the box was drawn around."""
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: 96 x 64, shown 64 x 96
    image = Image.new("RGB", (96, 64), (10, 200, 30))
    image.paste((250, 0, 250), (8, 16, 24, 32))
    image.save(folder / "in" / "images" / f"turned.{kind}", exif=exif)
    box, size = ([32, 8, 48, 24], (64, 96)) if frame == "upright" else ([8, 16, 24, 32], (96, 64))
    if box_format == "xyxy_unit":
        box = [value / size[i % 2] for i, value in enumerate(box)]
    lines(folder / "in" / "turned.jsonl", [{"image": f"images/turned.{kind}", "question": "q", "bbox": box}])
    prepare(folder / "in" / "turned.jsonl", folder / "out", bbox_format=box_format, bbox_frame=frame, progress=False)
    assert "1 images are turned by EXIF" in capsys.readouterr().out
    (part,) = stored(folder / "out").values()
    assert json.loads(part["json"])["bbox"] == pytest.approx([8, 16, 24, 32])
    data = DataConfig(crop=CropConfig(scale=1.0, min_side=4))
    crop = np.asarray(cut_crop(*load_with_box(part["image"], json.loads(part["json"])["bbox"]), data))
    assert crop.shape == (16, 16, 3) and (crop == [250, 0, 250]).all()


def asked(role, text):
    return {"role": role, "content": text}


def said(role, text):
    return {"from": role, "value": text}


FORMS = {
    "ms-swift": lambda i: {
        "messages": [
            asked("system", "be short"),
            asked("user", f"<image>what is {i}?"),
            asked("assistant", f"it is {i}"),
        ],
        "images": [f"images/{i}.jpg"],
        "objects": {"ref": ["it"], "bbox": [BOXES[i]]},
    },
    "ms-swift, fractions": lambda i: {
        "query": f"<image>what is {i}?",
        "response": f"it is {i}",
        "images": [f"images/{i}.jpg"],
        "objects": {
            "bbox": [[BOXES[i][0] / 60, BOXES[i][1] / 40, BOXES[i][2] / 60, BOXES[i][3] / 40]],
            "bbox_type": "norm1",
        },
    },
    "LLaMA-Factory": lambda i: {
        "conversations": [said("human", f"<image>what is {i}?"), said("gpt", f"it is {i}")],
        "images": [f"images/{i}.jpg"],
        "bbox": BOXES[i],
    },
    "LLaMA-Factory, alpaca": lambda i: {
        "instruction": "what",
        "input": f"is {i}?",
        "output": f"it is {i}",
        "images": [f"images/{i}.jpg"],
        "bbox": BOXES[i],
    },
    "LLaVA, a later question": lambda i: {
        "image": f"images/{i}.jpg",
        "conversations": [
            said("human", f"what is {i}?\n<image>"),
            said("gpt", f"it is {i}"),
            said("human", "and its colour?"),
            said("gpt", "red"),
        ],
        "bboxes": [BOXES[i]],
    },
    "verl": lambda i: {
        "data_source": "d",
        "prompt": [asked("user", f"<image>what is {i}?")],
        "images": [{"image": f"images/{i}.jpg"}],
        "reward_model": {"style": "rule", "ground_truth": f"it is {i}"},
        "bbox": BOXES[i],
    },
    "images in messages": lambda i: {
        "messages": [
            asked("user", [{"type": "image", "image": f"images/{i}.jpg"}, {"type": "text", "text": f"what is {i}?"}]),
            asked("assistant", [{"type": "text", "text": f"it is {i}"}]),
        ],
        "bbox": BOXES[i],
    },
    "a box of two": lambda i: {
        "image": f"images/{i}.jpg",
        "question": f"<image>\nwhat is {i}?",
        "answer": f"it is {i}",
        "bboxs": [[i, 2, i + 5, 9], [i + 15, 20, i + 20, 30]],
    },
}


@pytest.mark.parametrize("ending", ["jsonl", "json"])
@pytest.mark.parametrize("form", FORMS)
def test_records_as_other_programs_write_them(folder, capsys, form, ending):
    """Conversations of ms-swift, LLaMA-Factory, LLaVA and verl give the same records, as lines and as one list."""
    source, rows = folder / "in" / f"data.{ending}", [FORMS[form](i) for i in range(NUM)]
    if ending == "json":
        source.write_text(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        lines(source, rows)
    if "alpaca" in form:
        prepare(source, folder / "out", progress=False)
        metas = [json.loads(part["json"]) for part in stored(folder / "out").values()]
        assert [(m["question"], m["answer"]) for m in metas] == [(f"what\nis {i}?", f"it is {i}") for i in range(NUM)]
    elif "fractions" in form:
        prepare(source, folder / "out", progress=False)
        for i, part in enumerate(stored(folder / "out").values()):
            assert json.loads(part["json"])["bbox"] == pytest.approx(BOXES[i])
    else:
        check(source, folder / "out", crops=False, boxes=True)
    out = capsys.readouterr().out
    assert ("7 conversations ask more than once" in out) == ("later question" in form)
    assert ("7 records have several boxes" in out) == ("of two" in form)


def test_marks_that_other_programs_fill_in_are_refused(folder):
    def row(text):
        return {"messages": [asked("user", text)], "images": ["images/0.jpg"], "bbox": BOXES[0]}

    marks = ("<ref-object>", "<bbox>", "<video>", "<audio>")
    lines(folder / "in" / "data.jsonl", [row("<image>fine"), *(row(f"<image>where is {mark}?") for mark in marks)])
    result = prepare(folder / "in" / "data.jsonl", folder / "out", progress=False)
    assert result == {"kept": 1, "dropped": {"malformed_record": 4}}
    assert "<ref-object>" in (folder / "out" / "dropped.jsonl").read_text()


def test_a_list_of_records_is_read_piece_by_piece(folder, monkeypatch):
    """Whatever the size of a piece, from any place on; what is no JSON is told with its place."""
    from nemo_vopd.tools.prepare import rows

    source = folder / "in" / "data.json"
    records = [{"image": "a.jpg", "question": f"wäs{'?' * i}", "bbox": [i, 1.5e3, -2, 3]} for i in range(40)]
    records[7], records[9] = 3, records[9:11]
    source.write_text("\ufeff" + json.dumps(records, ensure_ascii=False, indent=1))
    (opened,) = open_sources([source])
    whole = list(opened.rows(set()))
    assert [row.values for row in whole if isinstance(row.values, dict)] == [r for r in records if isinstance(r, dict)]
    assert [row.number for row in whole] == list(range(1, 41)) and whole[7].values.reason == "malformed_record"
    assert whole[9].values.reason == "malformed_record"  # a list within the list is one record, and a wrong one
    for size in (1, 2, 3, 64, 1000):
        monkeypatch.setattr(rows, "_READ_BYTES", max(size, 64) if size < 64 else size)
        assert [row.offset for row in opened.rows(set())] == [row.offset for row in whole]
        assert next(opened.rows(set(), whole[20].offset, 21)).values == records[20]
    for text, words in ((source.read_text()[:-200], "record 3[0-9], byte [0-9]+"), ("[{1: 2}]", "record 1, byte 1")):
        source.write_text(text)
        with pytest.raises(OptionError, match=f"source=.*data.json: is no list of JSON records .{words}"):
            prepare(source, folder / "out", progress=False)


def test_odd_boxes_and_crops_are_counted_with_the_option_that_mends_them(folder, capsys):
    def told(records, **options):
        lines(folder / "in" / "data.jsonl", records)
        prepare(folder / "in" / "data.jsonl", folder / "out", overwrite=True, progress=False, **options)
        return capsys.readouterr().out

    one = {"image": "images/0.jpg", "question": "q"}
    fractions = [{**one, "bbox": [0.1, 0.1, 0.5, 0.6]}] * 6 + [{**one, "bbox": [3, 4, 20, 30]}]
    assert "6 of 7 boxes have no number above 1: for fractions set bbox_format=xyxy_unit" in told(fractions)
    assert "fractions" not in told(fractions, bbox_format="xyxy_unit")
    some = [fractions[-1]] * 9 + [{**one, "bbox": [[0, 0, 1, 0.5], [3, 4, 20, 30]]}]
    assert "1 of 10 boxes have no number above 1: where those are fractions" in told(some)
    assert "1 of 7 boxes reach beyond their image" in told(fractions, bbox_format="xyxy_unit")
    corners = [{**one, "bbox": box} for box in ([40, 30, 15, 5], [5, 5, 90, 20], [70, 50, 80, 60], [10, 10, 20, 20])]
    out = told(corners)
    assert (
        "3 of 4 boxes reach beyond their image or have no area" in out and "set xywh or xyxy_unit or xyxy_1000" in out
    )
    dropped = [json.loads(line) for line in (folder / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [(d["line"], d["reason"]) for d in dropped] == [(1, "empty_box"), (3, "box_outside_image")]
    assert all(d["source"].endswith("data.jsonl") and d["detail"] for d in dropped) and "dropped.jsonl lists" in out
    Image.new("RGB", (1600, 30), (9, 200, 30)).save(folder / "in" / "images" / "wide.jpg")
    wide = [{"image": "images/wide.jpg", "question": "q", "bbox": [10 + i, 2, 900, 20]} for i in range(20)]
    assert "20 of 20 boxes in images with a side above 1500 pixels have no number above 1000" in told(wide)
    percent = "20 of 20 boxes in images with a side above 1500 pixels have no number above 100: for percent"
    out = told([{**record, "bbox": [10, 2, 90.5, 20]} for record in wide])
    assert percent in out and "xyxy_1000" not in out and percent not in told([*wide, *wide])
    assert "no number above 1000" not in told([*wide, *[{**wide[0], "bbox": [1100, 2, 1300, 20]}] * 3])
    crop = {"scale": 1.0, "min_side": 4, "square": False}
    small = [{**one, "bbox": [10, 10, 16, 16]}, {**wide[0], "bbox": [5, 5, 1500, 9]}, {**one, "bbox": [0, 0, 60, 40]}]
    out = told(small, crop={**crop, "min_pixels": 784})
    assert "1 crops are enlarged more than twice: (data.)crop.max_upscale=2" in out
    assert "1 crops are too elongated to be used: (data.)crop.max_aspect=4" in out
    card = json.loads((folder / "out" / "data_card.json").read_text())
    assert (card["upscaled"], card["extreme_crop"], card["leaving"], card["with_box"]) == (1, 1, 0, 3)
    assert not (folder / "out" / "dropped.jsonl").exists()


def test_wrong_sources(folder):
    source = folder / "in" / "damaged.parquet"
    source.write_bytes(b"PAR1 no")
    (folder / "empty").mkdir()
    cases = [
        ({"source": folder / "none"}, "is not a file or folder"),
        ({"source": folder / "empty"}, r"no \*.jsonl or \*.parquet"),
        ({"source": source}, "cannot be read"),
        ({"source": []}, "names nothing"),
        ({"source": folder / "in", "image_root": folder / "none"}, "image_root=.* is not a folder"),
    ]
    for options, words in cases:
        with pytest.raises(OptionError, match=words):
            prepare(output=folder / "out", progress=False, **options)
    for options in ({"bbox_format": "yolo"}, {"hint": "drop"}, {"split_by": "day"}, {"validation_fraction": 1.0}):
        with pytest.raises(OptionError, match=f"{next(iter(options))}=.*must"):
            prepare(folder / "in", folder / "out", progress=False, **options)
    source.unlink()
    lines(folder / "in" / "a.jsonl", [])
    lines(folder / "in" / "b.jsonl", [])
    with pytest.raises(OptionError, match="a folder with a.jsonl, b.jsonl"):
        open_sources([folder / "in"])
    assert sorted(path.name for path in folder.iterdir()) == ["empty", "in"]


def test_tables_in_processes_and_damage_that_shows_late(folder):
    """Workers import neither torch nor Megatron; a page that cannot be read ends all with one line."""
    code = "import sys; from nemo_vopd.tools.prepare import prepare, rows, shards; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "pyarrow" in loaded and not {"torch", "megatron", "transformers", "hydra"} & set(loaded)
    rows = {"image": FULL * 20, "question": [f"what is {i}?" for i in range(NUM * 20)], "bbox": BOXES * 20}
    source = folder / "in" / "many.parquet"
    pq.write_table(pa.table(rows), source, row_group_size=35, compression="zstd", use_dictionary=False)
    options = {"shard_size": 30, "progress": False}
    prepare(source, folder / "1", workers=1, **options)
    prepare(source, folder / "3", workers=3, **options)
    assert stored(folder / "1") == stored(folder / "3") and len(stored(folder / "1")) == NUM * 20
    assert [part["image"] for part in stored(folder / "3").values()] == FULL * 20
    chunk = pq.ParquetFile(source).metadata.row_group(3).column(0)
    data = bytearray(source.read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + 60] = b"\xff" * 60  # header of the page
    source.write_bytes(data)
    for workers in (1, 3):
        with pytest.raises(OptionError, match="source=.*many.parquet: cannot be read"):
            prepare(source, folder / "2", workers=workers, **options)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "3", "in"]
