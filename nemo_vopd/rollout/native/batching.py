"""Continuous batching: responses are decoded together, and new prompts take the places of those that have ended."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemo_vopd.batch import View
from nemo_vopd.rollout.native.cache import KVCache
from nemo_vopd.rollout.native.forward import Tokens
from nemo_vopd.rollout.native.sampling import uniforms
from nemo_vopd.rollout.native.stage import StagePass, TokenChoice

PROMPT_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Number of prompt tokens in one pass by kind of device: enough to keep it busy, few enough for the caches of a CPU
and the memory of a GPU. A longer prompt has a pass of its own."""

_ENDED_SHARE = 1 / 16
"""Share of ended rows at which others move into their places; until then they are computed in vain."""

_FREE_SHARE = 1 / 8
"""Share of free rows at which new prompts are taken: several together interrupt decoding less often."""

_WORTHWHILE = 1.25
"""Factor in the number of rows for which the cache is divided again, when prompts have become shorter."""


@dataclass
class Request:
    """One prompt to answer n times."""

    view: View
    key: str
    """Seed of its random draws, different for every prompt of a run."""
    answers: list[tuple[Tensor, Tensor]]
    """n pairs (token_ids [R], log_probs [R]), each set when its response has ended."""


@dataclass
class Row:
    """One response that is being decoded."""

    request: Request
    index: int
    """Number among the responses to its request, from 0 to n-1."""
    slot: int
    start: int
    """M-RoPE position of its first token."""
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    ended: bool = False
    age: int = -1
    """Number of its tokens in the cache, which grows until an ended row is given away."""


@dataclass
class Counts:
    """Amount of work that decoding has done so far."""

    prompt_tokens: int = 0
    """Number of prompt tokens; each prompt counts once for its n responses, and there is no padding."""
    steps: int = 0
    """Number of passes of one token for every row."""
    row_steps: int = 0
    """Number of rows, summed over these passes."""
    ended_row_steps: int = 0
    """Number of ended rows among them."""
    most_rows: int = 0
    """Largest number of rows in one pass."""


@dataclass(frozen=True)
class Limits:
    """How much one batch may hold at a time."""

    num_positions: int
    """Number of tokens in its cache, unless one prompt and its responses need more."""
    num_requests: int
    continuous: bool
    """Whether new prompts take the places of ended responses, instead of waiting until the slowest has ended."""


