"""The gap: which view is which, what is right, and every sample counted once over data-parallel ranks."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from nemo_vopd.data.encoder import iterate_samples
from nemo_vopd.data.processor import Processor
from nemo_vopd.errors import OptionError, RunError
from nemo_vopd.mcore import parallel
from nemo_vopd.rollout.engine import SamplingParams
from nemo_vopd.tools.evaluation import gap as module
from nemo_vopd.tools.evaluation.gap import answers, measure_gap
from nemo_vopd.tools.evaluation.questions import exact_match, grade
from tests.distributed import run_distributed
from tests.helpers import tiny_config

NUM = 7


def oracle_gap(config, max_bytes):
    """A decoder that reads every crop, and of the full images those of the first three samples only."""
    groups = parallel.initialize(config.parallel, seed=1)
    processor = Processor.from_pretrained(config.model.hf_path)
    samples = list(iterate_samples(config.data.path, config.data, "crop", processor, NUM))
    by_id = {sample.id: (place, sample) for place, sample in enumerate(samples)}
    crop_tokens = samples[0].teacher.num_tokens
    batches = []

    def decoder(views, ids, params):
        assert params.temperature == 0 and params.n == 1
        batches.append(len(views))
        replies = []
        for view, name in zip(views, ids, strict=True):
            place, sample = by_id[name]
            right = view.num_tokens == crop_tokens or place < 3
            tokens = torch.tensor(processor.encode_answer(sample.answers[0] if right else "what"))
            replies.append([(tokens, torch.zeros(len(tokens)))])
        return replies

    module._MAX_BYTES = max_bytes
    gap = measure_gap(decoder, processor, config.data.path, config.data, groups, max_response_length=4, limit=NUM)
    return gap, gap.gap, [sample.id for sample in samples], batches


@pytest.mark.parametrize("world_size,max_bytes", [(1, 1 << 30), (1, 1), (2, 1 << 30)])
def test_full_and_crop_accuracy_over_all_ranks(world_size, max_bytes, assets, tmp_path):
    config = tiny_config(assets, tmp_path)
    for gap, difference, asked, batches in run_distributed(oracle_gap, world_size, config, max_bytes):
        assert [reply.id for reply in gap.replies] == asked and len(asked) == NUM
        assert gap.crop_accuracy == 1 and gap.full_accuracy == pytest.approx(3 / NUM)
        assert difference == pytest.approx(1 - 3 / NUM)
        assert [r.full_correct for r in gap.replies] == [place < 3 for place in range(NUM)]
        assert all(r.crop_correct for r in gap.replies)
        # no more images in memory than asked for
        assert batches == ([1] * 2 * NUM if max_bytes == 1 else [len(batches) and batches[0]] * 2)


def replies_or_error(config, path):
    groups = parallel.initialize(config.parallel, seed=1)
    processor = Processor.from_pretrained(config.model.hf_path)
    tokens = torch.tensor(processor.encode_answer("what"))
    try:
        gap = measure_gap(
            lambda views, ids, params: [[(tokens, torch.zeros(len(tokens)))] for _ in views],
            processor,
            str(path),
            config.data,
            groups,
            max_response_length=4,
            option="evaluation.path",
        )
    except OptionError as error:
        return str(error)
    return [(reply.full, reply.full_correct) for reply in gap.replies]


def test_a_sample_without_an_answer_is_left_out_on_every_rank(assets, tmp_path):
    from nemo_vopd.tools.prepare.prepare import prepare
    from nemo_vopd.tools.prepare.synthetic import write_digits

    write_digits(tmp_path / "raw", num_samples=4, seed=1)
    records = [json.loads(line) for line in (tmp_path / "raw" / "data.jsonl").read_text().splitlines()]
    records[0]["answer"] = ["red", "What"]  # any of them is right
    records[2]["answer"], records[3]["answer"] = float("nan"), [None]
    (tmp_path / "raw" / "data.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    prepare(tmp_path / "raw" / "data.jsonl", tmp_path / "data", workers=1, progress=False)
    config = tiny_config(assets, tmp_path)
    for replies in run_distributed(replies_or_error, 2, config, tmp_path / "data"):
        assert replies == [("what", True), ("what", False)]
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_prompt_length=1))
    assert "holds no usable sample" in run_distributed(replies_or_error, 1, config, tmp_path / "data")[0]


@pytest.mark.parametrize(
    "reply,answer,right",
    [("Red", "red.", True), (" a  7 ", "a 7", True), ("17", "7", False), ("", "7", False), ("7 or 8", "7", False)],
)
def test_exact_match(reply, answer, right):
    assert exact_match(reply, answer) is right
    assert bool(grade(reply, ["some other", answer], "text", {})) is right


def test_numbers_that_are_not_finite_are_no_answers():
    """Finite weights can overflow in their number format: no text is shown and no accuracy computed from it."""
    for number in (math.nan, math.inf, -math.inf):
        tokens, zeros, log_probs = torch.tensor([1, 2]), torch.zeros(2), torch.tensor([0.0, number])
        found = [[(tokens, zeros)], [(tokens, log_probs)]]
        with pytest.raises(RunError, match="probabilities for b are not finite"):
            answers(lambda *_, found=found: found, [], ["a", "b"], SamplingParams())  # type: ignore[arg-type]
