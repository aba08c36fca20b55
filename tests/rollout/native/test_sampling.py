"""Drawn tokens follow the softmax, and depend on the request alone."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from nemo_vopd.rollout.native.sampling import draw, uniforms


def frequencies(logits, num, **options):
    uniform = torch.rand(1, num, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, log_probs = draw(logits[None], uniform, **options)
    return np.bincount(tokens[0].numpy(), minlength=logits.numel()), tokens[0], log_probs[0]


def test_frequencies_match_the_softmax():
    torch.manual_seed(0)
    logits, num = torch.randn(30) * 1.5, 40000
    for temperature in (0.7, 1.0, 1.6):
        counts, tokens, log_probs = frequencies(logits, num, temperature=temperature)
        probs = torch.softmax(logits.double() / temperature, -1)
        assert chisquare(counts, (probs * num).numpy()).pvalue > 1e-3
        torch.testing.assert_close(log_probs.double(), probs.log()[tokens], atol=1e-5, rtol=1e-5)


def test_a_wrong_distribution_would_be_noticed():
    logits, num = torch.linspace(-1, 1, 30), 40000
    counts, *_ = frequencies(logits, num, temperature=1.0)
    wrong = torch.softmax(logits.double() / 1.1, -1) * num
    assert chisquare(counts, wrong.numpy()).pvalue < 1e-6


def test_draws_of_the_counter_generator_are_uniform_and_independent_of_company():
    first = uniforms(7, "3/image-12", 0, 4000)
    assert torch.equal(first[:10], uniforms(7, "3/image-12", 0, 10))
    others = [uniforms(8, "3/image-12", 0, 4000), uniforms(7, "4/image-12", 0, 4000)]
    others += [uniforms(7, "3/image-13", 0, 4000), uniforms(7, "3/image-12", 1, 4000)]
    for other in others:
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.06
    assert chisquare(np.histogram(first, bins=20, range=(0, 1))[0]).pvalue > 1e-3


def test_top_p_keeps_the_smallest_sufficient_set():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    counts, _, log_probs = frequencies(logits, 20000, temperature=1.0, top_p=0.7)
    assert counts[2] == counts[3] == 0
    assert abs(counts[0] / 20000 - 0.5 / 0.8) < 0.02
    # log-probs are those of the full distribution: what the loss and the importance weights use
    assert set(log_probs.exp().mul(100).round().int().tolist()) == {50, 30}


def test_forbidden_tokens_are_never_drawn():
    logits = torch.tensor([5.0, 1.0, 0.0, 4.0])
    counts, *_ = frequencies(logits, 5000, temperature=1.0, forbidden=torch.tensor([0, 3]))
    assert counts[0] == counts[3] == 0
    tokens, _ = draw(logits[None], None, temperature=1.0, forbidden=torch.tensor([0]))
    assert tokens.item() == 3


def test_extreme_draws_stay_inside_the_vocabulary():
    logits = torch.tensor([[-1e4, 0.0, -1e4]]).expand(3, -1)
    tokens, _ = draw(logits, torch.tensor([[0.0], [0.5], [1 - 1e-16]], dtype=torch.float64), temperature=1.0)
    assert tokens.tolist() == [[1], [1], [1]]


@pytest.mark.parametrize("vocabulary", [5, 128, 300, 1280])
def test_the_token_is_where_the_running_sum_exceeds_the_draw(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(4, vocabulary, generator=generator)
    uniform = torch.rand(4, 500, dtype=torch.float64, generator=generator)
    tokens, log_probs = draw(logits, uniform, temperature=0.7)
    probs = torch.softmax(logits.double() / 0.7, -1)
    expected = torch.searchsorted(probs.cumsum(-1), uniform, right=True)
    assert (tokens == expected).float().mean() > 0.999, "round-off may move a draw that is next to a border"
    torch.testing.assert_close(log_probs.double(), probs.log().gather(-1, tokens), atol=1e-5, rtol=1e-5)


def test_log_probs_count_forbidden_tokens_even_where_they_are_almost_everything():
    logits = torch.tensor([[200.0, 1.0, 0.0]])
    tokens, log_probs = draw(logits, None, temperature=1.0, forbidden=torch.tensor([0]))
    assert tokens.item() == 1 and log_probs.item() == pytest.approx(-199.0)
    assert logits[0, 0] == 200, "logits are the caller's"


def test_a_model_that_has_become_nan_draws_inside_the_vocabulary():
    for options in ({}, {"top_p": 0.5}):
        tokens, _ = draw(torch.full((1, 130), torch.nan), torch.tensor([[0.3]]), temperature=1.0, **options)
        assert 0 <= tokens.item() < 130
