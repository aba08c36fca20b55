"""What preparation leaves: splits, blends, integrity, data card, preview, hints."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nemo_vopd.data.blend import read_blend, write_blend
from nemo_vopd.data.dataset import fingerprint, require_dataset
from nemo_vopd.data.encoder import iterate_samples
from nemo_vopd.data.loader import build_train_loader
from nemo_vopd.errors import OptionError
from nemo_vopd.tools.prepare.index import verify
from nemo_vopd.tools.prepare.intake import side
from nemo_vopd.tools.prepare.options import HINT
from nemo_vopd.tools.prepare.prepare import prepare
from nemo_vopd.tools.prepare.preview import write_preview
from nemo_vopd.tools.prepare.synthetic import write_digits
from tests.distributed import HANG, ROOT
from tests.tools.prepare.test_prepare import stored

CROP = {"scale": 2.0, "min_side": 28, "square": True}


def ids(output):
    return [json.loads(part["json"])["id"] for part in stored(output).values()]


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture
def records(digits):
    return [json.loads(line) for line in (digits / "data.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "in")
    return tmp_path / "in"


@pytest.fixture(scope="module")
def blend(tmp_path_factory):
    """Two sources, 3 to 1, each with a validation part."""
    folder = tmp_path_factory.mktemp("blend")
    for name, count in (("a", 60), ("b", 90)):
        write_digits(folder / name, num_samples=count, seed=count)
    sources = [folder / name / "data.jsonl" for name in ("a", "b")]
    options = {"weights": [3, 1], "validation_fraction": 0.2, "shard_size": 20, "workers": 1, "progress": False}
    assert prepare(sources, folder / "out", **options)["kept"] == 150
    return folder / "out"


def test_records_stay_on_their_side(folder, records, tmp_path):
    options = {"validation_fraction": 0.25, "shard_size": 20, "workers": 1, "progress": False}
    prepare(folder / "data.jsonl", tmp_path / "out", **options)
    train, validation = ids(tmp_path / "out" / "train"), ids(tmp_path / "out" / "validation")
    assert sorted(train + validation) == [record["id"] for record in records] and 10 < len(validation) < 40
    order = [record["id"] for record in records]
    assert train == sorted(train, key=order.index) and validation == sorted(validation, key=order.index)
    # others come before, between and after
    more = [{**record, "id": f"new-{i}"} for i, record in enumerate(records[:40])]
    mixed = [record for pair in zip(more, records[:40], strict=True) for record in pair] + records[40:]
    prepare(write(folder / "more.jsonl", mixed), tmp_path / "more", **options)
    assert [name for name in ids(tmp_path / "more" / "validation") if not name.startswith("new")] == validation
    # ids that are counted would shift: there the image decides
    bare = [{key: value for key, value in record.items() if key != "id"} for record in mixed]
    prepare(write(folder / "bare.jsonl", bare), tmp_path / "bare", **options)
    images = [(folder / record["image"]).read_bytes() for record in bare]
    chosen = [image for image in images if side(image, 0.25) == "validation"]
    assert [part["image"] for part in stored(tmp_path / "bare" / "validation").values()] == chosen != []
    with pytest.raises(OptionError, match="validation_fraction=1e-09: leaves no record of .* for validation"):
        prepare(folder / "data.jsonl", tmp_path / "none", **{**options, "validation_fraction": 1e-9})
    assert not (tmp_path / "none").exists()
    assert abs(sum(side(b"%d" % i, 0.1) == "validation" for i in range(10_000)) / 10_000 - 0.1) < 0.01


def test_one_photograph_is_on_one_side(folder, records, tmp_path):
    asked_twice = [{**record, "id": f"{record['id']}-{i}"} for record in records for i in range(2)]
    source = write(folder / "twice.jsonl", asked_twice)
    options = {"validation_fraction": 0.3, "workers": 1, "progress": False}
    shared = {}
    for split_by in ("id", "image"):
        output = tmp_path / split_by
        prepare(source, output, split_by=split_by, **options)
        sides = [{part["image"] for part in stored(output / name).values()} for name in ("train", "validation")]
        shared[split_by] = len(sides[0] & sides[1])
    assert shared["id"] > 5 and shared["image"] == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_blend_has_its_weights_and_restores_exactly(blend, data_config, processor, num_workers):
    config = replace(data_config, path=str(blend / "blend.yaml"), num_workers=num_workers)

    def loader(dp_rank=0, dp_size=1, position=0):
        return build_train_loader(
            config, "crop", processor, seed=3, dp_rank=dp_rank, dp_size=dp_size, position=position
        )

    def names(batch):
        return [sample.id for sample in batch.samples]

    first = loader()
    drawn = Counter(name.split("/")[0] for batch in islice(first, 60) for name in names(batch))
    assert drawn == {"data": 360, "data-2": 120}
    position = first.position
    expected = [names(batch) for batch in islice(first, 12)]
    first.close()
    other = loader(1, 2, position)
    assert [names(batch) for batch in islice(other, 12)] == [batch[1::2] for batch in expected]
    other.close()


def test_a_blend_is_read_in_order_for_evaluation(blend, data_config, processor, tmp_path):
    def names(path, limit=None):
        return [item.id for item in iterate_samples(path, data_config, "crop", processor, limit)]

    in_order = [ids(blend / name / split) for split in ("train", "validation") for name in ("data", "data-2")]
    assert names(blend / "blend.yaml") == in_order[0] + in_order[1]
    assert names(blend / "validation.yaml") == in_order[2] + in_order[3]
    assert names(blend / "blend.yaml", 55) == (in_order[0] + in_order[1])[:55]
    assert require_dataset(blend / "blend.yaml") == blend / "blend.yaml"
    shutil.copytree(blend, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy" / "blend.yaml") == fingerprint(blend / "blend.yaml")
    parts = [(part.relative_to(blend).as_posix(), weight) for part, weight in read_blend(blend / "blend.yaml")]
    assert parts == [("data/train", 3.0), ("data-2/train", 1.0)]
    write_blend(tmp_path / "copy" / "blend.yaml", [(parts[0][0], 2.0), parts[1]])
    assert fingerprint(tmp_path / "copy" / "blend.yaml") != fingerprint(blend / "blend.yaml")


def test_wrong_blends(blend, data_config, processor, tmp_path, folder):
    shutil.copytree(blend, tmp_path / "copy")
    path = tmp_path / "copy" / "blend.yaml"
    with pytest.raises(OptionError, match=f"give data.path={tmp_path}/copy/blend.yaml"):
        require_dataset(tmp_path / "copy")
    with pytest.raises(OptionError, match=f"give data.path={tmp_path}/copy/data/train"):
        require_dataset(tmp_path / "copy" / "data")
    shutil.rmtree(tmp_path / "copy" / "data" / "train")
    with pytest.raises(OptionError, match="data/train: is not an Energon data set"):
        require_dataset(path)
    for text, words in (
        ("{", "is no blend"),
        ("[]", "is no blend"),
        ("__class__: Metadataset\nsplits: {}", "is no blend"),
        ("__class__: MetadatasetV2\nsplits: {train: {blend: []}}", "blends nothing"),
        ("__class__: MetadatasetV2\nsplits: {train: {blend: [{weight: 0, path: a}]}}", "the weight 0.0"),
    ):
        path.write_text(text)
        with pytest.raises(OptionError, match=words):
            require_dataset(path)
    with pytest.raises(OptionError, match="none.yaml: cannot be read"):
        require_dataset(tmp_path / "none.yaml")
    source = folder / "data.jsonl"
    for sources, weights, words in (([source], [1], "of several"), ([source] * 2, [1], "each of the 2")):
        with pytest.raises(OptionError, match=f"weights=.*{words}"):
            prepare(sources, tmp_path / "out", weights=weights, progress=False)
    with pytest.raises(OptionError, match="weights=.*positive"):
        prepare([source] * 2, tmp_path / "out", weights=[1, 0], progress=False)


def test_damage_is_found(blend, dataset, tmp_path):
    found = verify(dataset, progress=False)
    assert found["records"] == 96 and found["shards"] == 5 and found["data_sets"] == 1
    assert verify(blend, progress=False)["records"] == 150 and verify(blend, progress=False)["data_sets"] == 4
    assert verify(blend / "data" / "train", progress=False)["data_sets"] == 1

    def flip(path):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def recount(path):
        path.write_text(path.read_text().replace('": 20', '": 19', 1))

    damages = [
        ("shard-000002.tar", flip, "shard-000002.tar has other contents than were written"),
        ("shard-000002.tar", lambda path: os.truncate(path, 5120), "shard-000002.tar has 5120 bytes in place of"),
        ("shard-000004.tar", Path.unlink, "shard-000004.tar is missing"),
        ("shard-000000.tar.idx", flip, "shard-000000.tar.idx has other contents"),
        (".nv-meta/index.sqlite", flip, ".nv-meta/index.sqlite has other contents"),
        (".nv-meta/.info.json", recount, r".nv-meta/.info.json has other contents.*\(and 1 more\)"),
        (".nv-meta/split.yaml", Path.unlink, ".nv-meta/split.yaml is missing"),
        ("manifest.json", lambda path: path.write_text("{}"), "manifest.json is damaged"),
        ("shard-000009.tar", Path.touch, "shard-000009.tar is not of this data set"),
        ("data_card.json", lambda path: path.write_text("{"), "data_card.json is damaged"),
        ("manifest.json", Path.unlink, "is no prepared data set"),
    ]
    for number, (name, damage, words) in enumerate(damages):
        copy = tmp_path / str(number)
        shutil.copytree(dataset, copy)
        damage(copy / name)
        with pytest.raises(OptionError, match=words) as caught:
            verify(copy, progress=False)
        assert caught.value.option == "verify" and "\n" not in str(caught.value)
    shutil.copytree(blend, tmp_path / "blend")
    shutil.rmtree(tmp_path / "blend" / "data-2" / "train")
    with pytest.raises(OptionError, match="lacks data-2/train/manifest.json"):
        verify(tmp_path / "blend", progress=False)


def test_data_card(folder, records, tmp_path, capsys):
    """Every number of the card, counted once more from what was stored."""
    crop = {"id": "crop", "image": records[0]["image"], "question": f"{HINT} what?", "crop_image": records[1]["image"]}
    bad = [{**records[0], "id": "flat", "bbox": [1, 1, 1, 9]}, {**records[0], "id": "gone", "image": "none.png"}]
    source = write(folder / "card.jsonl", [*records, crop, *bad])
    output = tmp_path / "out"
    prepare(source, output, shard_size=20, workers=1, validation_fraction=0.5, progress=False, crop=CROP)
    card = json.loads((output / "data_card.json").read_text())
    assert card["sources"] == [
        {"path": str(source), "layout": "JSONL", "kept": 97, "dropped": 2, "weight": None},
    ]
    assert card["kept"] == 97 and card["dropped"] == {"empty_box": 1, "missing_image": 1} and card["crop"] == CROP
    assert card["splits"] == {split: len(ids(output / split)) for split in ("train", "validation")}
    assert card["bytes"] == sum(path.stat().st_size for path in output.rglob("*.tar"))
    assert (card["with_answer"], card["with_box"], card["with_crop"], card["with_hint"]) == (96, 96, 1, 1)
    assert card["options"]["validation_fraction"] == 0.5 and card["options"]["hint"] == "keep"
    areas = []
    for record in records:
        x1, y1, x2, y2 = record["bbox"]
        width, height = Image.open(folder / record["image"]).size
        areas.append((x2 - x1) * (y2 - y1) / width / height)
    share = card["relative_box_area"]
    assert share["median"] == pytest.approx(np.median(areas), rel=1e-4)
    assert share["counts"] == np.histogram(areas, share["edges"])[0].tolist() and sum(share["counts"]) == 96
    assert sum(card["image_megapixels"]["counts"]) == 97
    page = (output / "data_card.html").read_text()
    assert page.strip().startswith("<!DOCTYPE html>") and "http" not in page.replace("https://www.w3.org", "")
    assert "card.jsonl" in page and page.count('class="counts"') == 2 and "empty_box" in page
    copies = [json.loads((output / split / "data_card.json").read_text())["kept"] for split in card["splits"]]
    assert copies == [97, 97]
    printed = capsys.readouterr().out
    assert "1 questions carry the hint" in printed and "hint=remove takes it out" in printed


def test_hint_removed(folder, records, tmp_path, capsys):
    rows = [
        {**records[0], "question": f"{HINT} what is red?"},
        {**records[1], "question": f"what is blue? {HINT}"},
        {**records[2], "question": HINT},
        {**records[3], "question": "what is  green?"},
    ]
    source = write(folder / "hints.jsonl", rows)
    result = prepare(source, tmp_path / "out", hint="remove", progress=False)
    assert result == {"kept": 3, "dropped": {"empty_question": 1}}
    questions = [json.loads(part["json"])["question"] for part in stored(tmp_path / "out").values()]
    assert questions == ["what is red?", "what is blue?", "what is  green?"]
    assert json.loads((tmp_path / "out" / "data_card.json").read_text())["with_hint"] == 2
    assert "2 questions carry the hint" in capsys.readouterr().out
    prepare(source, tmp_path / "kept", progress=False)
    questions = [json.loads(part["json"])["question"] for part in stored(tmp_path / "kept").values()]
    assert questions == [row["question"] for row in rows]


def test_preview_shows_the_box_and_the_crop(tmp_path, capsys):
    Image.new("RGB", (400, 300), (0, 0, 90)).save(tmp_path / "blue.png")
    row = {"image": "blue.png", "question": "what?\nis it " + "long " * 90, "bbox": [100, 100, 140, 140]}
    rows = [row, {**row, "image": "none.png"}, {"image": "blue.png", "question": "q", "crop_image": "blue.png"}]
    source = write(tmp_path / "data.jsonl", rows * 5)
    files = set(tmp_path.iterdir())
    sheets = []
    for name in ("1.png", "2.png"):
        options = {"crop": CROP, "crop_pixels": (3136, 12544), "num_samples": 6, "progress": False}
        write_preview([source], tmp_path / name, **options)
        sheets.append(np.asarray(Image.open(tmp_path / name)))
    assert np.array_equal(*sheets) and "6 records in" in capsys.readouterr().out
    assert {path.name for path in set(tmp_path.iterdir()) - files} == {"1.png", "2.png"}
    blue, red = ((sheets[0] == colour).all(-1) for colour in ((0, 0, 90), (221, 45, 30)))
    assert blue.sum() > 6 * 300 * 290 and red.sum() > 500
    with pytest.raises(OptionError, match="preview_samples=0"):
        write_preview([source], tmp_path / "3.png", crop=CROP, crop_pixels=(1, 2), num_samples=0, progress=False)
    with pytest.raises(OptionError, match="none of 1 records can be used"):
        write(source, rows[1:2])
        write_preview([source], tmp_path / "3.png", crop=CROP, crop_pixels=(1, 2), progress=False)
    assert not (tmp_path / "3.png").exists()


def test_recipe_previews_and_verifies(folder, dataset, tmp_path):
    def run(*arguments):
        command = [sys.executable, str(ROOT / "recipes" / "prepare_data.py"), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=HANG)

    seen = run(f"source={folder}", "output=out", "crop.scale=3", "--preview")
    assert seen.returncode == 0 and "12 records in out.preview.png" in seen.stdout, seen.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out.preview.png"}
    whole = run(f"verify={dataset}")
    assert whole.returncode == 0 and "is whole: 96 records in 5 shards" in whole.stdout, whole.stderr
    shutil.copytree(dataset, tmp_path / "copy")
    os.truncate(tmp_path / "copy" / "shard-000001.tar", 100)
    for arguments, words in (
        (["verify=copy"], "error: verify=copy: shard-000001.tar has 100 bytes in place of"),
        ([f"source={folder}", "output=o", "crop.max_aspect=2"], "crop.max_aspect=2.0: has no effect on square crops"),
        ([f"source={folder}", "output=o", "preview_samples=0"], "preview_samples=0: must be at least 1"),
        ([f"source={folder}", "output=o", "crop_pixels.min_pixels=0"], "crop_pixels.min_pixels=0: must lie between 1"),
        ([f"source={folder}", "output=o", "crop_pixels.max_pixels=9"], "crop_pixels.min_pixels=3136: must lie between"),
        (["source=[in,none]", "output=o"], "source=none: is not a file or folder"),
        (["source=in", "output=o", "columns.image=photo"], "columns.image=photo: is no column of in"),
    ):
        bad = run(*arguments)
        assert bad.returncode == 2 and words in bad.stderr, bad.stderr
        assert bad.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in bad.stderr
    assert not (tmp_path / "o").exists()
