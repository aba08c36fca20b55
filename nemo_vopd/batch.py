"""What flows between the parts: samples, views, rollouts and microbatches.

All parts agree on one layout. A microbatch holds b sequences `prompt ++ response`, packed one after the other to S
tokens. Its T response tokens (of all b sequences, concatenated in order) are predicted by T *response rows* of the
final hidden states [S, 1, H]: response token j of sequence i is predicted at start[i] + prompt_length[i] - 1 + j
(docs/algorithm.md section 4). The student and the teacher microbatch of one index hold the same responses in the same
order, so row t of one belongs to row t of the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import ClassVar, NamedTuple

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


class RecordKey(NamedTuple):
    """Identity of a prompt within a run: which record it was made of, and how often that was read before.

    Random draws, dumped rollouts and replay use it, because two data sets may use the same sample ids.
    """

    data_set: int
    """Number of the data set in its blend, 0 for a single data set."""
    record: int
    """Number of the record in its data set, in stored order."""
    occurrence: int = 0
    """Number of times that the run has read the record before."""

    def __str__(self) -> str:
        return "/".join(map(str, self))


@dataclass
class Sample:
    """A usable record: the same question with both images."""

    id: str
    """Name of the record in its source."""
    key: RecordKey
    student: View
    teacher: View
    question: str
    answers: list[str] = field(default_factory=list)
    """Reference answers, any of which is right; none where the record has none."""


@dataclass
class DroppedSample:
    """A record that cannot be used; it is counted and reported, and the run goes on."""

    id: str
    reason: str
    """A short word of `nemo_vopd.images.DROP_REASONS`."""
    detail: str = ""


@dataclass
class PromptBatch:
    """The prompts of one optimizer step that fall to this data-parallel rank."""

    samples: list[Sample] = field(default_factory=list)
    dropped: list[DroppedSample] = field(default_factory=list)


@dataclass
class Rollout:
    """One response that the student sampled for one sample."""

    sample: Sample
    token_ids: Tensor
    """[R] int64: the response, the end token included when it was reached."""
    log_probs: Tensor
    """[R] float32: log p of each token under the engine's temperature-scaled full vocabulary."""
    index: int = 0
    """Number of this response among those of the sample, from 0 to n-1."""


def blank_rollout(pad_token_id: int) -> Rollout:
    """A prompt of one padding token with an empty response: no row enters the loss."""
    view = View(
        token_ids=torch.tensor([pad_token_id]),
        position_ids=torch.zeros((3, 1), dtype=torch.int64),
        pixel_values=torch.empty((0, 1)),
        grid_thw=torch.empty((0, 3), dtype=torch.int64),
    )
    empty = torch.empty(0)
    return Rollout(Sample("", RecordKey(0, 0), view, view, ""), empty.long(), empty)


