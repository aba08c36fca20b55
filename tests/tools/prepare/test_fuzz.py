"""Bad data of every kind, through `prepare`, through the loaders, and damaged in between: dropped and counted."""

import io
import json
import math
import pickle
import random
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest

from nemo_vopd.batch import DroppedSample, Sample
from nemo_vopd.data.encoder import iterate_samples
from nemo_vopd.data.loader import build_train_loader
from nemo_vopd.images import DROP_REASONS
from nemo_vopd.tools.prepare.index import write_index
from nemo_vopd.tools.prepare.prepare import prepare
from tests.tools.prepare.fuzz_cases import (
    ANY,
    GOOD,
    Fuzz,
    Payload,
    encoded,
    headers,
    json_value,
    nested,
    picture,
    record,
)

VIEWS = ("crop", "full", "full_and_crop", "boxed")
pytestmark = pytest.mark.timeout(120)  # a FIFO that is opened would wait for ever


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    return Fuzz(folder / "in", payload=folder / "payload-ran")


@pytest.fixture(scope="module")
def everything(fuzz, tmp_path_factory):
    """(cases, result of `prepare`, its data set) of all cases in random order."""
    cases = [case for group in fuzz.groups.values() for case in group]
    random.Random(1).shuffle(cases)
    cases.sort(key=lambda case: case.prepared == ANY)  # a random id must not turn a good record into a duplicate
    output = tmp_path_factory.mktemp("prepared") / "all"
    return cases, prepare(write(fuzz, "all", cases), output, shard_size=50, workers=2, progress=False), output


def write(fuzz, name, cases):
    (fuzz.root / f"{name}.jsonl").write_bytes(b"\n\n".join(case.line for case in cases))
    return fuzz.root / f"{name}.jsonl"


def checked(items):
    """`items`, if each is a whole sample or a counted drop."""
    for item in items:
        assert isinstance(item.id, str) and item.id
        if isinstance(item, DroppedSample):
            assert item.reason in DROP_REASONS and item.detail.isprintable() and len(item.detail) <= 300
        else:
            assert (
                isinstance(item, Sample) and item.question.strip() and all(isinstance(one, str) for one in item.answers)
            )
            for view in (item.student, item.teacher):
                assert view.pixel_values.isfinite().all() and view.position_ids.shape == (3, view.num_tokens)
    return items


@pytest.mark.parametrize(
    "group", ["usable", "broken images", "sizes", "paths", "boxes", "texts", "types", "lines", "random"]
)
def test_prepare_drops_each_for_its_reason(fuzz, tmp_path, capsys, group):
    cases = [record(id="first"), *fuzz.groups[group], record(id="last")]
    result = prepare(write(fuzz, group, cases), tmp_path / "out", workers=2, progress=False)
    assert result["kept"] + sum(result["dropped"].values()) == len(cases)
    assert set(result["dropped"]) <= set(DROP_REASONS)
    if group != "random":
        assert result["dropped"] == Counter(case.prepared for case in cases if case.prepared)
    assert not fuzz.payload.exists()
    printed = capsys.readouterr().out
    assert len(printed) < 3000 and all(line.isprintable() for line in printed.splitlines())


def test_there_are_enough_cases_and_all_are_counted(everything):
    cases, result, _ = everything
    assert sum(case.prepared is not None for case in cases) >= 250
    assert result["kept"] + sum(result["dropped"].values()) == len(cases)
    fixed = Counter(case.prepared for case in cases if case.prepared not in (None, ANY))
    assert all(result["dropped"][reason] >= count for reason, count in fixed.items())


@pytest.mark.parametrize("teacher_view", VIEWS)
def test_loader_takes_all_that_prepare_kept(everything, data_config, processor, teacher_view):
    cases, result, path = everything
    items = checked(list(iterate_samples(path, data_config, teacher_view, processor)))
    assert len(items) == result["kept"]
    reasons = {item.id: getattr(item, "reason", None) for item in items}
    for case in cases:
        if case.prepared is None:
            sample_id = str(json.loads(case.line)["id"])
            expected = "missing_box" if (sample_id, teacher_view) == ("only a crop", "boxed") else case.loaded
            assert reasons[sample_id] == expected, sample_id


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_goes_on(everything, data_config, processor, num_workers):
    _, result, path = everything
    config = replace(data_config, path=str(path), batch_size=40, num_workers=num_workers)
    iterator = build_train_loader(config, "full_and_crop", processor, seed=2, dp_rank=0, dp_size=1)
    try:
        for batch in islice(iterator, math.ceil(result["kept"] / 40)):
            assert len(checked([*batch.samples, *batch.dropped])) == 40
    finally:
        iterator.close()


