"""Responses token by token: the same under every layout, and what Hugging Face's own model gives."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from nemo_vopd.batch import Rollout, Sample
from nemo_vopd.config import Config
from nemo_vopd.data.encoder import iterate_samples
from nemo_vopd.data.processor import Processor
from nemo_vopd.distill.divergence import generalized_jsd
from nemo_vopd.mcore import parallel
from nemo_vopd.tools.evaluation import traces
from nemo_vopd.tools.evaluation.traces import ResponseTrace, trace
from nemo_vopd.tools.prepare.tiny_model import write_tiny_model
from nemo_vopd.vlm.build import build_vlm
from tests.distributed import run_distributed
from tests.helpers import tiny_config
from tests.reference import response_logits

TEMPERATURE, LENGTHS = 0.7, (300, 5, 40, 1)


def made_up(config: Config) -> tuple[Processor, list[Rollout]]:
    """Responses of different lengths, the first longer than a trace shows."""
    processor = Processor.from_pretrained(config.model.hf_path)
    samples = iterate_samples(config.data.path, config.data, "crop", processor, len(LENGTHS))
    generator, rollouts = torch.Generator().manual_seed(1), []
    allowed = torch.tensor([i for i in range(60) if i not in processor.forbidden_token_ids])
    for sample, length in zip(samples, LENGTHS, strict=True):
        assert isinstance(sample, Sample)
        tokens = allowed[torch.randint(0, len(allowed), (length,), generator=generator)]
        rollouts.append(Rollout(sample, tokens, torch.zeros(length)))
    return processor, rollouts


def traced(config: Config) -> list[ResponseTrace]:
    groups = parallel.initialize(config.parallel, seed=1)
    processor, rollouts = made_up(config)
    model = build_vlm(config, groups)
    result = trace(rollouts, model, model, processor, config.distill, TEMPERATURE, groups)
    parallel.destroy()
    return result


@pytest.fixture(scope="module")
def deeper(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "deeper"
    write_tiny_model(path, seed=4, num_hidden_layers=6)
    return path


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, []),
        (2, ["parallel.tensor=2", "parallel.sequence=true"]),
        (2, ["parallel.pipeline=2"]),
        (3, ["parallel.pipeline=3", "parallel.virtual_pipeline=2"]),
        (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    ],
    ids=["111", "211 sequence", "121", "131 interleaved", "221"],
)
def test_traces_are_those_of_the_original_under_every_layout(world_size, overrides, deeper, assets, tmp_path):
    config = tiny_config(assets, tmp_path, f"model.hf_path={deeper}", *overrides)
    processor, rollouts = made_up(config)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(deeper, dtype=torch.float32)
    for result in run_distributed(traced, world_size, config):  # every rank has them
        for one, rollout in zip(result, rollouts, strict=True):
            tokens = rollout.token_ids[: traces.MAX_TOKENS]
            views = rollout.sample.student, rollout.sample.teacher
            with torch.no_grad():
                logits = [response_logits(model, view, tokens) / TEMPERATURE for view in views]
            for policy, expected in zip((one.student, one.teacher), logits, strict=True):
                log_probs = expected.log_softmax(-1)
                sampled = log_probs.gather(-1, tokens[:, None]).squeeze(-1)
                assert torch.allclose(torch.tensor(policy.log_probs), sampled, atol=2e-4)
                highest = log_probs.exp().max(-1).values
                assert torch.allclose(torch.tensor([top[0][1] for top in policy.top]), highest, atol=2e-4)
            options = {"alpha": config.distill.alpha, "top_k": config.distill.top_k, "add_tail": True}
            divergence = generalized_jsd(*logits, **options)
            assert torch.allclose(torch.tensor(one.divergence), divergence, atol=2e-5)
            assert one.tokens == [processor.tokenizer.decode([token]) for token in tokens.tolist()]
