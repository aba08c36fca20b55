"""Continuous batching: places of ended responses are used again, and nobody can tell from a response."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from nemo_vopd.batch import View
from nemo_vopd.config import PixelConfig
from nemo_vopd.data.processor import Processor
from nemo_vopd.mcore import parallel
from nemo_vopd.rollout.engine import SamplingParams
from nemo_vopd.rollout.native import batching
from nemo_vopd.rollout.native.engine import Decoder
from nemo_vopd.tools.prepare.tiny_model import write_tiny_model
from nemo_vopd.vlm.build import build_vlm
from tests.distributed import run_distributed
from tests.helpers import tiny_config
from tests.reference import response_logits
from tests.rollout.native.test_engine import same_tokens
from tests.vlm.tiny_qwen3_vl import write_tiny_qwen3_vl

NUM, LENGTH = 14, 24
PIXELS = PixelConfig()
ENDS = tuple(range(40, 128, 11))  # any of these ends a response: lengths from 1 to LENGTH
BUDGETS = (1, 400, 100000)
"""One prompt at a time; a few, refilled; all at once."""


def make_views(processor: Processor) -> list[View]:
    """Prompts of 30 to 80 tokens, some of one length, in no order; images of different size."""
    random = np.random.default_rng(0)
    views = []
    for i in range(NUM):
        side = (56, 112)[i % 2]
        image = Image.fromarray(random.integers(0, 255, (side, side, 3), dtype=np.uint8))
        limits = dataclasses.replace(PIXELS, min_pixels=side * side, max_pixels=side * side)
        views.append(processor.view([image], "what digit" + " a" * int(random.integers(0, 8)) * 7, [limits]))
    return views


def params(**options) -> SamplingParams:
    options = {"n": 3, "temperature": 0.9, "max_response_length": LENGTH, "end_token_ids": ENDS, "seed": 3, **options}
    return SamplingParams(**options)


def decode_with(config, budgets, cases, continuous=True):
    """Answers by budget and case, and what was computed and laid out for each."""
    groups = parallel.initialize(config.parallel, seed=1)
    processor = Processor.from_pretrained(config.model.hf_path)
    views, model = make_views(processor), build_vlm(config, groups)
    names, results = [str(i) for i in range(NUM)], []
    forbidden = tuple(processor.forbidden_token_ids)
    plain, laid_out = batching.KVCache.lay_out, []
    batching.KVCache.lay_out = lambda cache, *sizes: (laid_out.append((cache, sizes)), plain(cache, *sizes))[1]
    try:
        for budget in budgets:
            for options in cases:
                laid_out.clear()
                decoder = Decoder(model, groups, budget, continuous=continuous)
                answers = decoder(views, names, params(forbidden_token_ids=forbidden, **options))
                layouts = [sizes for _, sizes in laid_out]
                results.append((answers, vars(decoder.counts), layouts, {c.num_positions for c, _ in laid_out}))
    finally:
        batching.KVCache.lay_out = plain
    return results


@pytest.fixture(scope="module", autouse=True)
def small_passes():
    """Prompts of several passes."""
    whole, batching.PROMPT_TOKENS = batching.PROMPT_TOKENS, {"cpu": 150}
    yield
    batching.PROMPT_TOKENS = whole


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "qwen2_5_vl", seed=4, num_hidden_layers=6)
    write_tiny_qwen3_vl(folder / "qwen3_vl", folder / "qwen2_5_vl", layers=4)
    return folder


CASES = ({"n": 1}, {"n": 3}, {"n": 2, "temperature": 0.0}, {"n": 4, "top_p": 0.8, "max_response_length": 5})


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    config = tiny_config(models, tmp_path_factory.mktemp("run"), f"model.hf_path={models}/qwen2_5_vl")
    return config, decode_with(config, BUDGETS, CASES)


def test_responses_do_not_depend_on_the_budget(alone):
    by_budget = [alone[1][i * len(CASES) : (i + 1) * len(CASES)] for i in range(len(BUDGETS))]
    for case in range(len(CASES)):
        reference = by_budget[-1][case][0]
        for results in by_budget[:-1]:
            assert same_tokens(reference, results[case][0])
    lengths = [len(tokens) for pairs in by_budget[0][1][0] for tokens, _ in pairs]
    assert min(lengths) < 4 and max(lengths) == LENGTH and len(set(lengths)) > 8


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_log_probs_while_refilling_equal_the_full_forward_pass(family, models, tmp_path):
    config = tiny_config(models, tmp_path, f"model.hf_path={models}/{family}")
    ((answers, *_),) = decode_with(config, [400], [{"n": 3}])
    model = AutoModelForImageTextToText.from_pretrained(models / family, dtype=torch.float32)
    for view, pairs in zip(make_views(Processor.from_pretrained(models / family)), answers, strict=True):
        for tokens, log_probs in pairs:
            with torch.no_grad():
                logits = response_logits(model, view, tokens) / 0.9
            expected = torch.log_softmax(logits, -1).gather(-1, tokens[:, None]).squeeze(-1)
            torch.testing.assert_close(log_probs, expected, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "world_size,overrides",
    [
        (2, ["parallel.tensor=2", "parallel.sequence=true"]),
        (2, ["parallel.pipeline=2"]),
        (3, ["parallel.pipeline=3", "parallel.virtual_pipeline=2"]),
    ],
    ids=str,
)
def test_every_layout_refills_alike(world_size, overrides, alone, models, tmp_path):
    config = tiny_config(models, tmp_path, f"model.hf_path={models}/qwen2_5_vl", *overrides)
    expected = alone[1][-len(CASES) :]
    for results in run_distributed(decode_with, world_size, config, [600], CASES):
        for (reference, *_), (answers, *_) in zip(expected, results, strict=True):
            assert same_tokens(reference, answers)
            for pairs, rank_pairs in zip(reference, answers, strict=True):
                for (_, ours), (_, theirs) in zip(pairs, rank_pairs, strict=True):
                    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_the_budget_is_a_bound(alone):
    longest = max(v.num_tokens for v in make_views(Processor.from_pretrained(alone[0].model.hf_path)))
    results = iter(alone[1])
    divided_anew = 0
    for budget in BUDGETS:
        for case in CASES:
            _, _, layouts, (positions,) = next(results)
            width = case.get("max_response_length", LENGTH)
            assert positions <= max(budget, longest + case["n"] * width)
            assert positions <= NUM * (longest + case["n"] * width), "no more than all prompts need"
            for slots, prompt_width, rows in layouts:
                assert slots * prompt_width + rows * width <= positions
                assert slots >= 1 and rows >= case["n"]
            divided_anew += len(layouts) > 1
    assert divided_anew, "shorter prompts leave room for more of them"


def test_ended_responses_are_not_computed_for_long(alone):
    for (answers, counts, *_), case in zip(alone[1], CASES * len(BUDGETS), strict=True):
        lengths = [len(tokens) for pairs in answers for tokens, _ in pairs]
        # the first token comes from the prompt, the last is not fed
        assert counts["row_steps"] - counts["ended_row_steps"] == sum(lengths) - len(lengths)
        assert counts["ended_row_steps"] <= counts["row_steps"] / 8, case


def test_refilling_takes_fewer_steps_than_static_batches(alone):
    config, results = alone
    refilled = results[len(CASES) : len(CASES) + 2]  # the budget of a few prompts, n = 1 and 3
    static = decode_with(config, [BUDGETS[1]], CASES[:2], continuous=False)
    for (answers, counts, *_), (reference, of_static, *_) in zip(refilled, static, strict=True):
        assert same_tokens(answers, reference)
        assert counts["steps"] < 0.9 * of_static["steps"]
        assert counts["row_steps"] < 0.8 * of_static["row_steps"]
