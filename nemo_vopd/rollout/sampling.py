"""Drawing tokens: one uniform number for each request and position, so responses do not depend on the layout.

The number comes from a counter-based generator keyed by (seed, step, sample, response): any batch composition and
any tensor, pipeline or data parallel layout draws the same token from the same logits, and a resumed run needs no
generator state.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, step: int, sample_id: str, index: int, length: int) -> Tensor:
    """[length] float64 in [0, 1): the draws of response `index` to sample `sample_id` at training step `step`."""
    key = hashlib.blake2b(f"{seed}/{step}/{sample_id}/{index}".encode(), digest_size=16).digest()
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
    scaled = logits.float() / temperature
    log_probs = torch.log_softmax(scaled, dim=-1)
    if forbidden is not None and forbidden.numel():
        scaled = scaled.index_fill(-1, forbidden, float("-inf"))
    tokens = scaled.argmax(dim=-1, keepdim=True) if uniform is None else _inverse_cdf(scaled, uniform, top_p)
    return tokens, log_probs.gather(-1, tokens)


def _inverse_cdf(scaled: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    # float64: with 150k tokens a float32 running sum would misplace rare ones
    probs = torch.softmax(scaled.double(), dim=-1)
    order = None
    if top_p < 1:
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(before >= top_p, 0.0)
    cumulative = probs.cumsum(-1)
    # the first token whose cumulative probability exceeds the threshold; it has positive probability
    threshold = (uniform.to(cumulative) * cumulative[:, -1:]).contiguous()
    tokens = torch.searchsorted(cumulative, threshold, right=True).clamp(max=scaled.size(-1) - 1)
    return tokens if order is None else order.gather(-1, tokens)
