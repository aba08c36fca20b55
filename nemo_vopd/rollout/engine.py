"""What every rollout engine offers, and the request it gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_vopd.batch import Rollout, Sample
from nemo_vopd.config import RolloutConfig
from nemo_vopd.data.processor import Processor


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

    @classmethod
    def of(cls, rollout: RolloutConfig, processor: Processor, seed: int) -> SamplingParams:
        """How a run samples: its options and the model's special tokens."""
        return cls(
            n=rollout.n,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_response_length=rollout.max_response_length,
            end_token_ids=tuple(processor.end_token_ids),
            stop=tuple(rollout.stop),
            forbidden_token_ids=tuple(processor.forbidden_token_ids),
            seed=seed,
        )


class RolloutEngine:
    """Produces responses from the full view; all ranks of one model-parallel group call it with the same samples."""

    def generate(self, samples: list[Sample]) -> list[Rollout]:
        """n rollouts for each sample, in the order of the samples."""
        raise NotImplementedError

    def sync_weights(self) -> None:
        """Take over the student's weights after an optimizer step.

        An engine that reads the weights in place, or none at all, has nothing to do.
        """

    def pending(self) -> list[dict[str, Any]]:
        """This rank's rollouts of the next step in plain values, which a checkpoint holds."""
        return []

    def restore(self, records: list[dict[str, Any]]) -> None:
        """Take over the `pending` rollouts of all ranks from a checkpoint.

        An engine that does not sample ahead ignores them: it samples those responses again.
        """
