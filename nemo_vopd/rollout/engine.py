"""What every rollout engine offers, and the request it gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from nemo_vopd.batch import Rollout, Sample


@dataclass(frozen=True)
class SamplingParams:
    """How one prompt is answered."""

    n: int = 1
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    max_response_length: int = 1024
    end_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    """Texts that end a response, with the token that completes one; an engine needs `decode` for them."""
    forbidden_token_ids: tuple[int, ...] = ()
    seed: int = 0


class RolloutEngine(Protocol):
    """Produces responses from the full view; all ranks of one model-parallel group call it with the same samples."""

    def generate(self, samples: list[Sample]) -> list[Rollout]:
        """n rollouts for each sample, in the order of the samples."""
        ...

    def sync_weights(self) -> None:
        """Take over the student's weights after an optimizer step."""
        ...
