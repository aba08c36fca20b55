"""The loader: one global order for every layout, whole epochs, any position found again."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections import Counter
from dataclasses import replace
from itertools import islice

import psutil
import pytest
import torch
import yaml

from nemo_vopd.batch import PromptBatch
from nemo_vopd.data.blend import write_blend
from nemo_vopd.data.encoder import iterate_samples
from nemo_vopd.data.loader import build_train_loader
from nemo_vopd.errors import OptionError

NUM_RECORDS = 96


def batches(config, processor, count, *, seed=1, dp_rank=0, dp_size=1, position=0):
    loader = build_train_loader(
        config, "crop", processor, seed=seed, dp_rank=dp_rank, dp_size=dp_size, position=position
    )
    try:
        return list(islice(loader, count))
    finally:
        loader.close()


def keys(batch):
    return [sample.key for sample in batch.samples]


def assert_same(left, right):
    assert (left.id, left.key, left.question, left.answers) == (right.id, right.key, right.question, right.answers)
    for name in ("student", "teacher"):
        for key, value in vars(getattr(left, name)).items():
            assert torch.equal(value, getattr(getattr(right, name), key)), (left.id, name, key)


def test_the_global_order_does_not_depend_on_workers_ranks_or_batch_size(data_config, processor):
    whole = batches(data_config, processor, 15)  # 120 records: more than one pass over the 96
    assert all(isinstance(batch, PromptBatch) and len(batch.samples) == 8 for batch in whole)
    order = [sample for batch in whole for sample in batch.samples]
    for batch_size, dp_size, num_workers in ((8, 4, 1), (24, 2, 2), (40, 8, 0)):
        config = replace(data_config, batch_size=batch_size, num_workers=num_workers)
        count = len(order) // batch_size
        parts = [batches(config, processor, count, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
        for step in range(count):
            here = order[step * batch_size : (step + 1) * batch_size]
            for rank, part in enumerate(parts):
                assert len(part[step].samples) == batch_size // dp_size
                for mine, theirs in zip(part[step].samples, here[rank::dp_size], strict=True):
                    assert_same(mine, theirs)


def test_an_epoch_reads_every_record_once(dataset, data_config, processor):
    """With 24 records and default settings 10 used to be missing from the first epoch."""
    config = replace(data_config, batch_size=24, num_workers=2)
    for epoch in range(3):
        read = [s for batch in batches(config, processor, 4, position=epoch * NUM_RECORDS) for s in batch.samples]
        assert sorted(s.key.record for s in read) == list(range(NUM_RECORDS))
        assert {s.key.occurrence for s in read} == {epoch} and len({s.id for s in read}) == NUM_RECORDS


def test_no_two_prompts_of_a_batch_share_a_key(dataset, data_config, processor, tmp_path):
    """A record can come twice in a batch at the seam of two epochs, and its id also in the two parts of a blend."""
    config = replace(data_config, batch_size=160)
    (batch,) = batches(config, processor, 1)
    assert len(set(keys(batch))) == 160 and Counter(s.id for s in batch.samples).most_common(1)[0][1] == 2
    shutil.copytree(dataset, tmp_path / "copy")
    shutil.copytree(dataset, tmp_path / "again")
    write_blend(tmp_path / "blend.yaml", [("copy", 1.0), ("again", 1.0), ("copy", 1.0)])
    (batch,) = batches(replace(config, path=str(tmp_path / "blend.yaml")), processor, 1)
    assert len(set(keys(batch))) == 160 > len({s.id for s in batch.samples})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_any_position_is_found_again_under_another_layout(data_config, processor, num_workers):
    config = replace(data_config, num_workers=num_workers)
    loader = build_train_loader(config, "crop", processor, seed=3, dp_rank=0, dp_size=1)
    for _ in range(7):
        next(loader)
    position = loader.position
    expected = [keys(next(loader)) for _ in range(9)]
    loader.close()
    other = batches(config, processor, 9, seed=3, dp_rank=1, dp_size=2, position=position)
    assert [keys(batch) for batch in other] == [batch[1::2] for batch in expected]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_looking_ahead_changes_neither_position_nor_order(data_config, processor, num_workers):
    config = replace(data_config, num_workers=num_workers)
    order = [keys(batch) for batch in batches(config, processor, 4)]
    loader = build_train_loader(config, "crop", processor, seed=1, dp_rank=0, dp_size=1)
    assert keys(loader.peek()) == keys(loader.peek()) == order[0] and loader.position == 0
    assert keys(next(loader)) == order[0] and loader.position == 8
    assert keys(loader.peek()) == order[1] and loader.position == 8
    assert [keys(next(loader)) for _ in range(3)] == order[1:] and loader.position == 32
    loader.close()


def test_closing_ends_the_processes(data_config, processor):
    before = set(psutil.Process().children())
    loader = build_train_loader(replace(data_config, num_workers=2), "crop", processor, seed=1, dp_rank=0, dp_size=1)
    next(loader)
    workers = set(psutil.Process().children()) - before
    assert len(workers) == 2
    loader.close()
    assert not any(worker.is_running() for worker in workers)


def test_the_seed_decides_the_order(data_config, processor):
    first, again, other = ([keys(b) for b in batches(data_config, processor, 12, seed=seed)] for seed in (1, 1, 2))
    assert first == again != other


def test_loading_leaves_the_global_generator_alone(data_config, processor):
    before = torch.random.get_rng_state()
    batches(data_config, processor, 1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_batches_cross_processes_by_value(data_config, processor):
    batch = batches(data_config, processor, 1)[0]
    copy = pickle.loads(pickle.dumps(batch))
    for left, right in zip(batch.samples, copy.samples, strict=True):
        assert_same(left, right)
    copy.samples[0].student.pixel_values.zero_()  # writable, and nobody else's memory
    copy.samples[0].student.token_ids.add_(1)
    assert batch.samples[0].student.pixel_values.any()


def test_wrong_options(data_config, processor, tmp_path):
    with pytest.raises(OptionError) as caught:
        batches(data_config, processor, 1, dp_size=3)
    assert caught.value.option == "data.batch_size"
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(OptionError, match="prepare_data.py") as caught:
            batches(replace(data_config, path=str(path)), processor, 1)
        assert caught.value.option == "data.path"
        with pytest.raises(OptionError):
            next(iterate_samples(path, data_config, "crop", processor))
    shutil.copytree(data_config.path, tmp_path / "part")
    split = tmp_path / "part" / ".nv-meta" / "split.yaml"
    whole = split.read_text()
    split.write_text(whole.replace("exclude: []", "exclude: [shard-000001.tar/000000021]"))
    with pytest.raises(OptionError, match="leaves out single records"):
        next(iterate_samples(tmp_path / "part", data_config, "crop", processor))
    split.write_text(whole)
    (tmp_path / "part" / "shard-000003.tar").unlink()
    with pytest.raises(OptionError, match="lacks shard-000003.tar"):
        next(iterate_samples(tmp_path / "part", data_config, "crop", processor))
    damaged = dict.fromkeys(("{", "[]", "{}", '{"shard_counts": 3}'), "is damaged")
    for text, words in {**damaged, '{"shard_counts": {}}': "holds no records"}.items():
        (tmp_path / "part" / ".nv-meta" / ".info.json").write_text(text)
        with pytest.raises(OptionError, match=words):
            next(iterate_samples(tmp_path / "part", data_config, "crop", processor))


@pytest.mark.parametrize("name", ["dataset.yaml", "split.yaml", ".info.json", "blend.yaml"])
def test_no_file_of_a_data_set_runs_code(name, data_config, processor, tmp_path):
    """Energon's own loader calls what `__module__` and `__function__` name, at any depth."""
    ran = tmp_path / "ran"
    call = {"__module__": "os", "__function__": "mkdir", "path": str(ran)}
    folder = tmp_path / "set"
    for depth in range(3):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(data_config.path, folder)
        file, path = folder / ".nv-meta" / name, folder
        if name == "blend.yaml":
            path = file = tmp_path / name
            write_blend(file, [("set", 1.0)])
        content = yaml.safe_load(file.read_text())
        place = content
        for _ in range(depth):
            place = next((v for v in reversed(place.values()) if isinstance(v, dict)), place)
        place.update(call)
        file.write_text(json.dumps(content) if name.endswith("json") else yaml.safe_dump(content, sort_keys=False))
        try:
            batches(replace(data_config, path=str(path)), processor, 1)
        except OptionError as error:
            assert error.option == "data.path" and re.search("is damaged|is no blend", str(error))
        assert not ran.exists()
