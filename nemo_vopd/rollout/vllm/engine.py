"""vLLM as the rollout engine: servers of their own answer the prompts, and take over the student's weights each step.

They share no library with this package: prompts go out as token ids and PNG images over HTTP, responses come back as
token ids and log-probs. One rank of each model-parallel group asks and tells the others.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from PIL import Image
from torch import Tensor

from nemo_vopd.batch import Rollout, Sample, View
from nemo_vopd.data.processor import Processor
from nemo_vopd.errors import OptionError, RunError
from nemo_vopd.rollout.engine import RolloutEngine, SamplingParams
from nemo_vopd.rollout.vllm.server import Client
from nemo_vopd.rollout.vllm.weight_sync import finish_together, together

_NEVER = -1e9
"""Added to the logit of a forbidden token: its probability is 0 in float32, and JSON has no infinity."""
_TOKEN_BYTES = 1024
"""Room in a reply for one token with its text, the bytes of that and its log-prob; most need 150."""
_LEAST, _MOST = -1e4, 1e-3
"""Range of log-probs: vLLM writes -9999 for minus infinity, and rounding may lift one a little above 0."""
Response = tuple[list[int], list[float]]
"""Token ids and log-probs of one response."""


class VLLMEngine(RolloutEngine):
    """Samples from vLLM servers that hold a copy of the student.

    A server must offer its development and token endpoints, as `rollout/vllm/serve.py` does. Its log-probs are those of
    `rollout.native.sampling.draw` at temperature 0 and 1. At others vLLM has them only after forbidden tokens are taken
    out: they are higher by -log(1 - p), p being the probability of all image and video tokens together, which is next
    to 0 in a trained model; and after top_p, so that combination is refused.
    """

    def __init__(
        self,
        urls: list[str],
        params: SamplingParams,
        groups: ProcessGroupCollection,
        processor: Processor,
        sync: Callable[[], None] | None,
        *,
        key: str | None = None,
        timeout_seconds: float = 600.0,
        retries: int = 3,
        max_concurrent_requests: int = 64,
    ) -> None:
        """Every rank of the run calls it, and `generate` and `sync_weights`, together.

        `urls` are one server for all data-parallel groups, or several that are shared out. `sync` brings the student's
        weights to them (`FolderSync`, `NCCLSync`); None leaves them as they are. `key` is that of the servers. Raises
        OptionError when a server's log-probs are of another kind, EngineLost when one does not answer.
        """
        self.params, self.groups, self.sync = params, groups, sync
        self.images, self.image_token_id = PatchImages(processor.image_processor), processor.image_token_id
        self.vocab_size = processor.vocab_size
        url = urls[groups.dp_cp.rank() % len(urls)]
        self.client = Client(url, timeout_seconds=timeout_seconds, retries=retries, key=key)
        self.max_concurrent_requests = max_concurrent_requests
        self._samples: list[Sample] = []
        self._under_way: Future | None = None
        mode = log_probs_mode(params)
        together(lambda: self.client.require_log_probs(mode) if groups.mp.rank() == 0 else None)

    def generate(self, samples: list[Sample]) -> list[Rollout]:
        """n rollouts for each sample, in the order of the samples.

        Raises EngineLost on every rank of the run when a server is lost to one of them.
        """
        self.begin(samples)
        return self.finish()

    def begin(self, samples: list[Sample]) -> None:
        """Start answering `samples` in the background; every rank calls it, but none waits for another."""
        asks = self.groups.mp.rank() == 0
        pool = ThreadPoolExecutor(1)
        self._samples, self._under_way = samples, pool.submit(self._ask_all, samples) if asks else _nothing()
        pool.shutdown(wait=False)

    def finish(self) -> list[Rollout]:
        """The rollouts that `begin` was called for last; waits for them. Every rank of the run calls it.

        Raises EngineLost on all of them when a server is lost to one.
        """
        assert self._under_way is not None, "nothing was begun"
        answers, self._under_way = finish_together(self._under_way), None
        if self.groups.mp.size() > 1:
            shared = [answers]
            dist.broadcast_object_list(shared, group=self.groups.mp, group_src=0)
            (answers,) = shared
        assert answers is not None
        return [
            Rollout(sample, torch.tensor(tokens), torch.tensor(log_probs, dtype=torch.float32), index)
            for sample, responses in zip(self._samples, answers, strict=True)
            for index, (tokens, log_probs) in enumerate(responses)
        ]

    def sync_weights(self) -> None:
        """Bring the student's weights to the servers. Raises EngineLost on every rank when one does not take them."""
        if self.sync is not None:
            self.sync()

    def _ask_all(self, samples: list[Sample]) -> list[list[Response]]:
        self.client.check()
        given_up = threading.Event()
        pool = ThreadPoolExecutor(min(self.max_concurrent_requests, max(len(samples), 1)))
        asked = [pool.submit(self._ask, sample, given_up) for sample in samples]
        try:
            return [answer.result() for answer in asked]
        finally:
            given_up.set()  # where one failed the others need not try again
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, sample: Sample, given_up: threading.Event) -> list[Response]:
        """The n responses to one sample."""
        view, n = sample.student, self.params.n
        parts = [{"type": "image_url", "url": _png(image)} for image in self.images(view)]
        request = {
            "token_ids": one_token_for_each_image(view, self.image_token_id, self.images.merge),
            "content_parts": parts,
            "sampling_params": sampling_params(self.params, str(sample.key)),
            "return_token_ids": True,
        }
        most_tokens = view.num_tokens + n * self.params.max_response_length
        responses = self.client.post(
            "/inference/v1/generate",
            request,
            functools.partial(self._read, sample),
            largest_reply=2**20 + most_tokens * _TOKEN_BYTES,
            given_up=given_up,
        )
        return responses * n if self.params.temperature == 0 else responses  # greedy ones are alike, it answers once

    def _read(self, sample: Sample, answer: Any) -> list[Response]:
        """The responses in the server's `answer`; see `read_responses`. Raises RunError for another prompt."""
        found, view = list(answer["prompt_token_ids"]), sample.student
        if found != view.token_ids.tolist():
            rule = f"made {len(found)} tokens of the prompt of sample {sample.id}, training has {view.num_tokens}"
            remedy = "start it on the model of model.hf_path, its --mm-processor-kwargs with the pixels of data.full"
            raise RunError(f"vLLM at {self.client.url} {rule}; {remedy}")
        n = self.params.n if self.params.temperature > 0 else 1
        return read_responses(answer["choices"], n, self.params.max_response_length, self.vocab_size)


