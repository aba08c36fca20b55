import json
import os
import subprocess
import sys
import tarfile

import pytest
from PIL import Image

from nemo_vopd.config import DataConfig, PixelConfig
from nemo_vopd.data.encoder import iterate_samples
from nemo_vopd.errors import OptionError
from nemo_vopd.images import DROP_REASONS
from nemo_vopd.tools.prepare.prepare import prepare
from tests.distributed import HANG, ROOT


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "images").mkdir(parents=True)
    for name, size in (("full.png", (112, 112)), ("crop.png", (56, 56)), ("big.png", (300, 300))):
        Image.new("RGB", size, (90, 120, 30)).save(tmp_path / "in" / "images" / name)
    Image.new("RGB", (20, 20)).save(tmp_path / "secret.png")
    (tmp_path / "in" / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    data = (tmp_path / "in" / "images" / "big.png").read_bytes()
    (tmp_path / "in" / "images" / "cut.png").write_bytes(data[: len(data) // 2])
    return tmp_path


def write(folder, records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "in" / "data.jsonl").write_text("\n".join(lines))
    return folder / "in" / "data.jsonl"


def stored(output):
    """{key: {part: bytes}} of all shards in order."""
    parts: dict[str, dict[str, bytes]] = {}
    for shard in sorted(output.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, name = member.name.split(".")
                parts.setdefault(key, {})[name] = tar.extractfile(member).read()
    return parts


GOOD = {"image": "images/full.png", "question": "what digit is red?", "bbox": [10, 20, 25, 41]}


def test_round_trip_keeps_bytes_order_and_fields(digits, dataset):
    records = [json.loads(line) for line in (digits / "data.jsonl").read_text().splitlines()]
    parts = stored(dataset)
    assert len(parts) == len(records) == 96 and len(list(dataset.glob("*.tar"))) == 5
    for record, part in zip(records, parts.values(), strict=True):
        assert part["image"] == (digits / record["image"]).read_bytes() and "crop" not in part
        assert json.loads(part["json"]) == {key: record[key] for key in ("id", "question", "bbox", "answer")}
    assert {path.name for path in (dataset / ".nv-meta").iterdir()} >= {"dataset.yaml", "split.yaml", ".info.json"}


def test_both_layouts_and_optional_fields(folder, capsys):
    source = write(
        folder,
        [
            {**GOOD, "id": "a", "answer": "it is a red 7 ."},
            {"image": "images/full.png", "question": "q", "crop_image": "images/crop.png", "id": 7},
            {"images": ["images/full.png"], "teacher_images": ["images/crop.png"], "problem": "<image>\nwhat is it?"},
            {
                "images": [{"path": "images/full.png"}],
                "problem": "what <image>is it?",
                "bbox": [0, 0, 9, 9],
                "answer": 3,
            },
            "",
            {**GOOD, "image": "images/../images/full.png"},
        ],
    )
    assert prepare(source, folder / "out", workers=2, progress=False) == {"kept": 5, "dropped": {}}
    assert "kept 5 records" in capsys.readouterr().out
    metas = [json.loads(part["json"]) for part in stored(folder / "out").values()]
    assert [meta["id"] for meta in metas] == ["a", "7", "data-00000003", "data-00000004", "data-00000006"]
    assert [meta["question"] for meta in metas][2:4] == ["what is it?", "what is it?"]
    assert [meta["answer"] for meta in metas] == ["it is a red 7 .", None, None, "3", None]
    assert metas[1]["bbox"] is None and metas[3]["bbox"] == [0, 0, 9, 9]
    crop = (folder / "in" / "images" / "crop.png").read_bytes()
    assert [part.get("crop") for part in stored(folder / "out").values()] == [None, crop, crop, None, None]


def test_bad_records_are_dropped_by_reason(folder, capsys):
    bad = [
        ("malformed_record", "{not json"),
        ("malformed_record", "[1, 2]"),
        ("malformed_record", {**GOOD, "question": None}),
        ("malformed_record", {**GOOD, "image": 3}),
        ("malformed_record", {**GOOD, "id": {}}),
        ("malformed_record", {**GOOD, "answer": [{}]}),
        ("malformed_record", {**GOOD, "bbox": [1, 2, 3]}),
        ("malformed_record", {"images": "images/full.png", "problem": "q"}),
        ("several_images", {"images": ["images/full.png"] * 2, "problem": "q"}),
        ("empty_question", {**GOOD, "question": " "}),
        (
            "empty_question",
            {"images": ["images/full.png"], "teacher_images": ["images/crop.png"], "problem": "<image>"},
        ),
        ("missing_image", {"question": "q", "bbox": [0, 0, 1, 1]}),
        ("missing_image", {**GOOD, "image": "images/none.png"}),
        ("missing_image", {**GOOD, "image": "images"}),
        ("missing_image", {**GOOD, "image": "a\0b"}),
        ("missing_crop", {"image": "images/full.png", "question": "q"}),
        ("missing_crop", {**GOOD, "crop_image": "images/none.png"}),
        ("missing_crop", {"images": ["images/full.png"], "teacher_images": [], "problem": "q"}),
        ("missing_crop", {"images": ["images/full.png"], "teacher_images": [{}], "problem": "q", "bbox": [0, 0, 9, 9]}),
        ("path_outside_folder", {**GOOD, "image": "../secret.png"}),
        ("path_outside_folder", {**GOOD, "image": str(folder / "secret.png")}),
        ("path_outside_folder", {**GOOD, "image": "images/link.png"}),
        ("path_outside_folder", {**GOOD, "crop_image": "images/../../secret.png"}),
        ("unreadable_image", {**GOOD, "image": "data.jsonl"}),
        ("unreadable_image", {**GOOD, "image": "images/cut.png"}),
        ("unreadable_image", {**GOOD, "crop_image": "images/cut.png"}),
        ("image_too_large", {**GOOD, "image": "images/big.png"}),
        ("empty_box", {**GOOD, "bbox": [5, 5, 5, 9]}),
        ("box_outside_image", {**GOOD, "bbox": [200, 200, 210, 210]}),
        ("duplicate_id", {**GOOD, "id": "first"}),
    ]
    source = write(folder, [{**GOOD, "id": "first"}, *(record for _, record in bad)])
    result = prepare(source, folder / "out", max_image_pixels=50_000, workers=3, progress=False)
    # cut.png is as large as big.png by its header
    expected = [reason for reason, _ in bad]
    for index in (24, 25):
        expected[index] = "image_too_large"
    assert result["kept"] == 1
    assert result["dropped"] == {reason: expected.count(reason) for reason in expected}
    assert set(result["dropped"]) <= set(DROP_REASONS)
    out = capsys.readouterr().out
    assert "dropped 30" in out and "path_outside_folder (first: line 21: ../secret.png)" in out


def test_truncated_images_are_found(folder):
    source = write(folder, [GOOD, {**GOOD, "image": "images/cut.png"}])
    assert prepare(source, folder / "out", progress=False)["dropped"] == {"unreadable_image": 1}


def test_nothing_left_leaves_nothing_behind(folder):
    source = write(folder, [{**GOOD, "image": "images/none.png"}] * 3)
    with pytest.raises(OptionError, match="no record can be used .missing_image 3"):
        prepare(source, folder / "out", progress=False)
    source = write(folder, [{**GOOD, "image": "images/none.png"}, *["{no\\t"] * 2])
    words = r"no record can be used .malformed_record 2, missing_image 1., first: line 2: not JSON: .*; check"
    with pytest.raises(OptionError, match=words) as caught:
        prepare(source, folder / "out", progress=False)
    assert "\n" not in str(caught.value)
    assert {path.name for path in folder.iterdir()} == {"in", "secret.png"}


def test_overwrite_only_replaces_prepared_data(folder):
    source = write(folder, [GOOD])
    prepare(source, folder / "out", progress=False)
    with pytest.raises(OptionError, match="overwrite=true"):
        prepare(source, folder / "out", progress=False)
    prepare(write(folder, [GOOD] * 2), folder / "out", overwrite=True, progress=False)
    assert len(stored(folder / "out")) == 2
    with pytest.raises(OptionError, match="max_image_pixels=200000000: must be at most 100000000"):
        prepare(source, folder / "more", max_image_pixels=200_000_000, progress=False)
    with pytest.raises(OptionError, match="no prepared data set"):
        prepare(source, folder / "in", overwrite=True, progress=False)
    assert (folder / "in" / "images" / "full.png").is_file()


def test_given_crop_goes_before_the_box(folder, processor):
    both = {**GOOD, "crop_image": "images/big.png"}
    prepare(write(folder, [GOOD, both]), folder / "out", progress=False)
    data = DataConfig(full=PixelConfig(3136, 12544), crop_pixels=PixelConfig(3136, 12544))
    cut, given = iterate_samples(folder / "out", data, "crop", processor)
    assert cut.teacher.grid_thw.tolist() == [[1, 4, 4]] and given.teacher.grid_thw.tolist() == [[1, 6, 6]]


def test_recipe(folder):
    def run(*overrides):
        command = [sys.executable, str(ROOT / "recipes" / "prepare_data.py"), *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=HANG)

    source = write(folder, [GOOD, {**GOOD, "bbox": [5, 5, 5, 5]}])
    good = run(f"source={source}", "output=out/deep")
    assert good.returncode == 0 and "kept 1" in good.stdout and "empty_box" in good.stdout, good.stderr
    assert (folder / "out" / "deep" / ".nv-meta" / "dataset.yaml").is_file()
    for overrides, words in (
        (["source=none.jsonl", "output=o"], "source=none.jsonl: is not a file"),
        ([f"source={source}", "output=o", "shards=3"], "shards=3: no such option"),
        ([f"source={source}"], "output=???: has no default"),
        ([f"source={source}", "output=o", "shard_size=many"], "shard_size=many"),
    ):
        bad = run(*overrides)
        assert bad.returncode == 2, (overrides, bad.stderr)
        assert words in bad.stderr and len(bad.stderr.strip().splitlines()) == 1, bad.stderr
    assert not (folder / "o").exists()
