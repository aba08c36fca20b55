"""The gap: which view is which, what is right, and every sample counted once over data-parallel ranks."""

from __future__ import annotations

import pytest
import torch

from nemo_vopd.data.processor import Processor
from nemo_vopd.data.task_encoder import iterate_samples
from nemo_vopd.evaluation.gap import measure_gap
from nemo_vopd.evaluation.scoring import exact_match
from nemo_vopd.mcore import parallel
from tests.distributed import run_distributed
from tests.helpers import tiny_config

NUM = 7


def oracle_gap(config):
    """A decoder that reads every crop, and of the full images those of the first three samples only."""
    groups = parallel.initialize(config.parallel, seed=1)
    processor = Processor.from_pretrained(config.model.hf_path)
    samples = list(iterate_samples(config.data.path, config.data, "crop", processor, NUM))
    seen_by = {id(s.student): (s, k < 3) for k, s in enumerate(samples)} | {id(s.teacher): (s, True) for s in samples}

    def decoder(views, ids, params):
        assert params.temperature == 0 and params.n == 1
        replies = []
        for view, name in zip(views, ids, strict=True):
            sample, right = seen_by[id(view)]
            assert sample.id == name
            tokens = torch.tensor(processor.encode_answer(sample.answer if right else "what"))
            replies.append([(tokens, torch.zeros(len(tokens)))])
        return replies

    gap = measure_gap(decoder, processor, samples, groups, max_response_length=4)
    return gap, gap.gap, sorted(reply.id for reply in gap.replies), sorted(s.id for s in samples)


@pytest.mark.parametrize("world_size", [1, 2])
def test_full_and_crop_accuracy_over_all_ranks(world_size, assets, tmp_path):
    for gap, difference, replied, asked in run_distributed(oracle_gap, world_size, tiny_config(assets, tmp_path)):
        assert replied == asked and len(asked) == NUM
        assert gap.crop_accuracy == 1 and gap.full_accuracy == pytest.approx(3 / NUM)
        assert difference == pytest.approx(1 - 3 / NUM)
        assert sum(r.full_correct for r in gap.replies) == 3 and all(r.crop_correct for r in gap.replies)


@pytest.mark.parametrize(
    "reply,answer,right",
    [("Red", "red.", True), (" a  7 ", "a 7", True), ("17", "7", False), ("", "7", False), ("7 or 8", "7", False)],
)
def test_exact_match(reply, answer, right):
    assert exact_match(reply, answer) is right
