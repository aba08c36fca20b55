"""The native engine: the training model itself decodes, with each prompt computed once for its n responses."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_vopd.batch import Rollout, Sample, View
from nemo_vopd.distill.products import product
from nemo_vopd.mcore.stage import Stage
from nemo_vopd.rollout.engine import SamplingParams
from nemo_vopd.rollout.native.batching import Counts, Lane, Request
from nemo_vopd.rollout.native.cache import KVCache
from nemo_vopd.rollout.native.forward import ChunkPass, Rotary, Tokens
from nemo_vopd.rollout.native.sampling import draw


class MegatronEngine:
    """Samples from the student's own weights; nothing to synchronise."""

    def __init__(
        self,
        model: Stage,
        groups: ProcessGroupCollection,
        params: SamplingParams,
        max_batch_tokens: int,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        """Arguments as `Decoder`, and how to sample."""
        self.decoder = Decoder(model, groups, max_batch_tokens, decode)
        self.params = params

    def generate(self, samples: list[Sample]) -> list[Rollout]:
        """n rollouts for each sample, in the order of the samples."""
        responses = self.decoder([s.student for s in samples], [str(s.key) for s in samples], self.params)
        return [
            Rollout(sample, tokens, log_probs, index)
            for sample, answers in zip(samples, responses, strict=True)
            for index, (tokens, log_probs) in enumerate(answers)
        ]

    def sync_weights(self) -> None:
        """Nothing to do: the engine reads the training weights."""


class Decoder:
    """Batched decoding of views with any stage layout; every rank returns the same responses."""

    def __init__(
        self,
        model: Stage,
        groups: ProcessGroupCollection,
        max_batch_tokens: int,
        decode: Callable[[list[int]], str] | None = None,
        *,
        continuous: bool = True,
    ) -> None:
        """Decode with any stage layout.

        Args:
            model: this rank's stage.
            groups: process groups of the layout.
            max_batch_tokens: most prompt and response tokens in the cache, unless one prompt needs more.
            decode: turns token ids into text, for `SamplingParams.stop`.
            continuous: the next prompts take the places of ended responses; else a batch is computed until the slowest
                of its responses has ended, for comparison.
        """
        self.model, self.groups = model, groups
        self.max_batch_tokens, self.decode, self.continuous = max_batch_tokens, decode, continuous
        self.device = next(model.parameters()).device
        last, ends = groups.pp.rank() == groups.pp.size() - 1, len(model.chunks) - 1
        self.chunks = [ChunkPass(c, groups, ends_model=last and i == ends) for i, c in enumerate(model.chunks)]
        self.rotary = Rotary(model.chunks[0])
        self.counts = Counts()
        self._sent: list[tuple[Any, Tensor]] = []

    @torch.no_grad()
    def __call__(self, views: list[View], keys: list[str], params: SamplingParams) -> list[list[tuple[Tensor, Tensor]]]:
        """For each view n pairs (token_ids [R] int64, log_probs [R] float32), on the CPU; `keys` seed the draws."""
        requests = [Request(view, key, [None] * params.n) for view, key in zip(views, keys, strict=True)]  # type: ignore[list-item]
        if not requests:
            return []
        # the longest first: where they find room, all that follow do
        queue = deque(sorted(requests, key=lambda request: -request.view.num_tokens))
        self._forbidden = torch.tensor(params.forbidden_token_ids, dtype=torch.int64, device=self.device)
        self.rotary.extend(max(int(view.position_ids.max()) for view in views) + 1 + params.max_response_length)
        num_lanes = min(self.groups.pp.size(), len(requests))
        budget, most = self.max_batch_tokens // self.groups.pp.size(), -(-len(requests) // num_lanes)
        with _decoding(self.model):
            self._advance([Lane(self, queue, params, budget, most) for _ in range(num_lanes)])
        return [request.answers for request in requests]

    def _advance(self, lanes: list[Lane]) -> None:
        """Decode until nothing is left. Every rank sees the same tokens, so all choose the same inputs in order."""
        while lanes:
            going = []
            for index in range(len(self.chunks)):
                for lane in lanes if index == 0 else going:
                    if index == 0:
                        if not lane.take():
                            continue
                        going.append(lane)
                    lane.forward(index)
            self._wait_for_sends()
            lanes = going

    def forward(self, index: int, tokens: Tokens, cache: KVCache, *, prompts: bool) -> Tensor | None:
        """Chunk `index` of this stage: hidden states [., H] to draw from after the model's last layer, else None."""
        pp, config, received = self.groups.pp, self.model.config, None
        if pp.rank() > 0 or index > 0:
            shape = (tokens.token_ids.size(0), config.hidden_size)
            received = torch.empty(shape, dtype=config.params_dtype, device=self.device)
            dist.recv(received, group=pp, group_src=(pp.rank() - 1) % pp.size())
        hidden = self.chunks[index](tokens, received, cache, prompts=prompts)
        if self.chunks[index].ends_model:
            return hidden
        # not waited for: with chunks the stages form a ring, in which each could wait for the next to receive
        handle = dist.isend(hidden, group=pp, group_dst=(pp.rank() + 1) % pp.size())
        self._sent.append((handle, hidden))
        return None

    def _wait_for_sends(self) -> None:
        for handle, _ in self._sent:
            handle.wait()
        self._sent.clear()

    def draw(self, hidden: Tensor | None, rows: int, uniform: Tensor | None, params: SamplingParams):
        """Start drawing tokens after each of `rows` hidden states [rows, H] (None before the last stage).

        Their number n is that of `uniform` [rows, n], 1 without it (greedy). Returns ([2, rows, n] float64 with tokens
        and log-probs, a handle to wait for or None).
        """
        tp, mp = self.groups.tp, self.groups.mp
        shape = 2, rows, 1 if uniform is None else uniform.size(1)
        packed = torch.empty(shape, dtype=torch.float64, device=self.device)
        if hidden is not None:
            logits = product(hidden, self.model.output_weight().t(), torch.float32)
            if tp.size() > 1:
                shards = [torch.empty_like(logits) for _ in range(tp.size())]
                dist.all_gather(shards, logits, group=tp)
                logits = torch.cat(shards, dim=-1)
            logits = logits[:, : self.model.vocab_size]
            # greedy log-probs are those at temperature 1
            options = {"temperature": params.temperature or 1.0, "top_p": params.top_p, "forbidden": self._forbidden}
            packed[0], packed[1] = draw(logits, uniform, **options)
        if mp.size() == 1:
            return packed, None
        # One rank decides, so that round-off can never make two ranks continue with different tokens. In a group of
        # its own, and not waited for: hidden states of other lanes pass between the stages meanwhile.
        return packed, dist.broadcast(packed, group=mp, group_src=mp.size() - tp.size(), async_op=True)


@contextlib.contextmanager
def _decoding(model: Any):
    """Switch sequence parallelism off (one token cannot be split) and dropout to evaluation, and back afterwards."""
    training = model.training
    split = [module for module in model.modules() if getattr(module, "sequence_parallel", False)]
    config = model.config
    was_split = config.sequence_parallel
    model.eval()
    config.sequence_parallel = False
    for module in split:
        module.sequence_parallel = False
    try:
        yield
    finally:
        model.train(training)
        config.sequence_parallel = was_split
        for module in split:
            module.sequence_parallel = True