@dataclass(frozen=True)
class Packing:
    """Where each packed sequence begins, and which prompt's images it shows.

    Megatron's layers hand it on to attention in the place of their `PackedSeqParams`.
    """

    lengths: tuple[int, ...]
    """Number of tokens of each sequence; the last one may be padding."""
    starts: Tensor
    """[len(lengths) + 1] int32: position at which each sequence begins, and the number S of all tokens."""
    patches: tuple[int, ...] = ()
    """Number of image patches of each prompt, which the vision tower computes once for all responses."""
    prompts: tuple[int, ...] = ()
    """Number of the prompt that each sequence, except padding, begins with."""

    # Not Megatron's "thd": its rotary embedding would wait for the GPU in every layer to cut the angles into sequences,
    # and ours are those of each token.
    qkv_format: ClassVar[str | None] = None
    cp_group: ClassVar[None] = None

    @classmethod
    def of(cls, lengths: list[int], patches: tuple[int, ...] = (), prompts: tuple[int, ...] = ()) -> Packing:
        """Sequences of `lengths`, on the CPU."""
        return cls(tuple(lengths), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), patches, prompts)

    def to(self, device: torch.device, non_blocking: bool = False) -> Packing:
        """A copy with `starts` on `device`."""
        return replace(self, starts=self.starts.to(device, non_blocking=non_blocking))

    def for_sequences(self, features: Tensor, patches_of_a_token: int) -> Tensor:
        """Image features [n, ...] of the prompts, repeated for the sequences that begin with them: [m, ...]."""
        if len(self.prompts) == len(self.patches):
            return features
        parts = features.split([patches // patches_of_a_token for patches in self.patches])
        return torch.cat([parts[prompt] for prompt in self.prompts])


@dataclass
class MicroBatch:
    """b packed sequences of one view, with the rows that predict response tokens (see the top of this file)."""

    token_ids: Tensor
    """[S] int64."""
    position_ids: Tensor
    """[3, S] int64: M-RoPE positions, from 0 in each sequence."""
    packing: Packing
    pixel_values: Tensor
    """[N, D] float32: the patches of each prompt once, in the order of `packing.patches`."""
    grid_thw: Tensor
    """[num_images, 3] int64, in host memory."""
    response_rows: Tensor
    """[T] int64: indices into the hidden states [S, 1, H]."""
    response_tokens: Tensor
    """[T] int64: the token each row predicts."""
    rollout_log_probs: Tensor
    """[T] float32: the engine's log p of those tokens."""

    def to(self, device: torch.device) -> MicroBatch:
        """A copy on `device`, except for the images.

        Patches follow one microbatch at a time (`mcore.schedule`), because those of a whole step would take 24 MB for
        each sequence with an image of a million pixels. The host reads the grids and would wait for them.
        """
        images = {"pixel_values": self.pixel_values, "grid_thw": self.grid_thw}
        others = {name: value for name, value in vars(self).items() if name not in images}
        return MicroBatch(**images, **{name: value.to(device, non_blocking=True) for name, value in others.items()})


def collate(rollouts: list[Rollout], views: list[View], pad_token_id: int, pad_multiple: int = 1) -> MicroBatch:
    """Build the microbatch of `rollouts` conditioned on `views` (one view for each rollout).

    S is rounded up to `pad_multiple` (the tensor-parallel size under sequence parallelism, 16 times that for FP8) by a
    sequence of padding.
    """
    unique = {id(view): view for view in views}
    number = {key: i for i, key in enumerate(unique)}
    lengths = [view.num_tokens + rollout.token_ids.numel() for view, rollout in zip(views, rollouts, strict=True)]
    padding = -sum(lengths) % pad_multiple
    tokens, positions, rows, start = [], [], [], 0
    for view, rollout, length in zip(views, rollouts, lengths, strict=True):
        steps = torch.arange(rollout.token_ids.numel())
        tokens += [view.token_ids, rollout.token_ids]
        positions += [view.position_ids, (view.position_ids.max() + 1 + steps).expand(3, -1)]
        rows.append(start + view.num_tokens - 1 + steps)
        start += length
    if padding:
        lengths.append(padding)
        tokens.append(torch.full((padding,), pad_token_id, dtype=torch.int64))
        positions.append(torch.zeros((3, padding), dtype=torch.int64))
    return MicroBatch(
        token_ids=torch.cat(tokens),
        position_ids=torch.cat(positions, dim=1),
        packing=Packing.of(
            lengths,
            patches=tuple(len(view.pixel_values) for view in unique.values()),
            prompts=tuple(number[id(view)] for view in views),
        ),
        pixel_values=torch.cat([view.pixel_values for view in unique.values()]),
        grid_thw=torch.cat([view.grid_thw for view in unique.values()]),
        response_rows=torch.cat(rows),
        response_tokens=torch.cat([rollout.token_ids for rollout in rollouts]),
        rollout_log_probs=torch.cat([rollout.log_probs for rollout in rollouts]),
    )


def pack(
    rollouts: list[Rollout], max_tokens: int, pad_token_id: int, *, token_multiple: int = 1, num_multiple: int = 1
) -> tuple[list[MicroBatch], list[MicroBatch]]:
    """Student and teacher microbatches over the same responses, neither with more than `max_tokens` tokens.

    Each is padded to a multiple of `token_multiple` tokens, and their number to one of `num_multiple`. There is at
    least one, without a response, so that a rank with nothing to learn from takes part in the collectives.
    """
    groups = split_by_token_budget(rollouts, max_tokens) or [[blank_rollout(pad_token_id)]]
    groups += [[blank_rollout(pad_token_id)]] * (-len(groups) % num_multiple)
    students = [collate(group, [r.sample.student for r in group], pad_token_id, token_multiple) for group in groups]
    teachers = [collate(group, [r.sample.teacher for r in group], pad_token_id, token_multiple) for group in groups]
    return students, teachers


def split_by_token_budget(rollouts: list[Rollout], max_tokens: int) -> list[list[Rollout]]:
    """Group rollouts so that neither view of a group has more than `max_tokens` tokens.

    Both views count, because each fills a microbatch of its own (docs/algorithm.md section 5). Responses to one sample
    share its images, so they stay together where they fit and are divided evenly where they do not. The largest parts
    are placed first, each into the first group with room. A rollout longer than the budget has a group of its own.
    """
    by_sample: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        by_sample.setdefault(id(rollout.sample), []).append(rollout)
    parts: list[list[Rollout]] = []
    for answers in by_sample.values():
        full = _fill([[rollout] for rollout in answers], max_tokens)
        answers = sorted(answers, key=lambda rollout: rollout.token_ids.numel(), reverse=True)
        even = [answers[i :: len(full)] for i in range(len(full))]
        parts += even if all(max(_size(part)) <= max_tokens for part in even) else full
    return _fill(parts, max_tokens)


def _size(part: list[Rollout]) -> tuple[int, int]:
    """Tokens of the student's and of the teacher's microbatch."""
    response = sum(rollout.token_ids.numel() for rollout in part)
    student = sum(rollout.sample.student.num_tokens for rollout in part)
    return student + response, sum(rollout.sample.teacher.num_tokens for rollout in part) + response


def _fill(parts: list[list[Rollout]], max_tokens: int) -> list[list[Rollout]]:
    """Join `parts` to groups within the budget: the largest first, each into the first group with room."""
    groups: list[list[Rollout]] = []
    sizes: list[tuple[int, int]] = []
    for part in sorted(parts, key=lambda part: max(_size(part)), reverse=True):
        student, teacher = _size(part)
        room = (i for i, (s, t) in enumerate(sizes) if max(s + student, t + teacher) <= max_tokens)
        i = next(room, len(groups))
        if i == len(groups):
            groups.append([])
            sizes.append((0, 0))
        groups[i] = [*groups[i], *part]
        sizes[i] = sizes[i][0] + student, sizes[i][1] + teacher
    return groups
