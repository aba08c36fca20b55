"""The native engine: the training model itself decodes, with each prompt computed once for its n responses."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_vopd.batch import Rollout, Sample, View
from nemo_vopd.mcore.layers import KVCache
from nemo_vopd.mcore.stage import Stage
from nemo_vopd.rollout.engine import SamplingParams
from nemo_vopd.rollout.sampling import draw, uniforms


class MegatronEngine:
    """Samples from the student's own weights; nothing to synchronise."""

    def __init__(
        self,
        model: Stage,
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

    def __init__(self, model: Stage, groups: ProcessGroupCollection, pad_token_id: int, max_batch_tokens: int) -> None:
        """See `MegatronEngine`."""
        self.model, self.groups = model, groups
        self.pad_token_id, self.max_batch_tokens = pad_token_id, max_batch_tokens
        self.device = next(model.parameters()).device
        self._sent: list[tuple[Any, Tensor]] = []

    @torch.no_grad()
    def __call__(
        self, views: list[View], ids: list[str], params: SamplingParams, step: int = 0
    ) -> list[list[tuple[Tensor, Tensor]]]:
        """For each view n pairs (token_ids [R] int64, log_probs [R] float32), on the CPU."""
        results: list[list[tuple[Tensor, Tensor]]] = [[] for _ in views]
        in_flight = self.groups.pp.size()  # one wave for each stage, so that none of them waits for the last
        waves = self._split(views, params, in_flight)
        with _decoding(self.model):
            for first in range(0, len(waves), in_flight):
                running = [
                    (wave, _Wave(self, [views[i] for i in wave], [ids[i] for i in wave], params, step))
                    for wave in waves[first : first + in_flight]
                ]
                for _, state in running:
                    state.begin()
                self._advance([state for _, state in running])
                for wave, state in running:
                    for i, answer in zip(wave, state.responses(), strict=True):
                        results[i] = answer
        return results

    def _advance(self, running: list[_Wave]) -> None:
        """Decode the waves to their ends. Every rank sees the same tokens, so all keep the same waves in order."""
        while running:
            going = []
            for index in range(len(self.model.chunks)):
                for wave in running if index == 0 else going:
                    if index == 0:
                        if not wave.take():
                            continue
                        going.append(wave)
                    wave.forward(index)
            self._wait_for_sends()
            running = going

    def _split(self, views: list[View], params: SamplingParams, in_flight: int) -> list[list[int]]:
        """Indices of views decoded together, similar lengths side by side; `in_flight` waves share the token budget."""
        largest = -(-len(views) // in_flight)
        waves: list[list[int]] = []
        for i in sorted(range(len(views)), key=lambda i: views[i].num_tokens):
            cost = views[i].num_tokens + params.n * params.max_response_length
            fits = waves and (len(waves[-1]) + 1) * cost * in_flight <= self.max_batch_tokens
            if fits and len(waves[-1]) < largest:
                waves[-1].append(i)
            else:
                waves.append([i])
        return waves

    def forward(self, index: int, token_ids, position_ids, cache, pixel_values=None, grid_thw=None) -> Tensor | None:
        """Chunk `index` of this stage: hidden states [s, b, H] after the model's last layer, None before it."""
        pp, config, chunk = self.groups.pp, self.model.config, self.model.chunks[index]
        if pp.rank() > 0 or index > 0:
            shape = (token_ids.size(1), token_ids.size(0), config.hidden_size)
            received = torch.empty(shape, dtype=config.params_dtype, device=self.device)
            dist.recv(received, group=pp, group_src=(pp.rank() - 1) % pp.size())
            chunk.set_input_tensor(received)
        hidden = chunk(token_ids, position_ids, pixel_values, grid_thw, cache)
        if pp.rank() == pp.size() - 1 and index == len(self.model.chunks) - 1:
            return hidden
        # not waited for: with chunks the stages form a ring, in which each could wait for the next to receive
        hidden = hidden.contiguous()
        handle = dist.isend(hidden, group=pp, group_dst=(pp.rank() + 1) % pp.size())
        self._sent.append((handle, hidden))
        return None

    def _wait_for_sends(self) -> None:
        for handle, _ in self._sent:
            handle.wait()
        self._sent.clear()

    def draw(self, hidden: Tensor | None, rows: int, n: int, uniform: Tensor | None, params: SamplingParams):
        """Start drawing n tokens after each of `rows` hidden states [rows, H] (None before the last stage).

        Returns ([2, rows, n] float64 with tokens and log-probs, a handle to wait for or None).
        """
        tp, mp = self.groups.tp, self.groups.mp
        packed = torch.empty((2, rows, n), dtype=torch.float64, device=self.device)
        if hidden is not None:
            logits = hidden @ self.model.output_weight().t()
            if tp.size() > 1:
                shards = [torch.empty_like(logits) for _ in range(tp.size())]
                dist.all_gather(shards, logits, group=tp)
                logits = torch.cat(shards, dim=-1)
            logits = logits[:, : self.model.vocab_size]
            forbidden = torch.tensor(params.forbidden_token_ids, dtype=torch.int64, device=self.device)
            # greedy log-probs are those at temperature 1
            options = {"temperature": params.temperature or 1.0, "top_p": params.top_p, "forbidden": forbidden}
            tokens, log_probs = draw(logits, uniform, **options)
            packed[0], packed[1] = tokens, log_probs
        if mp.size() == 1:
            return packed, None
        # One rank decides, so that round-off can never make two ranks continue with different tokens. In a group of
        # its own, and not waited for: hidden states of other waves pass between the stages meanwhile.
        return packed, dist.broadcast(packed, group=mp, group_src=mp.size() - tp.size(), async_op=True)


class _Wave:
    """Prompts decoded together: n responses each, one token at a time."""

    def __init__(self, decoder: Decoder, views: list[View], ids: list[str], params: SamplingParams, step: int) -> None:
        self.decoder, self.views, self.params = decoder, views, params
        device, n, length = decoder.device, params.n, params.max_response_length
        self.b, self.rows = len(views), len(views) * n
        self.uniform: Tensor | None = None
        if params.temperature > 0:
            draws = [uniforms(params.seed, step, sample_id, k, length) for sample_id in ids for k in range(n)]
            self.uniform = torch.stack(draws).to(device)
        self.ends = torch.tensor(params.end_token_ids, dtype=torch.int64, device=device)
        self.tokens = torch.full((self.rows, length), decoder.pad_token_id, device=device)
        self.log_probs = torch.zeros((self.rows, length), device=device)
        self.num_tokens = torch.full((self.rows,), length, device=device)
        self.step = 0  # tokens taken so far
        self.drawn: Tensor | None = None

    def begin(self) -> None:
        """Make the prompts the next input; each is computed once for its n responses."""
        decoder, views, b, n = self.decoder, self.views, self.b, self.params.n
        device = decoder.device
        lengths = torch.tensor([view.num_tokens for view in views])
        token_ids = torch.full((b, int(lengths.max())), decoder.pad_token_id)
        position_ids = torch.zeros((3, b, int(lengths.max())), dtype=torch.int64)
        for i, view in enumerate(views):
            token_ids[i, : view.num_tokens] = view.token_ids
            position_ids[:, i, : view.num_tokens] = view.position_ids
        next_position = torch.tensor([int(view.position_ids.max()) + 1 for view in views], device=device)
        self.next_position = next_position.repeat_interleave(n)
        self.lengths = lengths.to(device)
        self.cache = KVCache(self.lengths, n, self.params.max_response_length)
        self.inputs: tuple = (
            token_ids.to(device),
            position_ids.to(device),
            self.cache,
            torch.cat([view.pixel_values for view in views]).to(device),
            torch.cat([view.grid_thw for view in views]).to(device),
        )

    def forward(self, index: int) -> None:
        """Run the input through chunk `index` of this stage; after the last one start drawing the next tokens."""
        decoder, b, n = self.decoder, self.b, self.params.n
        hidden = decoder.forward(index, *self.inputs)
        if index < len(decoder.model.chunks) - 1:
            return
        if self.step == 0:  # of a prompt, the last position; greedy responses share their first token
            hidden = hidden[self.lengths - 1, torch.arange(b, device=hidden.device)] if hidden is not None else None
            uniform = self.uniform[:, 0].view(b, n) if self.uniform is not None else None
            self.drawn, self.handle = decoder.draw(hidden, b, n if uniform is not None else 1, uniform, self.params)
        else:
            hidden = hidden[0] if hidden is not None else None
            uniform = self.uniform[:, self.step, None] if self.uniform is not None else None
            self.drawn, self.handle = decoder.draw(hidden, self.rows, 1, uniform, self.params)

    def take(self) -> bool:
        """Take the drawn tokens, if any, and make them the next input; False when all responses have ended."""
        if self.drawn is None:  # the prompts come first
            return True
        if self.handle is not None:
            self.handle.wait()
        tokens, log_probs = self.drawn.expand(2, -1, self.rows // self.drawn.size(1)).reshape(2, -1)
        k, length = self.step, self.params.max_response_length
        self.tokens[:, k], self.log_probs[:, k] = tokens.long(), log_probs.float()
        ended = torch.isin(self.tokens[:, k], self.ends) & (self.num_tokens == length)
        self.num_tokens = torch.where(ended, k + 1, self.num_tokens)
        self.step = k + 1
        if self.step == length or bool((self.num_tokens <= self.step).all()):
            return False
        self.cache.step = k
        positions = (self.next_position + k)[None, :, None].expand(3, -1, 1)
        self.inputs = self.tokens[:, k : k + 1], positions, self.cache
        return True

    def responses(self) -> list[list[tuple[Tensor, Tensor]]]:
        """n pairs (token_ids [R], log_probs [R]) for each prompt, on the CPU."""
        n, lengths = self.params.n, self.num_tokens.tolist()
        tokens, log_probs = self.tokens.cpu(), self.log_probs.cpu()
        rows = [(tokens[r, :num].clone(), log_probs[r, :num].clone()) for r, num in enumerate(lengths)]
        return [rows[i * n : (i + 1) * n] for i in range(self.b)]


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