def read_responses(choices: Any, n: int, most_tokens: int, vocab_size: int) -> list[Response]:
    """The `n` responses in the `choices` of a reply, in order.

    Each has 1 to `most_tokens` tokens, ids below `vocab_size`, and one log-prob for each token. Raises ValueError,
    KeyError or TypeError for anything else.
    """
    by_index = {choice["index"]: choice for choice in choices}
    if len(choices) != n or by_index.keys() != set(range(n)):
        raise ValueError(f"{len(choices)} responses with the numbers {list(by_index)}, {n} were asked for")
    return [_response(by_index[index], most_tokens, vocab_size) for index in range(n)]


def _response(choice: dict[str, Any], most_tokens: int, vocab_size: int) -> Response:
    if choice["finish_reason"] not in ("stop", "length"):
        raise ValueError(f"a response was broken off, finish_reason {choice['finish_reason']}")
    tokens, log_probs = choice["token_ids"], [token["logprob"] for token in choice["logprobs"]["content"]]
    if not 1 <= len(tokens) <= most_tokens:
        raise ValueError(f"a response of {len(tokens)} tokens, at most {most_tokens} were asked for")
    if strange := [token for token in tokens if type(token) is not int or not 0 <= token < vocab_size]:
        raise ValueError(f"token id {strange[0]}, and the model has {vocab_size} tokens")
    if len(log_probs) != len(tokens):
        raise ValueError(f"{len(log_probs)} log-probs of {len(tokens)} tokens")
    if strange := [x for x in log_probs if type(x) not in (int, float) or not _LEAST <= x <= _MOST]:
        raise ValueError(f"log-prob {strange[0]}")
    return list(tokens), log_probs


