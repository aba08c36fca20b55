"""What flows between the parts: samples, views, rollouts, microbatches, and their shape law.

Shape law. A microbatch holds b sequences `prompt ++ response`, padded on the right to s. Its T response
tokens (of all b sequences, concatenated in order) are predicted by T *response rows* of the final hidden
states [s, b, H]: response token j of sequence i is predicted at position prompt_length[i] - 1 + j
(docs/algorithm.md section 4). The student and the teacher microbatch of one index hold the same responses
in the same order, so row t of one belongs to row t of the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class View:
    """One prompt as one policy sees it: the full image for the student, the crop for the teacher."""

    token_ids: Tensor
    """[P] int64: the templated prompt, one image token for each merged patch."""
    position_ids: Tensor
    """[3, P] int64: M-RoPE positions (temporal, height, width)."""
    pixel_values: Tensor
    """[N, C * temporal_patch * patch * patch] float32: the patches of all images of the prompt."""
    grid_thw: Tensor
    """[num_images, 3] int64: patches of each image along time, height and width."""

    @property
    def num_tokens(self) -> int:
        """P, the length of the prompt in tokens."""
        return self.token_ids.numel()


@dataclass
class Sample:
    """A usable record: the same question with both images."""

    id: str
    student: View
    teacher: View
    question: str
    answer: str | None = None


@dataclass
class DroppedSample:
    """A record that cannot be used; it is counted and reported, and the run goes on."""

    id: str
    reason: str
    """A short word of `nemo_vopd.data.views.DROP_REASONS`."""
    detail: str = ""


@dataclass
class PromptBatch:
    """The prompts of one optimizer step that fall to this data-parallel rank."""

    samples: list[Sample] = field(default_factory=list)
    dropped: list[DroppedSample] = field(default_factory=list)


@dataclass
class Rollout:
    """One response the student sampled to one sample."""

    sample: Sample
    token_ids: Tensor
    """[R] int64: the response, the end token included when it was reached."""
    log_probs: Tensor
    """[R] float32: log p of each token under the engine's temperature-scaled full vocabulary."""
    index: int = 0
    """0 .. n-1, the number of this response among those of the sample."""


def blank_rollout(pad_token_id: int) -> Rollout:
    """A prompt of one padding token with an empty response: no row enters the loss."""
    view = View(
        token_ids=torch.tensor([pad_token_id]),
        position_ids=torch.zeros((3, 1), dtype=torch.int64),
        pixel_values=torch.empty((0, 1)),
        grid_thw=torch.empty((0, 3), dtype=torch.int64),
    )
    empty = torch.empty(0)
    return Rollout(Sample("", view, view, ""), empty.long(), empty)


@dataclass
class MicroBatch:
    """b padded sequences of one view, with the rows that predict response tokens (see the shape law)."""

    token_ids: Tensor
    """[b, s] int64, padded on the right."""
    position_ids: Tensor
    """[3, b, s] int64."""
    pixel_values: Tensor
    """[N, D] float32, images in the order of their tokens in the batch."""
    grid_thw: Tensor
    """[num_images, 3] int64."""
    response_rows: Tensor
    """[T] int64: indices into the hidden states [s, b, H] flattened to [s * b, H]."""
    response_tokens: Tensor
    """[T] int64: the token each row predicts."""
    rollout_log_probs: Tensor
    """[T] float32: the engine's log p of those tokens."""

    def to(self, device: torch.device) -> MicroBatch:
        """A copy on `device`, its patches excepted: they follow one microbatch at a time (`mcore.schedule`).

        Those of a whole step would take 24 MB for each sequence with an image of a million pixels.
        """
        others = {name: value for name, value in vars(self).items() if name != "pixel_values"}
        moved = {name: value.to(device, non_blocking=True) for name, value in others.items()}
        return MicroBatch(pixel_values=self.pixel_values, **moved)


def collate(rollouts: list[Rollout], views: list[View], pad_token_id: int, pad_multiple: int = 1) -> MicroBatch:
    """Build the microbatch of `rollouts` conditioned on `views` (one view for each rollout).

    The sequence length s is rounded up to `pad_multiple` (the tensor-parallel size under sequence
    parallelism, 16 times that for FP8).
    """
    lengths = [view.num_tokens + rollout.token_ids.numel() for view, rollout in zip(views, rollouts, strict=True)]
    b, s = len(rollouts), -(-max(lengths) // pad_multiple) * pad_multiple
    token_ids = torch.full((b, s), pad_token_id, dtype=torch.int64)
    position_ids = torch.zeros((3, b, s), dtype=torch.int64)
    rows = []
    for i, (view, rollout) in enumerate(zip(views, rollouts, strict=True)):
        p, r = view.num_tokens, rollout.token_ids.numel()
        token_ids[i, :p] = view.token_ids
        token_ids[i, p : p + r] = rollout.token_ids
        position_ids[:, i, :p] = view.position_ids
        position_ids[:, i, p : p + r] = view.position_ids.max() + 1 + torch.arange(r)
        rows.append((p - 1 + torch.arange(r)) * b + i)
    return MicroBatch(
        token_ids=token_ids,
        position_ids=position_ids,
        pixel_values=torch.cat([view.pixel_values for view in views]),
        grid_thw=torch.cat([view.grid_thw for view in views]),
        response_rows=torch.cat(rows),
        response_tokens=torch.cat([rollout.token_ids for rollout in rollouts]),
        rollout_log_probs=torch.cat([rollout.log_probs for rollout in rollouts]),
    )


def split_by_token_budget(rollouts: list[Rollout], max_tokens: int) -> list[list[Rollout]]:
    """Group rollouts so that neither view of a group exceeds `max_tokens` padded tokens.

    Both views count (docs/algorithm.md section 5): the wider of the two decides. Sorting by length keeps padding
    small; every rollout appears once, and one longer than the budget gets a group of its own.
    """

    def width(rollout: Rollout) -> int:
        prompt = max(rollout.sample.student.num_tokens, rollout.sample.teacher.num_tokens)
        return prompt + rollout.token_ids.numel()

    groups: list[list[Rollout]] = []
    for rollout in sorted(rollouts, key=width, reverse=True):
        # sorted from wide to narrow, so the first of a group is the width the others are padded to
        if groups and (len(groups[-1]) + 1) * width(groups[-1][0]) <= max_tokens:
            groups[-1].append(rollout)
        else:
            groups.append([rollout])
    return groups
