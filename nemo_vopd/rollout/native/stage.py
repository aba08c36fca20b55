"""Decoding on one pipeline stage: hidden states through its chunks and on to the next stage, tokens after the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_vopd.distill.products import product
from nemo_vopd.mcore.stage import Stage
from nemo_vopd.rollout.engine import SamplingParams
from nemo_vopd.rollout.native.cache import KVCache
from nemo_vopd.rollout.native.forward import ChunkPass, Rotary, Tokens
from nemo_vopd.rollout.native.sampling import draw
from nemo_vopd.rollout.native.stop import StopStrings


class StagePass:
    """Forward passes through the chunks of this rank's stage."""

    def __init__(self, model: Stage, groups: ProcessGroupCollection) -> None:
        """`model` is this rank's stage."""
        self.model, self.groups = model, groups
        self.device = next(model.parameters()).device
        last, ends = groups.pp.rank() == groups.pp.size() - 1, len(model.chunks) - 1
        self.chunks = [ChunkPass(c, groups, ends_model=last and i == ends) for i, c in enumerate(model.chunks)]
        self.rotary = Rotary(model.chunks[0])
        self._sent: list[tuple[Any, Tensor]] = []

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

    def wait_for_sends(self) -> None:
        """Wait until the next stage has taken what `forward` sent."""
        for handle, _ in self._sent:
            handle.wait()
        self._sent.clear()


class TokenChoice:
    """How the next tokens are drawn, and when a response ends."""

    def __init__(self, stage: StagePass, params: SamplingParams, decode: Callable[[list[int]], str] | None) -> None:
        """`decode` turns token ids into text, for `SamplingParams.stop`."""
        self.model, self.groups, self.device, self.params = stage.model, stage.groups, stage.device, params
        self._forbidden = torch.tensor(params.forbidden_token_ids, dtype=torch.int64, device=stage.device)
        self._end_token_ids, self._stop = frozenset(params.end_token_ids), StopStrings(params.stop, decode)

    def ends(self, tokens: list[int]) -> bool:
        """Whether the response `tokens` ends with its last token."""
        longest = self.params.max_response_length
        return len(tokens) == longest or tokens[-1] in self._end_token_ids or self._stop(tokens)

    def draw(self, hidden: Tensor | None, num_rows: int, uniform: Tensor | None) -> tuple[Tensor, Any]:
        """Start drawing tokens after `hidden` [num_rows, H], which is None before the last stage.

        `uniform` [num_rows, n] are numbers in [0, 1), one for each of n tokens; without it the choice is greedy and n
        is 1. Returns tokens and their log-probs, one tensor [2, num_rows, n] float64, and a handle to wait for, if any.
        """
        tp, mp = self.groups.tp, self.groups.mp
        shape = 2, num_rows, 1 if uniform is None else uniform.size(1)
        packed = torch.empty(shape, dtype=torch.float64, device=self.device)
        if hidden is not None:
            logits = product(hidden, self.model.output_weight().t(), torch.float32)
            if tp.size() > 1:
                shards = [torch.empty_like(logits) for _ in range(tp.size())]
                dist.all_gather(shards, logits, group=tp)
                logits = torch.cat(shards, dim=-1)
            logits = logits[:, : self.model.vocab_size]
            temperature = self.params.temperature or 1.0  # greedy log-probs are those at temperature 1
            options = {"temperature": temperature, "top_p": self.params.top_p, "forbidden": self._forbidden}
            packed[0], packed[1] = draw(logits, uniform, **options)
        if mp.size() == 1:
            return packed, None
        # One rank decides, so that round-off can never make two ranks continue with different tokens. The group is its
        # own and nobody waits here, because hidden states of other batches pass between the stages meanwhile.
        return packed, dist.broadcast(packed, group=mp, group_src=mp.size() - tp.size(), async_op=True)
