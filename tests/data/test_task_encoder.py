import json
import multiprocessing
import pickle
import shutil
from dataclasses import replace
from itertools import islice

import pytest
import torch
from PIL import Image

from nemo_vopd.batch import DroppedSample, PromptBatch
from nemo_vopd.config import CropConfig, PixelConfig
from nemo_vopd.data.assets import ensure_tiny_assets
from nemo_vopd.data.prepare import prepare
from nemo_vopd.data.processor import Processor
from nemo_vopd.data.task_encoder import build_train_loader, iterate_samples
from nemo_vopd.errors import OptionError


def batches(config, processor, count, *, seed=1, dp_rank=0, dp_size=1, teacher_view="crop"):
    loader = build_train_loader(config, teacher_view, processor, seed=seed, dp_rank=dp_rank, dp_size=dp_size)
    return take(iter(loader), count)


def take(iterator, count):
    """The first batches; closing frees the workers at once, the garbage collector would take 5 s for it."""
    try:
        return list(islice(iterator, count))
    finally:
        iterator.close()


def ids(batch):
    return [sample.id for sample in batch.samples]


def assert_same(left, right):
    assert (left.id, left.question, left.answer) == (right.id, right.question, right.answer)
    for name in ("student", "teacher"):
        for key, value in vars(getattr(left, name)).items():
            assert torch.equal(value, getattr(getattr(right, name), key)), (left.id, name, key)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_global_batches_do_not_depend_on_the_layout(data_config, processor, num_workers):
    config = replace(data_config, num_workers=num_workers)
    whole = batches(config, processor, 15)  # 120 records: more than one pass over the 96
    assert all(isinstance(batch, PromptBatch) and len(batch.samples) == 8 for batch in whole)
    for dp_size in (2, 4) if num_workers == 0 else (2,):
        parts = [batches(config, processor, 15, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
        for step, batch in enumerate(whole):
            for rank, part in enumerate(parts):
                assert len(part[step].samples) == 8 // dp_size
                for mine, theirs in zip(part[step].samples, batch.samples[rank::dp_size], strict=True):
                    assert_same(mine, theirs)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_order_follows_the_seed(data_config, processor, num_workers):
    config = replace(data_config, num_workers=num_workers)
    first, again, other = ([ids(batch) for batch in batches(config, processor, 12, seed=seed)] for seed in (1, 1, 2))
    assert first == again != other
    flat = sum(first, [])
    if num_workers == 0:
        assert len(set(flat)) > 60 and flat != sorted(flat)
    # the whole set is visited, again and again
    many = {name for batch in batches(config, processor, 40, seed=1) for name in ids(batch)}
    assert len(many) == 96


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_state_restores_at_the_exact_batch_on_any_rank(data_config, processor, num_workers):
    config = replace(data_config, num_workers=num_workers)
    loader = build_train_loader(config, "crop", processor, seed=3, dp_rank=0, dp_size=1)
    iterator = iter(loader)
    for _ in range(7):
        next(iterator)
    state = pickle.dumps(loader.save_state_rank())
    expected = [ids(batch) for batch in take(iterator, 9)]
    other = build_train_loader(config, "crop", processor, seed=3, dp_rank=1, dp_size=2)
    other.restore_state_rank(pickle.loads(state))
    assert [ids(batch) for batch in take(iter(other), 9)] == [batch[1::2] for batch in expected]


def test_state_is_the_same_on_every_rank(data_config, processor):
    states = []
    for rank in range(2):
        loader = build_train_loader(data_config, "crop", processor, seed=3, dp_rank=rank, dp_size=2)
        iterator = iter(loader)
        for _ in range(5):
            next(iterator)
        state = loader.save_state_rank()
        states.append(str(state.worker_states[0]) + str(state.next_worker_id))
    assert states[0] == states[1]


def test_stored_order_and_limit(data_config, processor):
    samples = list(iterate_samples(data_config.path, data_config, "crop", processor))
    assert [sample.id for sample in samples] == [f"digits-11-{i:06d}" for i in range(96)]
    assert samples[0].answer.startswith("it is a")
    assert len(list(iterate_samples(data_config.path, data_config, "crop", processor, limit=10))) == 10
    assert not list(iterate_samples(data_config.path, data_config, "crop", processor, limit=0))


def test_teacher_views(data_config, processor):
    def first(teacher_view, **options):
        config = replace(data_config, **options)
        return next(
            sample
            for sample in iterate_samples(config.path, config, teacher_view, processor)
            if sample.student.grid_thw.tolist() == [[1, 8, 8]]
        )

    crop, full, both, boxed = (first(view) for view in ("crop", "full", "full_and_crop", "boxed"))
    for sample in (crop, full, both, boxed):
        assert torch.equal(sample.student.token_ids, crop.student.token_ids)
        assert torch.equal(sample.student.pixel_values, crop.student.pixel_values)
    assert crop.teacher.grid_thw.tolist() == [[1, 4, 4]]
    assert torch.equal(full.teacher.pixel_values, full.student.pixel_values)
    assert both.teacher.grid_thw.tolist() == [[1, 8, 8], [1, 4, 4]]
    assert torch.equal(both.teacher.pixel_values[:64], crop.student.pixel_values)
    assert torch.equal(both.teacher.pixel_values[64:], crop.teacher.pixel_values)
    assert boxed.teacher.grid_thw.tolist() == [[1, 8, 8]]
    assert not torch.equal(boxed.teacher.pixel_values, boxed.student.pixel_values)
    drawn = first("crop", draw_box=True)
    assert torch.equal(drawn.student.pixel_values, boxed.teacher.pixel_values)
    assert torch.equal(drawn.teacher.pixel_values, crop.teacher.pixel_values)
    hinted = first("crop", question_hint=" it is a digit .")
    assert hinted.question == crop.question + " it is a digit ."
    assert hinted.student.num_tokens == crop.student.num_tokens + 5
    assert hinted.teacher.num_tokens == crop.teacher.num_tokens + 5


def test_unusable_samples_are_counted_and_the_run_goes_on(data_config, processor, tmp_path):
    Image.new("RGB", (804, 4)).save(tmp_path / "thin.png")
    Image.new("RGB", (112, 112)).save(tmp_path / "full.png")
    good = {"image": "full.png", "question": "what digit is red?", "bbox": [10, 20, 25, 41]}
    records = [
        {**good, "id": "good"},
        {**good, "id": "thin", "image": "thin.png", "bbox": [0, 0, 3, 2]},
        {**good, "id": "long", "question": "what digit is red?" * 40},
        {**good, "id": "special", "question": "what <|video_pad|> is it?"},
        {"id": "no box", "image": "full.png", "crop_image": "full.png", "question": "what digit is red?"},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    prepare(tmp_path / "data.jsonl", tmp_path / "out", progress=False)
    config = replace(data_config, path=str(tmp_path / "out"), batch_size=10, num_workers=1)

    def reasons(teacher_view):
        items = iterate_samples(config.path, config, teacher_view, processor)
        return {item.id: item.reason for item in items if isinstance(item, DroppedSample)}

    always = {"thin": "extreme_aspect", "long": "overlong_prompt", "special": "malformed_record"}
    assert reasons("crop") == always
    assert reasons("boxed") == {**always, "no box": "missing_box"}
    for batch in batches(config, processor, 3):
        assert len(batch.samples) + len(batch.dropped) == 10
        assert set(ids(batch)) <= {"good", "no box"}
        assert all(always[item.id] == item.reason for item in batch.dropped)


def test_overlong_questions_are_refused_before_they_are_tokenized(data_config, processor, monkeypatch):
    monkeypatch.setattr(processor, "view", lambda *_: pytest.fail("tokenized"))
    config = replace(data_config, question_hint=" ?" * 16 * data_config.max_prompt_length)
    dropped = list(iterate_samples(config.path, config, "crop", processor, limit=3))
    assert [item.reason for item in dropped] == ["overlong_prompt"] * 3
    assert "data.max_prompt_length=128" in dropped[0].detail


def test_crops_that_can_show_nothing_are_dropped(data_config, processor, tmp_path):
    Image.new("RGB", (112, 112)).save(tmp_path / "full.png")
    record = {"id": "dot", "image": "full.png", "question": "what digit is red?", "bbox": [10, 10, 11, 11]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    prepare(tmp_path / "data.jsonl", tmp_path / "out", progress=False)
    for min_side, reason in ((1, "image_too_small"), (3, "image_too_small"), (4, None), (28, None)):
        config = replace(data_config, crop=CropConfig(min_side=min_side))
        (item,) = iterate_samples(tmp_path / "out", config, "crop", processor)
        assert getattr(item, "reason", None) == reason, min_side


def test_longer_of_both_views_decides_overlong(data_config, processor):
    config = replace(data_config, max_prompt_length=20, full=PixelConfig(3136, 3136))
    assert not any(isinstance(x, DroppedSample) for x in iterate_samples(config.path, config, "crop", processor))
    config = replace(config, crop_pixels=PixelConfig(12544, 12544))
    dropped = list(iterate_samples(config.path, config, "crop", processor))
    assert {item.reason for item in dropped} == {"overlong_prompt"} and "data.max_prompt_length=20" in dropped[0].detail


def test_batches_cross_processes_by_value(data_config, processor):
    batch = batches(data_config, processor, 1)[0]
    data = pickle.dumps(batch)
    copy = pickle.loads(data)
    for left, right in zip(batch.samples, copy.samples, strict=True):
        assert_same(left, right)
    copy.samples[0].student.pixel_values.zero_()  # writable, and nobody else's memory
    copy.samples[0].student.token_ids.add_(1)
    assert batch.samples[0].student.pixel_values.any()


def test_wrong_options(data_config, processor, tmp_path):
    with pytest.raises(OptionError) as caught:
        build_train_loader(data_config, "crop", processor, seed=1, dp_rank=0, dp_size=3)
    assert caught.value.option == "data.batch_size"
    with pytest.raises(OptionError, match="data.num_workers=97"):
        crowded = replace(data_config, num_workers=97)
        build_train_loader(crowded, "crop", processor, seed=1, dp_rank=0, dp_size=1)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(OptionError, match="prepare_data.py") as caught:
            build_train_loader(replace(data_config, path=str(path)), "crop", processor, seed=1, dp_rank=0, dp_size=1)
        assert caught.value.option == "data.path"
        with pytest.raises(OptionError):
            next(iterate_samples(path, data_config, "crop", processor))
    shutil.copytree(data_config.path, tmp_path / "part")
    (tmp_path / "part" / "shard-000003.tar").unlink()
    with pytest.raises(OptionError, match="lacks shard-000003.tar"):
        next(iterate_samples(tmp_path / "part", data_config, "crop", processor))
    for text in ("{", "[]", "{}", '{"shard_counts": 3}'):
        (tmp_path / "part" / ".nv-meta" / ".info.json").write_text(text)
        with pytest.raises(OptionError, match="is damaged"):
            next(iterate_samples(tmp_path / "part", data_config, "crop", processor))


def test_tiny_assets_are_made_once_by_concurrent_processes(tmp_path, data_config):
    places = (tmp_path / "a" / "tiny-vlm", tmp_path / "a" / "tiny-digits")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=ensure_tiny_assets, args=places) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["tiny-digits", "tiny-vlm"]
    ensure_tiny_assets(tmp_path / "b" / "own-model", tmp_path / "b" / "own-data")
    assert not (tmp_path / "b").exists(), "a user's path is never filled in"
    before = (places[0] / "model.safetensors").stat().st_mtime_ns
    ensure_tiny_assets(*places)
    assert (places[0] / "model.safetensors").stat().st_mtime_ns == before
    config = replace(data_config, path=str(places[1]))
    assert len(list(iterate_samples(places[1], config, "crop", Processor.from_pretrained(places[0])))) == 256
