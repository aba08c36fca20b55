"""Drawing tokens with one uniform number for each request and position, so that no layout changes a response.

The number comes from a counter-based generator keyed by seed, prompt and number of the response: any batch composition
and any tensor, pipeline or data parallel layout draws the same token from the same logits, and a resumed run needs no
generator state.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, prompt: str, index: int, length: int) -> Tensor:
    """[length] float64 in [0, 1): the draws of response `index` to the prompt with the key `prompt`."""
    key = hashlib.blake2b(f"{seed}/{prompt}/{index}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)))
    return torch.from_numpy(generator.random(length))


def draw(
    logits: Tensor,
    uniform: Tensor | None,
    *,
    temperature: float,
    top_p: float = 1.0,
    forbidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample n tokens from each row.

    Args:
        logits: [B, V], the whole vocabulary.
        uniform: [B, n] in [0, 1); None takes the most likely token (greedy, n = 1).
        temperature: divides the logits; greedy choice uses it for the log-probs only.
        top_p: keep the smallest set of tokens whose probability reaches it.
        forbidden: [F] int64, ids that are never drawn.

    Returns:
        tokens [B, n] int64 and their log-probs [B, n] float32 under the temperature-scaled full vocabulary, before
        `forbidden` and `top_p`: the distribution the loss and the importance weights use.
    """
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    refused = None
    if forbidden is not None and forbidden.numel():
        refused = scaled[:, forbidden]
        scaled = scaled.clone() if scaled is logits else scaled
        scaled.index_fill_(-1, forbidden, float("-inf"))
    highest = scaled.amax(dim=-1, keepdim=True)
    masses = (scaled - highest).exp_()
    blocks, sums = _block_sums(masses)
    log_total = sums.sum(-1, keepdim=True).log() + highest
    if refused is not None:
        log_total = torch.logaddexp(log_total, refused.double().logsumexp(-1, keepdim=True))
    if uniform is None:
        tokens = scaled.argmax(dim=-1, keepdim=True)
    elif top_p < 1:
        tokens = _nucleus(masses, uniform, top_p)
    else:
        tokens = _inverse_cdf(blocks, sums, uniform).clamp_(max=logits.size(-1) - 1)
    return tokens, (scaled.gather(-1, tokens) - log_total).float()


_BLOCK = 128
"""Tokens summed together; divides the vocabularies of the released models."""


def _block_sums(masses: Tensor) -> tuple[Tensor, Tensor]:
    """`masses` [B, V] as blocks [B, V / _BLOCK, _BLOCK], and their sums in float64."""
    if masses.size(-1) % _BLOCK:
        masses = torch.nn.functional.pad(masses, (0, -masses.size(-1) % _BLOCK))
    blocks = masses.view(masses.size(0), -1, _BLOCK)
    return blocks, blocks.sum(-1).double()


def _inverse_cdf(blocks: Tensor, sums: Tensor, uniform: Tensor) -> Tensor:
    # The running sum is one of float64: over 150k tokens one of float32 would misplace rare ones. The vocabulary is
    # summed in blocks, and only the block that holds the token is added up token by token.
    ends = sums.cumsum(-1)
    threshold = (uniform.to(ends) * ends[:, -1:]).contiguous()
    block = _first_above(ends, threshold)  # [B, n]
    threshold = threshold - (ends - sums).gather(-1, block)
    ends = blocks.gather(1, block[..., None].expand(-1, -1, _BLOCK)).double().cumsum(-1)
    return block * _BLOCK + _first_above(ends, threshold[..., None])[..., 0]


def _nucleus(masses: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    ordered, order = masses.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.double()
    before = ordered.cumsum(-1) - ordered
    ends = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0.0).cumsum(-1)
    return order.gather(-1, _first_above(ends, (uniform.to(ends) * ends[:, -1:]).contiguous()))


def _first_above(ends: Tensor, threshold: Tensor) -> Tensor:
    """Where the running sums `ends` [..., V] first exceed `threshold` [..., n]: an entry of positive mass."""
    found = torch.searchsorted(ends, threshold, right=True)
    # round-off may put the threshold at the very end: then the last entry of positive mass
    found = torch.minimum(found, torch.searchsorted(ends, ends[..., -1:].contiguous()))
    return found.clamp_(max=ends.size(-1) - 1)  # NaN logits compare false everywhere and would give V
