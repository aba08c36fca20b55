"""The rules by which a teacher follows, on plain tensors."""

import pytest
import torch

from nemo_vopd.config import TeacherConfig
from nemo_vopd.distill.teacher import Teacher


@pytest.mark.parametrize("kind,expected", [("ema", 1.25), ("fixed", 1.0), ("trust_region", 1.0)])
def test_one_update(kind, expected):
    main, published = {"w": torch.ones(3)}, []
    teacher = Teacher(TeacherConfig(kind=kind, rate=0.25), main, lambda shards: published.append(shards["w"].clone()))
    main["w"] += 1
    teacher.update(0)
    assert teacher.shards["w"].tolist() == [expected] * 3
    assert [p.tolist() for p in published] == ([] if kind != "ema" else [[expected] * 3])


def test_a_rank_that_owns_no_shard_updates_nothing():
    Teacher(TeacherConfig(), {}, lambda shards: None).update(0)


def test_restored_state_is_published():
    published = []
    teacher = Teacher(
        TeacherConfig(rate=0.5), {"w": torch.zeros(2)}, lambda shards: published.append(shards["w"].clone())
    )
    teacher.shards["w"].copy_(torch.tensor([3.0, 4.0]))  # as a checkpoint is read: in place
    teacher.restored()
    assert [p.tolist() for p in published] == [[3.0, 4.0]]