class DecodingBatch:
    """Prompts and responses that are decoded together within one cache."""

    def __init__(
        self, stage: StagePass, choice: TokenChoice, queue: deque[Request], limits: Limits, counts: Counts
    ) -> None:
        """Serve requests from `queue`, which all batches share: those with the longest prompts come first."""
        self.stage, self.choice, self.queue, self.limits, self.counts = stage, choice, queue, limits, counts
        self.params = choice.params
        self.prompts: list[Request] = []
        self.rows: list[Row] = []
        self.feeding: list[Request] = []  # the prompts in the pass under way
        self.drawn: Tensor | None = None
        self.handle: Any = None
        self.changed = False  # since the cache was told which rows there are
        self.uniform: Tensor | None = None  # [rows, max_response_length]
        longest = queue[0].view.num_tokens
        cost = self._cost(longest)
        self.cache = KVCache(
            max(cost, min(limits.num_positions, limits.num_requests * cost)), self.params.max_response_length
        )
        self.cache.lay_out(*self._layout(longest))

    def _cost(self, prompt: int) -> int:
        return prompt + self.params.n * self.params.max_response_length

    def _layout(self, width: int) -> tuple[int, int, int]:
        """Number of slots with `width` positions, `width`, and number of rows that fit."""
        n, positions = self.params.n, self.cache.num_positions
        slots = min(self.limits.num_requests, positions // self._cost(width))
        if slots < self.limits.num_requests and n > 1:
            # A prompt stays until its last response has ended; spare slots let other rows be used again meanwhile.
            slots = max(slots, min(self.limits.num_requests, 2 * (positions // (width + self._cost(width)))))
        return slots, width, min(slots * n, (positions - slots * width) // self.params.max_response_length)

    def take(self) -> bool:
        """Record the drawn tokens, if any, and choose the next input; False when nothing is left to do."""
        if self.drawn is not None:
            self._record(self.drawn)
        self._compact()
        self._admit()
        if self.feeding:
            self._feed_prompts()
        elif self.rows:
            self._feed_tokens()
        return bool(self.rows or self.feeding)

    def _record(self, drawn: Tensor) -> None:
        """Append the drawn tokens to their rows; first tokens begin new rows."""
        if self.handle is not None:
            self.handle.wait()
        rows, n = self.rows, self.params.n
        if self.feeding:
            first = len(self.prompts) - len(self.feeding)
            rows = [
                Row(request, index, first + i, int(request.view.position_ids.max()) + 1)
                for i, request in enumerate(self.feeding)
                for index in range(n)
            ]
            self.rows += rows
            self.feeding, self.changed = [], True
            drawn = drawn.expand(2, -1, n)  # greedy responses share their first token
        else:
            self.cache.fed()
            self.tokens = drawn[0, :, 0].long()
        # the only wait for the device at each token
        for row, token, log_prob in zip(rows, *drawn.reshape(2, -1).tolist(), strict=True):
            row.age += 1
            if row.ended:
                continue
            row.tokens.append(int(token))
            row.log_probs.append(log_prob)
            row.ended = self.choice.ends(row.tokens)
            if row.ended:
                row.request.answers[row.index] = torch.tensor(row.tokens), torch.tensor(row.log_probs)

    def _compact(self) -> None:
        """Move rows that go on into the places of ended ones, once there are enough of them."""
        ended = [row for row in self.rows if row.ended]
        # a row without a place for the next token cannot wait
        full = any(row.age == self.params.max_response_length - 1 for row in ended)
        share = _ENDED_SHARE if self.limits.continuous else 1.0
        if not ended or (len(ended) < share * len(self.rows) and not full):
            return
        rows = _fill_up([not row.ended for row in self.rows])
        used = {self.rows[i].slot for i in rows}
        slots = _fill_up([slot in used for slot in range(len(self.prompts))])
        self.cache.keep(slots, rows)
        self.rows, self.prompts = [self.rows[i] for i in rows], [self.prompts[i] for i in slots]
        moved = {old: new for new, old in enumerate(slots)}
        for row in self.rows:
            row.slot = moved[row.slot]
        if self.uniform is not None:
            self.uniform = self.uniform[rows]
        self.changed = True

    def _admit(self) -> None:
        """Take as many requests from the queue as fit into the cache and into one pass."""
        if not self.queue or (not self.limits.continuous and any(row.age > 0 for row in self.rows)):
            return
        width = max(request.view.num_tokens for request in (*self.prompts, self.queue[0]))
        layout = self._layout(width)
        if layout[0] >= len(self.prompts) and layout[2] > _WORTHWHILE * self.cache.num_rows:
            self.cache.lay_out(*layout)
        num_rows, num_tokens = len(self.rows), 0
        if self.rows and self.cache.num_rows - num_rows < _FREE_SHARE * self.cache.num_rows:
            return
        while self.queue:
            num_rows += self.params.n
            num_tokens += self.queue[0].view.num_tokens
            if len(self.prompts) == self.cache.num_slots or num_rows > self.cache.num_rows:
                break
            if self.feeding and num_tokens > PROMPT_TOKENS[self.stage.device.type]:
                break
            self.feeding.append(self.queue.popleft())
            self.prompts.append(self.feeding[-1])

    def _feed_prompts(self) -> None:
        views, device = [request.view for request in self.feeding], self.stage.device
        lengths = [view.num_tokens for view in views]
        self.cache.feed_prompts(lengths, device)
        self.counts.prompt_tokens += sum(lengths)
        self.input = Tokens(
            torch.cat([view.token_ids for view in views]).to(device),
            self.stage.rotary(torch.cat([view.position_ids for view in views], dim=1).to(device)),
            torch.cat([view.pixel_values for view in views]).to(device),
            torch.cat([view.grid_thw for view in views]),
        )
        self.draws: Tensor | None = None
        if self.params.temperature > 0:
            seed, n, length = self.params.seed, self.params.n, self.params.max_response_length
            numbers = [uniforms(seed, r.key, k, length) for r in self.feeding for k in range(n)]
            new = torch.stack(numbers).to(device)
            self.draws = new[:, 0].view(-1, n)
            self.uniform = new if self.uniform is None else torch.cat([self.uniform, new])

    def _feed_tokens(self) -> None:
        rows, device = self.rows, self.stage.device
        if self.changed:
            lengths = [request.view.num_tokens for request in self.prompts]
            self.cache.arrange(lengths, [row.slot for row in rows], [row.age for row in rows], device)
            self.tokens = torch.tensor([row.tokens[-1] for row in rows], device=device)
            self.starts = torch.tensor([row.start for row in rows], device=device)
            self.changed = False
        self.cache.feed_tokens()
        ages = self.cache.ages
        self.input = Tokens(self.tokens, self.stage.rotary.text(self.starts + ages))
        self.draws = self.uniform.gather(1, ages[:, None] + 1) if self.uniform is not None else None
        self.counts.steps += 1
        self.counts.row_steps += len(rows)
        self.counts.most_rows = max(self.counts.most_rows, len(rows))
        self.counts.ended_row_steps += sum(row.ended for row in rows)

    def forward(self, index: int) -> None:
        """Run the input through chunk `index` of this stage; after the last one start drawing the next tokens."""
        hidden = self.stage.forward(index, self.input, self.cache, prompts=bool(self.feeding))
        if index == len(self.stage.chunks) - 1:
            self.drawn, self.handle = self.choice.draw(hidden, len(self.feeding) or len(self.rows), self.draws)


def _fill_up(kept: list[bool]) -> list[int]:
    """Indices of those kept, the last ones in the places of those that go: few change their place."""
    num = sum(kept)
    last = iter([i for i in range(num, len(kept)) if kept[i]])
    return [i if kept[i] else next(last) for i in range(num)]
