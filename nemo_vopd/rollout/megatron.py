"""The native engine: the training model itself decodes, with each prompt computed once for its n responses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_vopd.batch import Rollout, Sample, View
from nemo_vopd.mcore.layers import KVCache
from nemo_vopd.rollout.engine import SamplingParams
from nemo_vopd.rollout.sampling import draw, uniforms


class MegatronEngine:
    """Samples from the student's own weights; nothing to synchronise."""

    def __init__(
        self,
        model: torch.nn.Module,
        groups: ProcessGroupCollection,
        params: SamplingParams,
        *,
        pad_token_id: int,
        max_batch_tokens: int,
    ) -> None:
        """`model` is this rank's stage; `max_batch_tokens` bounds prompt and response tokens decoded together."""
        self.decoder = Decoder(model, groups, pad_token_id, max_batch_tokens)
        self.params = params

    def generate(self, samples: list[Sample], step: int) -> list[Rollout]:
        """n rollouts for each sample, in the order of the samples."""
        responses = self.decoder([sample.student for sample in samples], [s.id for s in samples], self.params, step)
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
        self, model: torch.nn.Module, groups: ProcessGroupCollection, pad_token_id: int, max_batch_tokens: int
    ) -> None:
        """See `MegatronEngine`."""
        self.model: Any = model
        self.groups = groups
        self.pad_token_id, self.max_batch_tokens = pad_token_id, max_batch_tokens
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def __call__(
        self, views: list[View], ids: list[str], params: SamplingParams, step: int = 0
    ) -> list[list[tuple[Tensor, Tensor]]]:
        """For each view n pairs (token_ids [R] int64, log_probs [R] float32), on the CPU."""
        results: list[list[tuple[Tensor, Tensor]]] = [[] for _ in views]
        with _decoding(self.model):
            for wave in self._waves(views, params):
                answers = self._decode([views[i] for i in wave], [ids[i] for i in wave], params, step)
                for i, answer in zip(wave, answers, strict=True):
                    results[i] = answer
        return results

    def _waves(self, views: list[View], params: SamplingParams) -> Iterator[list[int]]:
        """Indices of views decoded together, similar lengths side by side, within the token budget."""
        order = sorted(range(len(views)), key=lambda i: views[i].num_tokens)
        wave: list[int] = []
        for i in order:
            cost = views[i].num_tokens + params.n * params.max_response_length
            if wave and (len(wave) + 1) * cost > self.max_batch_tokens:
                yield wave
                wave = []
            wave.append(i)
        if wave:
            yield wave

    def _decode(self, views: list[View], ids: list[str], params: SamplingParams, step: int):
        device, n, length = self.device, params.n, params.max_response_length
        b, longest = len(views), max(view.num_tokens for view in views)
        prompt_lengths = torch.tensor([view.num_tokens for view in views], device=device)
        token_ids = torch.full((b, longest), self.pad_token_id)
        position_ids = torch.zeros((3, b, longest), dtype=torch.int64)
        for i, view in enumerate(views):
            token_ids[i, : view.num_tokens] = view.token_ids
            position_ids[:, i, : view.num_tokens] = view.position_ids
        next_position = torch.tensor([int(view.position_ids.max()) + 1 for view in views], device=device)
        next_position = next_position.repeat_interleave(n)
        draws = None
        if params.temperature > 0:
            draws = [uniforms(params.seed, step, sample_id, k, length) for sample_id in ids for k in range(n)]
            draws = torch.stack(draws).to(device)
        forbidden = torch.tensor(params.forbidden_token_ids, dtype=torch.int64, device=device)
        ends = torch.tensor(params.end_token_ids, dtype=torch.int64, device=device)

        cache = KVCache(prompt_lengths, n, length)
        hidden = self._forward(
            token_ids.to(device),
            position_ids.to(device),
            cache,
            torch.cat([view.pixel_values for view in views]).to(device),
            torch.cat([view.grid_thw for view in views]).to(device),
        )
        if hidden is not None:
            hidden = hidden[prompt_lengths - 1, torch.arange(b, device=device)].repeat_interleave(n, dim=0)
        tokens = torch.full((b * n, length), self.pad_token_id, device=device)
        log_probs = torch.zeros((b * n, length), device=device)
        num_tokens = torch.full((b * n,), length, device=device)
        for k in range(length):
            uniform = draws[:, k] if draws is not None else None
            tokens[:, k], log_probs[:, k] = self._draw(hidden, b * n, uniform, params, forbidden)
            ended = torch.isin(tokens[:, k], ends) & (num_tokens == length)
            num_tokens = torch.where(ended, k + 1, num_tokens)
            if k + 1 == length or bool((num_tokens <= k + 1).all()):
                break
            cache.step = k
            positions = (next_position + k)[None, :, None].expand(3, -1, 1)
            hidden = self._forward(tokens[:, k : k + 1], positions, cache)
            hidden = hidden[0] if hidden is not None else None
        tokens, log_probs, lengths = tokens.cpu(), log_probs.cpu(), num_tokens.tolist()
        rows = [(tokens[r, : lengths[r]].clone(), log_probs[r, : lengths[r]].clone()) for r in range(b * n)]
        return [rows[i * n : (i + 1) * n] for i in range(b)]

    def _forward(self, token_ids, position_ids, cache, pixel_values=None, grid_thw=None) -> Tensor | None:
        """Hidden states [s, b, H] on the last stage, None before it; stages hand over one after the other."""
        pp, config = self.groups.pp, self.model.config
        if pp.rank() > 0:
            shape = (token_ids.size(1), token_ids.size(0), config.hidden_size)
            received = torch.empty(shape, dtype=config.params_dtype, device=self.device)
            dist.recv(received, group=pp, group_src=pp.rank() - 1)
            self.model.set_input_tensor(received)
        hidden = self.model(token_ids, position_ids, pixel_values, grid_thw, cache)
        if pp.rank() < pp.size() - 1:
            dist.send(hidden.contiguous(), group=pp, group_dst=pp.rank() + 1)
            return None
        return hidden

    def _draw(
        self, hidden: Tensor | None, rows: int, uniform: Tensor | None, params: SamplingParams, forbidden: Tensor
    ):
        """Tokens and log-probs [B], the same on every rank of the model-parallel group."""
        tp, mp = self.groups.tp, self.groups.mp
        packed = torch.empty((2, rows), dtype=torch.float64, device=self.device)
        if hidden is not None:
            logits = hidden @ self.model.output_weight().t()
            if tp.size() > 1:
                shards = [torch.empty_like(logits) for _ in range(tp.size())]
                dist.all_gather(shards, logits, group=tp)
                logits = torch.cat(shards, dim=-1)
            # greedy log-probs are those at temperature 1
            temperature = params.temperature or 1.0
            drawn = draw(logits, uniform, temperature=temperature, top_p=params.top_p, forbidden=forbidden)
            packed = torch.stack([drawn[0].double(), drawn[1].double()])
        if mp.size() > 1:
            # one rank decides, so that round-off can never make two ranks continue with different tokens
            dist.broadcast(packed, group=mp, group_src=mp.size() - tp.size())
        return packed[0].long(), packed[1].float()


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
