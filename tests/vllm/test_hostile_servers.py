"""A program that takes the place of a vLLM server, and a server that answers otherwise than it was asked."""

from __future__ import annotations

import copy
import json
import math
import socket
import threading
import time
from collections.abc import Callable

import psutil
import pytest

from nemo_vopd.data.encoder import iterate_samples
from nemo_vopd.data.processor import Processor
from nemo_vopd.errors import EngineLost, OptionError, RunError
from nemo_vopd.rollout.vllm.engine import VLLMEngine
from nemo_vopd.rollout.vllm.server import Client
from nemo_vopd.rollout.vllm.weight_sync import FolderSync
from tests.helpers import tiny_config
from tests.hostile import Hostile, Reply, content, repeated
from tests.vllm.conftest import params_of
from tests.vllm.test_vllm_client import fake_server, processes

GENERATE, PROOF = "/inference/v1/generate", "/prove_key"
N, LENGTH = 3, 8


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def silent(handler) -> None:
    time.sleep(20)


REPLIES: dict[str, Reply] = {
    "anything": content(b"{}"),
    "a wrong proof": content(json.dumps("0" * 64).encode()),
    "not found": content(b"", 404),
    "a page": content(b"<html>"),
    "nothing": silent,
}


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES.keys())
def test_a_program_that_takes_the_port_while_vllm_loads_gets_nothing(tmp_path, reply):
    port, stranger = free_port(), None

    def take_the_port() -> None:
        nonlocal stranger
        deadline = time.monotonic() + 40
        while not (tmp_path / "note").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        stranger = Hostile(reply, port)
        stranger.serve_forever(0.02)

    threading.Thread(target=take_the_port, daemon=True).start()
    # one that keeps silent is found out by the end of vLLM, which cannot have the port
    words = f"another program answers at http://127.0.0.1:{port}, where vLLM was to listen; give the command again"
    loading = 60
    if reply is silent:
        words, loading = "vLLM ended with code 1 while it started: .*Address already in use", 3
    with pytest.raises(RunError, match=words):
        fake_server(tmp_path, "--loading", str(loading), port=port)
    assert stranger is not None
    stranger.shutdown()
    stranger.server_close()
    assert stranger.asked and all(path.startswith(f"{PROOF}?") and key is None for path, key in stranger.asked)
    number = int((tmp_path / "note").read_text().split()[0])
    assert not psutil.pid_exists(number)


def test_the_key_of_a_server_is_new_secret_and_accepted(tmp_path):
    keys = set()
    for name in ("one", "two"):
        server = fake_server(tmp_path / name)
        keys.add(server.key)
        assert not any(server.key in part for process in processes(tmp_path / name) for part in process.cmdline())
        assert server.key not in (tmp_path / name / "log").read_text()
        with pytest.raises(EngineLost, match="does not prove that it has the key VLLM_API_KEY"):
            Client(server.url, timeout_seconds=5, retries=0, key="another").check()
        server.stop()
    assert len(keys) == 2 and all(len(key) == 64 for key in keys)


@pytest.fixture
def sample(assets, tmp_path):
    config = tiny_config(assets, tmp_path)
    processor = Processor.from_pretrained(config.model.hf_path)
    return processor, next(iter(iterate_samples(config.data.path, config.data, "crop", processor, 1)))


def good(processor, sample) -> dict:
    """What vLLM says to `sample`: N responses of one to N tokens."""
    choices = [
        {
            "index": index,
            "finish_reason": "stop",
            "token_ids": [7] * (index + 1),
            "logprobs": {"content": [{"logprob": -0.5}] * (index + 1)},
        }
        for index in reversed(range(N))
    ]
    return {"prompt_token_ids": sample.student.token_ids.tolist(), "choices": choices}


def serving(answer: Reply) -> Hostile:
    server = Hostile(content(b""))
    info = {"vllm_config": {"model_config": {"logprobs_mode": "raw_logprobs"}}}
    server.replies = {"/server_info": content(json.dumps(info).encode()), GENERATE: answer}
    return server


def generate(groups, sample, answer: Reply, timeout: float = 20.0):
    """The rollouts that an engine makes of `answer`."""
    processor, one = sample
    with serving(answer).running() as server:
        params = params_of(processor, n=N, max_response_length=LENGTH)
        engine = VLLMEngine([server.url], params, groups, processor, None, timeout_seconds=timeout, retries=1)
        engine.client._with_key.pause_seconds = 0.02
        try:
            return engine.generate([one])
        finally:
            assert all(key is None for _, key in server.asked)


def last(answer: dict) -> dict:
    return answer["choices"][-1]


def change(path: str, value) -> Callable[[dict], None]:
    """Set what `path` names in the last of the choices."""

    def apply(answer: dict) -> None:
        *names, name = path.split(".")
        target = last(answer)
        for step in names:
            target = target[int(step)] if isinstance(target, list) else target[step]
        target[int(name) if isinstance(target, list) else name] = value

    return apply


