"""Options of recipes/evaluate.py and what they must satisfy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_vopd.bounds import bounded
from nemo_vopd.config import Config
from nemo_vopd.errors import OptionError


@dataclass
class EndpointConfig:
    """An OpenAI-compatible server."""

    url: str | None = None
    """Its address with the version, http://HOST:8000/v1."""
    model: str | None = None
    """Name of the model there."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, where one is needed."""
    max_concurrent_requests: int = bounded(32, at_least=1)
    """Largest number of requests under way."""
    timeout_seconds: float = bounded(600.0, at_least=1e-3)
    """Time limit of one request in seconds."""
    retries: int = bounded(5, at_least=0)
    """Number of times that a request is tried again, with growing pauses, before the evaluation ends."""
    extra_body: Any = None
    """Further fields of each request, such as {chat_template_kwargs: {enable_thinking: false}}."""


@dataclass
class JudgeConfig(EndpointConfig):
    """A language model that decides where rules cannot."""

    max_tokens: int = bounded(16, at_least=1)
    """Largest number of tokens of its reply; one that reasons before it says Yes or No needs thousands."""


@dataclass
class EvaluateConfig(Config):
    """A run's configuration; model, data, parallel, precision and the response length are used."""

    benchmark: Any = None
    """A public benchmark or a list of them, from files below data.path (--help lists them); null: data.path is an
    Energon data set with answers."""
    protocol: str = bounded("training", one_of=("training", "published"))
    """Sizes of images and length of replies: those of training (data, rollout.max_response_length), or those that the
    published numbers of each benchmark were made with."""
    engine: str = bounded("native", one_of=("native", "server"))
    """Model under test: model.hf_path on Megatron-Core, or an OpenAI-compatible server."""
    server: EndpointConfig = field(default_factory=EndpointConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Without judge.url, replies that rules cannot decide count as wrong."""
    views: list[str] = field(default_factory=lambda: ["full", "crop"])
    """Views that are asked about: full, crop or both."""
    limit: int | None = bounded(None, at_least=1)
    """Number of questions, in stored order; null takes all."""
    batch_size: int = bounded(64, at_least=1)
    """Number of questions whose images are in memory together, for each data-parallel rank."""
    output: str | None = None
    """JSON file of the results; every reply goes to NAME.BENCHMARK.answers.jsonl beside it, from which an interrupted
    evaluation goes on."""
    baseline: str | None = None
    """The `output` of another model, to compare with question by question."""


def check(config: EvaluateConfig) -> None:
    """Raise OptionError for what evaluation adds to a run's options."""
    if not config.views or not set(config.views) <= {"full", "crop"}:
        raise OptionError("views", config.views, "must be full, crop or both", "set views=[full,crop]")
    for name, endpoint in (("server", config.server), ("judge", config.judge)):
        if not isinstance(endpoint.extra_body, dict | None):
            rule, remedy = "must be fields of a request", f"write {name}.extra_body={{top_k:1}}"
            raise OptionError(f"{name}.extra_body", endpoint.extra_body, rule, remedy)
    if config.output is not None and Path(config.output).is_dir():
        raise OptionError("output", config.output, "is a folder", "give a file, output=results.json")
    if config.baseline is not None and config.output is None:
        rule = "is compared with the answers of this evaluation, which are kept only with an output"
        raise OptionError("baseline", config.baseline, rule, "give output=FILE.json")
