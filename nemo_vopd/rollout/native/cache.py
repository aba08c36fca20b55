"""The key-value cache of decoding: a prompt is stored once for all its responses (prefix sharing)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[Tensor, Tensor]


class KVCache:
    """Keys and values of prompts and of their responses, in `num_positions` positions of each layer.

    A prompt has a slot, which all its responses read, and a response has a row. Slots and rows in use are always the
    first ones, because others move into places that become free. One object serves all layers of a pipeline stage.
    Before each pass its owner announces whole prompts (`feed_prompts`) or one token of each row (`feed_tokens`).
    """

    def __init__(self, num_positions: int, response_width: int) -> None:
        """`response_width` is the number of positions of a row. Memory is allocated at the first pass."""
        self.num_positions, self.response_width = num_positions, response_width
        self.num_slots = self.prompt_width = self.num_rows = 0
        self.prompt: dict[int, Pair] = {}
        """By layer: keys [num_slots, g, d, prompt_width], as CPU matrix products read them fastest; values
        [num_slots, g, prompt_width, d]."""
        self.response: dict[int, Pair] = {}
        """By layer: keys and values [num_rows, g, response_width, d], the rest of the same memory."""
        self._memory: dict[int, Pair] = {}
        self._slots = self._rows = 0  # in use
        self._runs: list[tuple[int, int, int, int]] | None = None

    def lay_out(self, num_slots: int, prompt_width: int, num_rows: int) -> None:
        """Divide the positions into slots and rows of other sizes, and move what is in use, one layer at a time."""
        assert num_slots * prompt_width + num_rows * self.response_width <= self.num_positions
        width = min(self.prompt_width, prompt_width)
        self.num_slots, self.prompt_width, self.num_rows = num_slots, prompt_width, num_rows
        for layer, stores in self.prompt.items():
            keys, values = stores[0][: self._slots, ..., :width].clone(), stores[1][: self._slots, :, :width].clone()
            rows = [store[: self._rows].clone() for store in self.response[layer]]
            self._divide(layer, *stores[0].shape[1:3])
            self.prompt[layer][0][: self._slots, ..., :width] = keys
            self.prompt[layer][1][: self._slots, :, :width] = values
            for store, kept in zip(self.response[layer], rows, strict=True):
                store[: self._rows] = kept

    def _divide(self, layer: int, g: int, d: int) -> None:
        key, value = self._memory[layer]
        prompts, rows = (self.num_slots, g, self.prompt_width, d), (self.num_rows, g, self.response_width, d)
        end = math.prod(prompts)
        transposed = (self.num_slots, g, d, self.prompt_width)
        self.prompt[layer] = key[:end].view(transposed), value[:end].view(prompts)
        key, value = key[end : end + math.prod(rows)], value[end : end + math.prod(rows)]
        self.response[layer] = key.view(rows), value.view(rows)

    def keep(self, slots: list[int], rows: list[int]) -> None:
        """Keep only `slots` and `rows`, in this order; few of them change their place."""
        self._slots, self._rows = len(slots), len(rows)
        for stores, order in ((self.prompt, slots), (self.response, rows)):
            moves = [(i, old) for i, old in enumerate(order) if i != old]
            if moves and stores:
                to, old = torch.tensor(moves, device=next(iter(stores.values()))[0].device).unbind(1)
                for store in (store for pair in stores.values() for store in pair):
                    store[to] = store[old]

    def arrange(self, lengths: list[int], slots: list[int], ages: list[int], device: torch.device) -> None:
        """Set what is in use: a slot for each prompt length, and rows that hold `ages` tokens and read `slots`."""
        self._slots, self._rows = len(lengths), len(slots)
        self._longest, self._oldest, self._youngest = max(lengths), max(ages), min(ages)
        self._padding = _padding(lengths, device)
        self.ages = torch.tensor(ages, device=device)
        # the place [slot, number among its rows], in which rows share their prompt's keys
        seen, places = [0] * len(lengths), []
        for slot in slots:
            places.append((slot, seen[slot]))
            seen[slot] += 1
        self._share = max(seen)
        grid = [slot * self._share + number for slot, number in places]
        self._grid: Pair | None = None
        if grid != list(range(len(lengths) * self._share)):
            row_of = [0] * (len(lengths) * self._share)  # places without a row repeat the first row
            for row, place in enumerate(grid):
                row_of[place] = row
            self._grid = torch.tensor(grid, device=device), torch.tensor(row_of, device=device)

    def feed_prompts(self, lengths: list[int], device: torch.device) -> None:
        """Announce whole prompts of `lengths`, packed, which go into new slots."""
        self._first_slot, self._slots = self._slots, self._slots + len(lengths)
        self._runs, start = [], 0  # [slot, number, length, first token]: neighbours of one length, attended together
        for i, length in enumerate(lengths):
            if self._runs and self._runs[-1][2] == length:
                slot, number, _, first = self._runs[-1]
                self._runs[-1] = slot, number + 1, length, first
            else:
                self._runs.append((self._first_slot + i, 1, length, start))
            start += length
        self._new_longest, self._new_padding = max(lengths), _padding(lengths, device)
        self.last = torch.tensor(lengths, device=device).cumsum(0) - 1
        """[b]: index of the last token of each prompt among the tokens fed."""

    def feed_tokens(self) -> None:
        """Announce the next token of each row."""
        self._runs = None
        self._later: Tensor | None = None
        if self._oldest > self._youngest:  # [rows, 1, positions]: positions that younger rows lack
            self._later = torch.arange(self._oldest + 1, device=self.ages.device) > self.ages[:, None]
            self._later = self._later[:, None, None]

    def fed(self) -> None:
        """Note that all layers have stored the token of each row."""
        self.ages += 1
        self._oldest, self._youngest = self._oldest + 1, self._youngest + 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, last_only: bool) -> Tensor:
        """Store key and value [T, g, d] of the tokens fed and attend with query [T, g, q, d]; returns [T, g * q * d].

        With `last_only` in a pass of prompts, only the last token of each prompt attends: [b, g * q * d].
        """
        if layer not in self._memory:
            size = self.num_positions * key[0].numel()
            # zeros, because a masked position contributes 0 * its value, which must be finite
            self._memory[layer] = key.new_zeros(size), value.new_zeros(size)
            self._divide(layer, *key.shape[1:])
        if self._runs is None:
            return self._attend_tokens(layer, query, key, value, scale)
        out = query.new_empty(query.shape)
        for slot, number, length, first in self._runs:
            part = slice(first, first + number * length)
            k, v = (t[part].view(number, length, *t.shape[1:]).transpose(1, 2) for t in (key, value))
            keys, values = (store[slot : slot + number] for store in self.prompt[layer])
            keys[..., :length], values[:, :, :length] = k.transpose(2, 3), v
            if not last_only:
                q = query[part].reshape(number, length, -1, query.size(-1)).transpose(1, 2)
                gqa = q.size(1) != k.size(1)
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
                out[part].view(number, length, *attended.shape[1::2]).copy_(attended.transpose(1, 2))
        if not last_only:
            return out.flatten(1)
        b, g, q, d = query[self.last].shape
        new = slice(self._first_slot, self._first_slot + b)
        keys, values = (store[new].flatten(0, 1) for store in self.prompt[layer])
        scores = torch.bmm(query[self.last].view(b * g, q, d), keys[..., : self._new_longest]).float() * scale
        if self._new_padding is not None:
            scores.view(b, g * q, -1).masked_fill_(self._new_padding[:, None], float("-inf"))
        weights = torch.softmax(scores, -1).to(values.dtype)
        return torch.bmm(weights, values[:, : self._new_longest]).view(b, g * q * d)

    def _attend_tokens(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        (prompt_k, prompt_v), (response_k, response_v) = self.prompt[layer], self.response[layer]
        rows, g, q, d = query.shape
        slots, share, p, t = self._slots, self._share, self._longest, self._oldest + 1
        if self._later is None:
            response_k[:rows, :, t - 1] = key
            response_v[:rows, :, t - 1] = value
        else:
            row = torch.arange(rows, device=key.device)
            response_k[row, :, self.ages] = key
            response_v[row, :, self.ages] = value
        prompt_k, prompt_v = (x.flatten(0, 1)[: slots * g] for x in (prompt_k, prompt_v))
        response_k, response_v = (x.flatten(0, 1)[: rows * g, :t] for x in (response_k, response_v))
        query = query * scale
        own = torch.bmm(query.reshape(rows * g, q, d), response_k.transpose(1, 2)).view(rows, g, q, t)
        if self._later is not None:
            own = own.masked_fill_(self._later, float("-inf"))
        # Queries of all responses to a prompt, and of all heads of a group, read its keys in one matrix product.
        shared = torch.bmm(self._to_slots(query).view(slots * g, share * q, d), prompt_k[..., :p])
        if self._padding is not None:
            shared.view(slots, g * share * q, p).masked_fill_(self._padding[:, None], float("-inf"))
        scores = torch.cat([shared, self._to_slots(own).view(slots * g, share * q, t)], dim=-1)
        weights = torch.softmax(scores.float(), dim=-1).to(value.dtype)
        from_prompt = torch.bmm(weights[..., :p], prompt_v[:, :p]).view(slots, g, share, q, d)
        own = self._to_rows(weights[..., p:].view(slots, g, share, q, t))
        out = torch.baddbmm(self._to_rows(from_prompt).view(rows * g, q, d), own.view(rows * g, q, t), response_v)
        return out.view(rows, g * q * d)

    def _to_slots(self, x: Tensor) -> Tensor:
        """[rows, g, ...] to [slots, g, share, ...]."""
        if self._grid is not None:
            x = x[self._grid[1]]
        return x.view(self._slots, self._share, *x.shape[1:]).transpose(1, 2).contiguous()

    def _to_rows(self, x: Tensor) -> Tensor:
        """[slots, g, share, ...] to [rows, g, ...]."""
        x = x.transpose(1, 2).contiguous().flatten(0, 1)
        return x if self._grid is None else x[self._grid[0]]


def _padding(lengths: list[int], device: torch.device) -> Tensor | None:
    """[b, longest] bool: positions beyond the end of shorter prompts; None when all have one length."""
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    return torch.arange(longest, device=device) >= torch.tensor(lengths, device=device)[:, None]
