"""What the native engine makes of a request: top_p, end tokens, numbering, steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nemo_vopd.data.processor import Processor
from nemo_vopd.rollout.engine import SamplingParams
from nemo_vopd.rollout.native.engine import Decoder, MegatronEngine
from nemo_vopd.vlm.build import build_vlm
from tests.helpers import tiny_config
from tests.rollout.native.test_engine import LENGTH, load_samples, same_tokens


@pytest.fixture
def decoder(groups, assets, tmp_path):
    config = tiny_config(assets, tmp_path)
    processor = Processor.from_pretrained(config.model.hf_path)
    return Decoder(build_vlm(config, groups), groups, 10000), load_samples(config), processor


def answer(decoder, samples, processor, **options):
    options = {"max_response_length": LENGTH, "n": 3, "seed": 5, **options}
    params = SamplingParams(forbidden_token_ids=tuple(processor.forbidden_token_ids), **options)
    return decoder([s.student for s in samples], [str(s.key) for s in samples], params)


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


def test_rollouts_are_numbered_and_follow_the_occurrence(decoder):
    decode, samples, processor = decoder
    params = SamplingParams(n=3, max_response_length=LENGTH, seed=5)
    engine = MegatronEngine(decode.stage.model, decode.stage.groups, params, 10000)
    views, answers = [s.student for s in samples], []
    for occurrence in (0, 4):
        again = [replace(s, key=s.key._replace(occurrence=occurrence)) for s in samples]
        rollouts = engine.generate(again)
        assert [(r.sample.id, r.index) for r in rollouts] == [(s.id, k) for s in samples for k in range(3)]
        answers.append(decode(views, [str(s.key) for s in again], params))
        expected = [tokens for pairs in answers[-1] for tokens, _ in pairs]
        assert all(torch.equal(r.token_ids, tokens) for r, tokens in zip(rollouts, expected, strict=True))
    assert not same_tokens(*answers)


def test_a_record_that_comes_twice_gets_draws_of_its_own(decoder):
    """At the seam of two epochs a batch can hold a record twice; its n responses must not be the same ones again."""
    decode, samples, processor = decoder
    params = SamplingParams(n=3, max_response_length=LENGTH, seed=5)
    engine = MegatronEngine(decode.stage.model, decode.stage.groups, params, 10000)
    twice = [samples[0], replace(samples[0], key=samples[0].key._replace(occurrence=1))]
    first, second, both = ([r.token_ids.tolist() for r in engine.generate(s)] for s in (twice[:1], twice[1:], twice))
    assert both == first + second and first != second
