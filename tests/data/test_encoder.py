import json
import multiprocessing
from dataclasses import replace
from itertools import islice

import pytest
import torch
from PIL import Image

from nemo_vopd.batch import DroppedSample
from nemo_vopd.config import CropConfig, PixelConfig
from nemo_vopd.data.encoder import iterate_samples
from nemo_vopd.data.loader import build_train_loader
from nemo_vopd.data.processor import Processor
from nemo_vopd.tools.prepare.prepare import prepare
from nemo_vopd.tools.prepare.tiny_model import ensure_tiny_assets


def test_stored_order_and_limit(data_config, processor):
    samples = list(iterate_samples(data_config.path, data_config, "crop", processor))
    assert [sample.id for sample in samples] == [f"digits-11-{i:06d}" for i in range(96)]
    assert samples[0].answers[0].startswith("it is a")
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
    Image.new("RGB", (112, 112)).save(tmp_path / "full.png")
    good = {"image": "full.png", "question": "what digit is red?", "bbox": [10, 20, 25, 41]}
    records = [
        {**good, "id": "good"},
        {**good, "id": "long", "question": "what digit is red?" * 40},
        {**good, "id": "special", "question": "what <|video_pad|> is it?"},
        {"id": "no box", "image": "full.png", "crop_image": "full.png", "question": "what digit is red?"},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    prepare(tmp_path / "data.jsonl", tmp_path / "out", progress=False)
    config = replace(data_config, path=str(tmp_path / "out"), batch_size=8, num_workers=1)

    def reasons(teacher_view):
        items = iterate_samples(config.path, config, teacher_view, processor)
        return {item.id: item.reason for item in items if isinstance(item, DroppedSample)}

    always = {"long": "overlong_prompt", "special": "malformed_record"}
    assert reasons("crop") == always
    assert reasons("boxed") == {**always, "no box": "missing_box"}
    loader = build_train_loader(config, "crop", processor, seed=1, dp_rank=0, dp_size=1)
    for batch in islice(loader, 3):  # two epochs each
        assert sorted(sample.id for sample in batch.samples) == ["good", "good", "no box", "no box"]
        assert {item.id: item.reason for item in batch.dropped} == always and len(batch.dropped) == 4
    loader.close()


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
