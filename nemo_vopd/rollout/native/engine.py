"""The native engine: the training model itself decodes, with each prompt computed once for its n responses."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_vopd.batch import Rollout, Sample, View
from nemo_vopd.mcore.stage import Stage
from nemo_vopd.rollout.engine import RolloutEngine, SamplingParams
from nemo_vopd.rollout.native.batching import Counts, DecodingBatch, Limits, Request
from nemo_vopd.rollout.native.stage import StagePass, TokenChoice
from nemo_vopd.watchdog import beat


class MegatronEngine(RolloutEngine):
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
        self.stage, self.max_batch_tokens = StagePass(model, groups), max_batch_tokens
        self.decode, self.continuous, self.counts = decode, continuous, Counts()

    @torch.no_grad()
    def __call__(self, views: list[View], keys: list[str], params: SamplingParams) -> list[list[tuple[Tensor, Tensor]]]:
        """For each view n pairs (token_ids [R] int64, log_probs [R] float32), on the CPU; `keys` seed the draws."""
        requests = [Request(view, key, [None] * params.n) for view, key in zip(views, keys, strict=True)]  # type: ignore[list-item]
        if not requests:
            return []
        # the longest first: where they find room, all that follow do
        queue = deque(sorted(requests, key=lambda request: -request.view.num_tokens))
        longest = max(int(view.position_ids.max()) for view in views) + 1 + params.max_response_length
        self.stage.rotary.extend(longest)
        # one batch for each pipeline stage, so that none waits for the last
        num_batches = min(self.stage.groups.pp.size(), len(requests))
        num_positions = self.max_batch_tokens // self.stage.groups.pp.size()
        limits = Limits(num_positions, -(-len(requests) // num_batches), self.continuous)
        choice = TokenChoice(self.stage, params, self.decode)
        with _decoding(self.stage.model):
            self._advance([DecodingBatch(self.stage, choice, queue, limits, self.counts) for _ in range(num_batches)])
        return [request.answers for request in requests]

    def _advance(self, batches: list[DecodingBatch]) -> None:
        """Decode until nothing is left. Every rank sees the same tokens, so all choose the same inputs in order."""
        while batches:
            beat()
            going = []
            for index in range(len(self.stage.chunks)):
                for batch in batches if index == 0 else going:
                    if index == 0:
                        if not batch.take():
                            continue
                        going.append(batch)
                    batch.forward(index)
            self.stage.wait_for_sends()
            batches = going


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
