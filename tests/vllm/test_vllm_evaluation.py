"""recipes/evaluate.py through a real vLLM server: the replies and numbers of the native engine."""

from __future__ import annotations

import json

import pytest

from nemo_vopd.data.processor import Processor
from nemo_vopd.tools.evaluation.asking import read_answers
from nemo_vopd.tools.evaluation.evaluate import evaluate
from tests.tools.evaluation.published import PUBLISHED
from tests.tools.evaluation.test_benchmarks import configured

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def test_vllm_and_the_native_engine_reply_alike(config, server, groups, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", server.key)
    # vision tokens are never sampled here; a server has to be told
    processor = Processor.from_pretrained(config.model.hf_path)
    forbidden = ",".join(f"{token}:-100" for token in processor.forbidden_token_ids)
    PUBLISHED["zoombench"]["parquet"](tmp_path / "zoombench")
    pixels = config.data.full
    same = [
        f"data.{view}.{end}_pixels={getattr(pixels, f'{end}_pixels')}"
        for view in ("full", "crop_pixels")
        for end in ("min", "max")
    ]
    same += ["rollout.max_response_length=5", "precision.dtype=fp32", f"model.hf_path={config.model.hf_path}"]
    asked = ["engine=server", f"server.url={server.url}/v1", f"server.model={config.model.hf_path}"]
    asked.append(f"server.extra_body={{logit_bias:{{{forbidden}}}}}")
    for name, options in (
        ("gap", [f"data.path={config.data.path}", "limit=16"]),
        ("zoombench", ["benchmark=zoombench", f"data.path={tmp_path}"]),
    ):
        outputs = {
            engine: evaluate(configured(*same, *options, *more, f"output={tmp_path}/{engine}.json"))
            for engine, more in (("native", []), ("served", asked))
        }
        native, served = (read_answers(tmp_path / f"{engine}.{name}.answers.jsonl", "output")[1] for engine in outputs)
        # vLLM's incremental decoding of the tiny tokenizer begins with a space
        replies = [{(a.id, a.view): a.reply.strip() for a in answers} for answers in (native, served)]
        assert replies[0] == replies[1] and len(set(replies[0].values())) > 2, replies
        assert outputs["native"]["results"] == outputs["served"]["results"]
        assert json.loads((tmp_path / "served.json").read_text())["engine"] == "server"
