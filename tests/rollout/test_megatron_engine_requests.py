"""What the native engine makes of a request: top_p, end tokens, numbering, steps, waves."""

from __future__ import annotations

import pytest
import torch

from nemo_vopd.batch import View
from nemo_vopd.data.processor import Processor
from nemo_vopd.rollout.engine import SamplingParams
from nemo_vopd.rollout.megatron import Decoder, MegatronEngine
from nemo_vopd.vlm import build_vlm
from tests.helpers import tiny_config
from tests.rollout.test_megatron_engine import LENGTH, load_samples, same_tokens


@pytest.fixture
def decoder(groups, assets, tmp_path):
    config = tiny_config(assets, tmp_path)
    processor = Processor.from_pretrained(config.model.hf_path)
    return Decoder(build_vlm(config, groups), groups, processor.pad_token_id, 10000), load_samples(config), processor


def answer(decoder, samples, processor, **options):
    options = {"max_response_length": LENGTH, "n": 3, "seed": 5, **options}
    params = SamplingParams(forbidden_token_ids=tuple(processor.forbidden_token_ids), **options)
    return decoder([s.student for s in samples], [s.id for s in samples], params, options.pop("step", 0))


def test_a_narrow_top_p_is_greedy(decoder):
    narrow, greedy = answer(*decoder, top_p=1e-9, n=1), answer(*decoder, temperature=0.0, n=1)
    assert same_tokens(narrow, greedy)
    assert not same_tokens(narrow, answer(*decoder, n=1))


def test_a_response_is_cut_after_its_first_end_token(decoder):
    """Other responses go on, and a finished row may draw an end token again: that must not lengthen it."""
    whole = answer(*decoder)
    ends = tuple(range(0, 128, 3))
    cut = answer(*decoder, end_token_ids=ends)
    assert len({len(t) for pairs in cut for t, _ in pairs}) > 2
    for long_pairs, pairs in zip(whole, cut, strict=True):
        for (long, long_log_probs), (tokens, log_probs) in zip(long_pairs, pairs, strict=True):
            hits = torch.isin(long, torch.tensor(ends)).nonzero().flatten()
            length = int(hits[0]) + 1 if len(hits) else LENGTH
            assert tokens.tolist() == long[:length].tolist()
            torch.testing.assert_close(log_probs, long_log_probs[:length])


def test_rollouts_are_numbered_and_follow_the_step(decoder):
    decode, samples, processor = decoder
    params = SamplingParams(n=3, max_response_length=LENGTH, seed=5)
    engine = MegatronEngine(
        decode.model, decode.groups, params, pad_token_id=processor.pad_token_id, max_batch_tokens=10000
    )
    views, ids = [s.student for s in samples], [s.id for s in samples]
    for step in (0, 4):
        rollouts = engine.generate(samples, step)
        assert [(r.sample.id, r.index) for r in rollouts] == [(s.id, k) for s in samples for k in range(3)]
        expected = [tokens for pairs in decode(views, ids, params, step) for tokens, _ in pairs]
        assert all(torch.equal(r.token_ids, tokens) for r, tokens in zip(rollouts, expected, strict=True))
    assert not same_tokens(decode(views, ids, params, 0), decode(views, ids, params, 4))


@pytest.mark.parametrize("n,in_flight", [(1, 1), (4, 1), (1, 3)])
def test_waves_hold_to_the_budget(decoder, n, in_flight):
    decode = decoder[0]
    lengths = torch.randint(1, 50, (30,), generator=torch.Generator().manual_seed(0)).tolist() + [400]
    empty = torch.zeros(0, 3, dtype=torch.int64)
    views = [View(torch.zeros(k, dtype=torch.int64), torch.zeros(3, k), torch.zeros(0, 1), empty) for k in lengths]
    decode.max_batch_tokens = 200
    waves = decode._split(views, SamplingParams(n=n, max_response_length=10), in_flight)
    assert sorted(i for wave in waves for i in wave) == list(range(len(views)))
    assert len(waves) < len(views), "short prompts are decoded together"
    for wave in waves:
        # prompts of a wave are padded to the longest; each has a cache of n responses; waves in flight share
        tokens = len(wave) * (max(lengths[i] for i in wave) + n * 10)
        assert len(wave) == 1 or tokens * in_flight <= 200