def log_probs_mode(params: SamplingParams) -> str:
    """vLLM's --logprobs-mode whose log-probs are those of `rollout.native.sampling.draw`. Raises OptionError."""
    if params.temperature in (0.0, 1.0):
        return "raw_logprobs"
    if params.top_p < 1:
        rule = f"at rollout.temperature={params.temperature} vLLM's log-probs are those after top_p, not the student's"
        raise OptionError("rollout.top_p", params.top_p, rule, "set rollout.top_p=1 or rollout.temperature=1")
    return "processed_logprobs"


def server_arguments(params: SamplingParams, *, dtype: str, max_length: int, pixels: tuple[int, int]) -> list[str]:
    """Options of `vllm serve` that follow from the run's: number format, longest sequence, log-probs, image sizes.

    `dtype` is float32 or bfloat16, `max_length` in tokens, `pixels` the least and the most of a resized image.
    """
    limits = json.dumps({"min_pixels": pixels[0], "max_pixels": pixels[1]})
    sizes = ["--max-model-len", str(max_length), "--mm-processor-kwargs", limits]
    return ["--dtype", dtype, "--logprobs-mode", log_probs_mode(params), *sizes]


def sampling_params(params: SamplingParams, prompt: str) -> dict[str, Any]:
    """vLLM's sampling parameters; the seed follows from the key `prompt`, vLLM adds the number of the response."""
    seed = hashlib.blake2b(f"{params.seed}/{prompt}".encode(), digest_size=7).digest()
    return {
        "n": params.n if params.temperature > 0 else 1,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_tokens": params.max_response_length,
        "seed": int.from_bytes(seed, "big"),
        "logprobs": 0,  # of the sampled token alone
        "ignore_eos": True,  # only these end tokens, whatever the server's generation_config.json says
        "stop_token_ids": list(params.end_token_ids),
        "stop": list(params.stop),
        "logit_bias": {str(i): _NEVER for i in params.forbidden_token_ids},
        "detokenize": bool(params.stop),
    }


class PatchImages:
    """The images that patches were cut from: resized, as Qwen's processor leaves them, in 8 bits, without loss."""

    def __init__(self, image_processor: Any) -> None:
        """`image_processor` cut the patches."""
        self.patch, self.merge = image_processor.patch_size, image_processor.merge_size
        self.time = image_processor.temporal_patch_size
        # backwards, what the processor does with pixels from 0 to 255
        self.mean, self.std, self.unit = torch.tensor(0.0), torch.tensor(1.0), 1.0
        if image_processor.do_normalize:
            self.mean, self.std = (torch.tensor(getattr(image_processor, f"image_{name}")) for name in ("mean", "std"))
        if image_processor.do_rescale:
            self.unit = image_processor.rescale_factor

    def __call__(self, view: View) -> list[Tensor]:
        """[height, width, 3] uint8 for each image of `view`."""
        counts = view.grid_thw.prod(dim=1).tolist()
        patches = view.pixel_values.split(counts)
        return [self._image(x, h, w) for x, (_, h, w) in zip(patches, view.grid_thw.tolist(), strict=True)]

    def _image(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        m, p = self.merge, self.patch
        # a still image is the same at all times: the first is taken; patches of one merged token lie together
        blocks = patches.view(rows // m, columns // m, m, m, 3, self.time, p, p)[:, :, :, :, :, 0]
        pixels = blocks.permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * p, columns * p, 3)
        return ((pixels * self.std + self.mean) / self.unit).round().clamp(0, 255).to(torch.uint8)


def _nothing() -> Future:
    done: Future = Future()
    done.set_result(None)
    return done


def _png(image: Tensor) -> str:
    file = io.BytesIO()
    Image.fromarray(image.numpy()).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def one_token_for_each_image(view: View, image_token_id: int, merge: int) -> list[int]:
    """The prompt as the chat template writes it: vLLM repeats image tokens itself."""
    counts = iter((view.grid_thw.prod(dim=1) // merge**2).tolist())
    tokens, result, i = view.token_ids.tolist(), [], 0
    while i < len(tokens):
        result.append(tokens[i])
        i += next(counts) if tokens[i] == image_token_id else 1
    return result