def damaged_records(payload):
    """[(expected reason, parts of a stored record)]"""
    meta = {"id": "a", "question": GOOD["question"], "bbox": GOOD["bbox"], "answer": None}
    image, crop, bad = encoded("PNG"), encoded("JPEG"), "malformed_record"
    unpickled = pickle.dumps(Payload(payload))
    cases = [(None, {"image": image, "json": meta}), (None, {"image": image, "crop": crop, "json": meta})]
    texts = [b"", b"{", b"null", b"3", b"[]", b'"text"', b"\xff\xfe\x00", b"[" * 100_000, b"{}", bytes(99), unpickled]
    cases += [(bad, {"image": image, "json": text}) for text in [*texts, json.dumps(meta).encode()[:-9]]]
    wrong = {
        "id": [None, True, 1.5, [], {}, "", "x" * 2000, "\ud800"],
        "question": [None, True, 3, [], {}, ["a"], "\ud800", "<|image_pad|>"],
        "answer": [[[]], {}, [{}], "\ud800", ["\ud800"]],
        "bbox": ["", 3, True, {}, [1, 2], [1, 2, 3, "4"], [None] * 4, [math.nan] * 4, nested(900), [10**400] * 4],
    }
    cases += [(bad, {"image": image, "json": {**meta, key: value}}) for key in wrong for value in wrong[key]]
    more = [("empty_question", "question", " "), ("overlong_prompt", "question", "what " * 4_000_000)]
    more += [("empty_box", "bbox", [5, 5, 5, 5]), ("box_outside_image", "bbox", [99, 99, 100, 100])]
    more += [("missing_crop", "bbox", None), (None, "answer", True), (None, "answer", ["a", None]), (None, "id", 7)]
    cases += [(reason, {"image": image, "json": {**meta, key: value}}) for reason, key, value in more]
    tiny, narrow = (encoded("PNG", picture(size=size)) for size in ((1, 1), (60, 3)))
    images = [(image[:-40], "unreadable_image"), (crop[:-300], "unreadable_image"), (b"", "unreadable_image")]
    images += [(unpickled, "unreadable_image"), (tiny, "image_too_small"), (narrow, "image_too_small")]
    images += [(data, "image_too_large") for data in headers(20_000, 20_000).values()]
    for data, reason in images:
        cases += [(reason, {"image": data, "json": meta}), (reason, {"image": image, "crop": data, "json": meta})]
    cases += [("missing_image", {"json": meta}), ("missing_image", {"crop": crop, "json": meta})]
    cases += [(bad, {"image": image}), (bad, {"image": image, "pkl": unpickled}), (bad, {"pickle": unpickled})]
    cases.append((None, {"image": image, "pyd": unpickled, "pth": unpickled, "npy": unpickled, "json": meta}))
    rng = random.Random(4)
    for _ in range(60):
        random_meta = {**meta, **{rng.choice(list(meta)): json_value(rng) for _ in range(2)}}
        cases.append((ANY, {"image": image, "json": random_meta}))
    return cases


def write_tar(path, records):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, parts in enumerate(records):
            for name, data in parts.items():
                data = data if isinstance(data, bytes) else json.dumps(data).encode()
                member = tarfile.TarInfo(f"{index:09d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_damaged_shards_are_dropped_by_reason(data_config, processor, tmp_path):
    cases = damaged_records(tmp_path / "payload-ran")
    write_tar(tmp_path / "shard-000000.tar", [parts for _, parts in cases])
    write_index(tmp_path)
    found = {}
    for view in VIEWS:
        found[view] = checked(list(iterate_samples(tmp_path, data_config, view, processor)))
        assert len(found[view]) == len(cases)
    for (expected, parts), item in zip(cases, found["crop"], strict=True):
        assert expected in (ANY, getattr(item, "reason", None)), (expected, item, str(parts)[:300])
    config = replace(data_config, path=str(tmp_path), batch_size=len(cases), num_workers=1)
    iterator = build_train_loader(config, "crop", processor, seed=1, dp_rank=0, dp_size=1)
    assert len(checked([*(batch := next(iterator)).samples, *batch.dropped])) == len(cases)
    iterator.close()
    assert not (tmp_path / "payload-ran").exists()


def test_flipped_bits_in_stored_records(dataset, data_config, processor, tmp_path):
    shutil.copytree(dataset, tmp_path / "flipped")
    rng = random.Random(5)
    for shard in sorted((tmp_path / "flipped").glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = [(member.offset_data, member.size) for member in tar]
        data = bytearray(shard.read_bytes())
        for start, size in members:
            for _ in range(rng.choice([0, 1, 5])):
                data[start + rng.randrange(size)] ^= 1 << rng.randrange(8)
        shard.write_bytes(data)
    items = checked(list(iterate_samples(tmp_path / "flipped", data_config, "full_and_crop", processor)))
    assert len(items) == 96 and 10 < sum(isinstance(item, Sample) for item in items) < 86
