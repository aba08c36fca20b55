"""The native engine: cached decoding equals the full forward pass, in every layout, for any batch composition."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from nemo_vopd.batch import Sample
from nemo_vopd.data.encoder import iterate_samples
from nemo_vopd.data.processor import Processor
from nemo_vopd.mcore import parallel
from nemo_vopd.rollout.engine import SamplingParams
from nemo_vopd.rollout.native.engine import Decoder
from nemo_vopd.tools.prepare.tiny_model import write_tiny_model
from nemo_vopd.vlm.build import build_vlm
from tests.distributed import run_distributed
from tests.helpers import tiny_config
from tests.reference import response_logits

NUM, LENGTH, N = 6, 10, 3


def load_samples(config) -> list[Sample]:
    """Prompts of different length: the teacher view of the odd ones stands in as their student view."""
    processor = Processor.from_pretrained(config.model.hf_path)
    samples = list(iterate_samples(config.data.path, config.data, "crop", processor, NUM))
    for sample in samples[1::2]:
        sample.student = sample.teacher
    assert len({s.student.num_tokens for s in samples}) == 2
    return samples


def sample_responses(config, max_batch_tokens=100000, temperature=0.8, n=N, end_token_ids=None):
    """Responses of this layout: for each view n pairs of token ids and log-probs."""
    groups = parallel.initialize(config.parallel, seed=1)
    processor = Processor.from_pretrained(config.model.hf_path)
    params = SamplingParams(
        n=n,
        temperature=temperature,
        max_response_length=LENGTH,
        end_token_ids=tuple(processor.end_token_ids if end_token_ids is None else end_token_ids),
        forbidden_token_ids=tuple(processor.forbidden_token_ids),
        seed=5,
    )
    samples = load_samples(config)
    decoder = Decoder(build_vlm(config, groups), groups, max_batch_tokens)
    return decoder([s.student for s in samples], [f"2/{s.id}" for s in samples], params)


def same_tokens(a, b):
    return all(torch.equal(x[0], y[0]) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


@pytest.fixture(scope="module")
def responses(assets, tmp_path_factory):
    config = tiny_config(assets, tmp_path_factory.mktemp("run"))
    return config, sample_responses(config)


def test_log_probs_equal_the_full_forward_pass(responses, assets):
    config, answers = responses
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(assets / "tiny-vlm", dtype=torch.float32)
    for sample, pairs in zip(load_samples(config), answers, strict=True):
        for tokens, log_probs in pairs:
            with torch.no_grad():
                logits = response_logits(model, sample.student, tokens) / 0.8
            expected = torch.log_softmax(logits, -1).gather(-1, tokens[:, None]).squeeze(-1)
            torch.testing.assert_close(log_probs, expected, atol=2e-5, rtol=1e-5)


def test_responses_of_one_prompt_differ_and_end_properly(responses):
    config, answers = responses
    ends = Processor.from_pretrained(config.model.hf_path).end_token_ids
    assert len({tuple(tokens.tolist()) for tokens, _ in answers[0]}) > 1
    for pairs in answers:
        for tokens, log_probs in pairs:
            inside = torch.isin(tokens[:-1], torch.tensor(ends))
            assert not inside.any() and len(tokens) == len(log_probs) <= LENGTH
            assert len(tokens) == LENGTH or tokens[-1].item() in ends


def test_batch_composition_does_not_matter(responses):
    config, answers = responses
    assert same_tokens(answers, sample_responses(config, max_batch_tokens=60))


def test_greedy_equals_transformers_generate(assets, tmp_path):
    config = tiny_config(assets, tmp_path)
    answers = sample_responses(config, temperature=0.0, n=1, end_token_ids=())
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(assets / "tiny-vlm", dtype=torch.float32)
    forbidden = Processor.from_pretrained(config.model.hf_path).forbidden_token_ids
    for sample, ((tokens, _),) in zip(load_samples(config), answers, strict=True):
        view = sample.student
        generated = model.generate(
            input_ids=view.token_ids[None],
            attention_mask=torch.ones_like(view.token_ids)[None],
            mm_token_type_ids=(view.token_ids == model.config.image_token_id).int()[None],
            pixel_values=view.pixel_values,
            image_grid_thw=view.grid_thw,
            do_sample=False,
            max_new_tokens=LENGTH,
            min_new_tokens=LENGTH,
            eos_token_id=None,
            suppress_tokens=forbidden,
        )
        assert generated[0, view.num_tokens :].tolist() == tokens.tolist()


@pytest.mark.parametrize(
    "world_size,overrides",
    [
        (2, ["parallel.tensor=2"]),
        (2, ["parallel.tensor=2", "parallel.sequence=true"]),
        (3, ["parallel.pipeline=3"]),
        (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.pipeline_layout=[1,2]"]),
    ],
    ids=str,
)
def test_every_layout_draws_the_same_tokens(world_size, overrides, responses, assets, tmp_path):
    _, answers = responses
    config = tiny_config(assets, tmp_path, *overrides)
    for rank_answers in run_distributed(sample_responses, world_size, config):
        assert same_tokens(answers, rank_answers)
        for pairs, rank_pairs in zip(answers, rank_answers, strict=True):
            for (_, ours), (_, theirs) in zip(pairs, rank_pairs, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_chunks_of_virtual_stages_draw_the_same_tokens(assets, tmp_path):
    """Three lanes travel twice around a ring of three stages."""
    write_tiny_model(tmp_path / "six", seed=4, num_hidden_layers=6)
    model = f"model.hf_path={tmp_path}/six"
    answers = sample_responses(tiny_config(assets, tmp_path, model))
    config = tiny_config(assets, tmp_path, model, "parallel.pipeline=3", "parallel.virtual_pipeline=2")
    for rank_answers in run_distributed(sample_responses, 3, config):
        assert same_tokens(answers, rank_answers)


def test_prompts_are_computed_once_for_all_their_responses(assets, tmp_path):
    config = tiny_config(assets, tmp_path)
    groups = parallel.initialize(config.parallel, seed=1)
    samples = load_samples(config)
    decoder = Decoder(build_vlm(config, groups), groups, 100000)
    fed, forward = [], decoder.stage.forward

    def noted(index, tokens, *args, **kwargs):
        fed.append(len(tokens.token_ids))
        return forward(index, tokens, *args, **kwargs)

    decoder.stage.forward = noted  # type: ignore[method-assign]
    for n in (1, 8):
        params = SamplingParams(n=n, max_response_length=3, seed=1)
        decoder([s.student for s in samples], [s.id for s in samples], params)
    prompts = sum(s.student.num_tokens for s in samples)  # packed: no padding
    assert fed == [prompts, NUM, NUM, prompts, 8 * NUM, 8 * NUM]