LOGPROB = "logprobs.content.0.logprob"
WRONG: dict[str, tuple[Callable[[dict], object], str]] = {
    "too few choices": (lambda a: a["choices"].pop(), r"2 responses with the numbers \[2, 1\], 3 were asked for"),
    "too many choices": (lambda a: a["choices"].append({**last(a), "index": 3}), "4 responses"),
    "no choices": (lambda a: a.update(choices=[]), "0 responses"),
    "a choice twice": (change("index", 1), "3 responses with the numbers"),
    "choices that are a text": (lambda a: a.update(choices="abc"), "TypeError"),
    "choices that are missing": (lambda a: a.pop("choices"), "KeyError: 'choices'"),
    "no prompt": (lambda a: a.update(prompt_token_ids=None), "TypeError"),
    "a choice that is a number": (lambda a: a["choices"].append(3), "TypeError"),
    "broken off": (change("finish_reason", "abort"), "a response was broken off, finish_reason abort"),
    "no tokens": (change("token_ids", []), "a response of 0 tokens"),
    "too many tokens": (change("token_ids", [7] * 9), "a response of 9 tokens, at most 8 were asked for"),
    "tokens that are null": (change("token_ids", None), "TypeError"),
    "tokens that are a text": (change("token_ids", "7"), "token id 7, and the model has"),
    "a token below 0": (change("token_ids.0", -1), "token id -1, and the model has"),
    "a token beyond the vocabulary": (change("token_ids.0", 10**6), "token id 1000000, and the model has"),
    "a token that is a fraction": (change("token_ids.0", 7.5), "token id 7.5"),
    "a token that is true": (change("token_ids.0", True), "token id True"),
    "escape sequences": (change("token_ids.0", "\x1b[2J\u202e"), r"token id \?\[2J\?, and"),
    "log-probs that are missing": (change("logprobs", None), "TypeError"),
    "a log-prob that is missing": (change(LOGPROB, None), "log-prob None"),
    "a log-prob too many": (
        lambda a: last(a)["logprobs"]["content"].append({"logprob": -1.0}),
        "2 log-probs of 1 tokens",
    ),
    "a log-prob too few": (change("logprobs.content", []), "0 log-probs of 1 tokens"),
    "NaN": (change(LOGPROB, math.nan), "log-prob nan"),
    "minus infinity": (change(LOGPROB, -math.inf), "log-prob -inf"),
    "beyond float32": (change(LOGPROB, -1e300), "log-prob -1e"),
    "a positive log-prob": (change(LOGPROB, 0.5), "log-prob 0.5"),
    "a log-prob that is a text": (change(LOGPROB, "-0.5"), "log-prob -0.5"),
}


@pytest.mark.parametrize("spoil,words", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_reply_is_the_loss_of_the_engine(groups, sample, spoil, words):
    answer = good(*sample)
    rollouts = generate(groups, sample, content(json.dumps(answer).encode()))
    assert [(r.index, r.token_ids.tolist(), r.log_probs.tolist()) for r in rollouts] == [
        (index, [7] * (index + 1), [-0.5] * (index + 1)) for index in range(N)
    ]
    wrong = copy.deepcopy(answer)
    spoil(wrong)
    with pytest.raises(EngineLost, match=f"is lost: it sent a wrong answer to {GENERATE} .{words}") as error:
        generate(groups, sample, content(json.dumps(wrong).encode()))
    assert str(error.value).isprintable() and len(str(error.value)) < 600


HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
BODIES: dict[str, tuple[Reply, str]] = {
    "slow": (repeated(HEAD, b" ", 0.1), f"{GENERATE} failed 2 times .timed out"),
    "endless": (repeated(HEAD, b" " * 2**16), f"{GENERATE} failed 2 times .the reply has more than 1[0-9]{{6}} bytes"),
    "cut short": (content(b'{"choices": '), f"{GENERATE} failed 2 times .no JSON"),
    "empty": (content(b""), "TypeError"),
    "a list": (content(b"[]"), "TypeError"),
    "a number": (content(b"3"), "TypeError"),
}


@pytest.mark.parametrize("answer,words", BODIES.values(), ids=BODIES.keys())
def test_a_reply_that_is_none_is_the_loss_of_the_engine(groups, sample, answer, words):
    begin = time.monotonic()
    with pytest.raises(EngineLost, match=words):
        generate(groups, sample, answer, timeout=0.8 if "timed out" in words else 20.0)
    assert time.monotonic() - begin < 15


def test_other_wrong_answers_of_a_server_are_told_alike(groups, sample, tmp_path):
    with serving(silent).running() as server:
        client = Client(server.url, timeout_seconds=5, retries=0)
        for body in (b"[]", b"null", b'{"vllm_config": 3}', b"{}"):
            server.replies["/server_info"] = content(body)
            with pytest.raises(EngineLost, match="sent a wrong answer to /server_info"):
                client.require_log_probs("raw_logprobs")
        server.replies["/server_info"] = content(
            b'{"vllm_config": {"model_config": {"logprobs_mode": ["\\u001b[2J"]}}}'
        )
        with pytest.raises(OptionError, match="the server's log-probs are"):
            client.require_log_probs("raw_logprobs")
        server.replies["/reset_prefix_cache"] = content(b"3")
        with pytest.raises(EngineLost, match="sent a wrong answer to /reset_prefix_cache"):
            client.reset_caches()


def test_no_path_of_weights_goes_to_a_program_without_the_key(groups, tmp_path):
    with serving(silent).running() as server:
        sync = FolderSync([server.url], tmp_path / "shared", lambda folder: folder.mkdir(), 5.0, key="secret")
        with pytest.raises(EngineLost, match="does not prove that it has the key"):
            sync()
        assert server.asked and all(path.startswith(f"{PROOF}?") and key is None for path, key in server.asked)
