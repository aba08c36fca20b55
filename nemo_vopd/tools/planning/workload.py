"""What one step is made of: prompts, responses, tokens, microbatches and decoding batches of a data-parallel rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nemo_vopd.config import Config
from nemo_vopd.errors import OptionError
from nemo_vopd.tools.planning.assumptions import GPUS, Assumptions, PlanConfig
from nemo_vopd.tools.planning.count import architecture, count_model


@dataclass(frozen=True)
class Packed:
    """One microbatch of one view, or the prompts of one pass while sampling."""

    num_sequences: int
    num_tokens: int
    """Tokens of prompts and responses."""
    num_prompts: int
    """Prompts, whose images pass the tower once for all their responses."""
    num_image_tokens: int
    """Image tokens, each prompt counted once."""
    num_patches: int
    num_response_rows: int


@dataclass(frozen=True)
class Prompt:
    """Sizes of one prompt as one policy sees it."""

    num_tokens: int
    num_image_tokens: int
    num_patches: int

    def packed(self, num: float) -> Packed:
        """The mean pass over `num` such prompts, without responses."""
        count = max(1, round(num))
        sizes = (round(num * size) for size in (self.num_tokens, self.num_image_tokens, self.num_patches))
        num_tokens, num_image_tokens, num_patches = sizes
        return Packed(count, num_tokens, count, num_image_tokens, num_patches, 0)


@dataclass(frozen=True)
class DecodingBatches:
    """Continuous batching of a rank's prompts: one batch for each pipeline stage, refilled as responses end."""

    num_batches: int
    num_prompts: int
    """Prompts in each batch at one time."""
    num_positions: int
    """Positions in each batch's KV cache."""


class Workload:
    """One step of one data-parallel rank."""

    def __init__(self, config: Config, hf: Any, data_parallel: int, assume: Assumptions) -> None:
        """Raises OptionError when the prompts do not divide."""
        size, self.n = config.data.batch_size, config.rollout.n
        if size % data_parallel:
            below = size // data_parallel * data_parallel
            above = below + data_parallel
            rule = f"must be divisible by the data-parallel size {data_parallel}"
            raise OptionError("data.batch_size", size, rule, f"set it to {below or above} or {above}")
        self.num_prompts = size // data_parallel
        self.num_sequences = self.num_prompts * self.n
        """Pairs of prompt and response, once for each view."""
        self._config, self._merge = config, hf.vision_config.spatial_merge_size
        self._side = int(hf.vision_config.patch_size) * self._merge

        mean_sizes = assume.text_tokens, assume.full_image_tokens, assume.crop_image_tokens
        self.student, self.teacher = self._both_views(*mean_sizes)
        self.longest_prompt, longest_teacher = self._both_views(assume.longest_text_tokens, None, None)
        """The longest prompt of the full view; another one may be the teacher's."""
        self.longest_response = config.rollout.max_response_length
        self.response_tokens = min(assume.response_tokens, self.longest_response)
        self.widest = max(self.longest_prompt.num_tokens, longest_teacher.num_tokens) + self.longest_response
        """Tokens of the longest prompt of either view and the longest response."""

        # both views share a microbatch's sequences, and the wider one decides how many fit
        self._prompt_width = max(self.student.num_tokens, self.teacher.num_tokens)
        self._fit = max(1, config.trainer.max_tokens_per_microbatch // (self._prompt_width + self.response_tokens))
        self._num_parts = self.num_prompts * math.ceil(self.n / self._fit)
        num_microbatches = math.ceil(self._num_parts / _parts_together(self._fit, self.n))
        # the average microbatch decides the time, the largest one the memory
        self.student_mean, self.teacher_mean = (
            self._mean(prompt, num_microbatches) for prompt in (self.student, self.teacher)
        )
        self.student_most = self._largest(self.student, self.longest_prompt)
        self.teacher_most = self._largest(self.teacher, longest_teacher)
        rest = -num_microbatches % config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 0
        self.num_microbatches = num_microbatches + rest
        """Number of microbatches; the interleaved schedule fills them up to whole rounds of the pipeline."""
        self.decoding = self._decoding_batches()

    def _both_views(self, text: int, full: int | None, crop: int | None) -> list[Prompt]:
        """The prompts of student and teacher; None is the largest image that the options allow."""
        images = []
        for limits, wanted in ((self._config.data.full, full), (self._config.data.crop_pixels, crop)):
            most, least = limits.max_pixels // self._side**2, -(-limits.min_pixels // self._side**2)
            images.append(max(least, most if wanted is None else min(most, wanted)))
        seen = {"crop": images[1], "full_and_crop": sum(images)}.get(self._config.distill.teacher_view, images[0])
        longest = self._config.data.max_prompt_length
        return [Prompt(min(num + text, longest), num, num * self._merge**2) for num in (images[0], seen)]

    def _mean(self, prompt: Prompt, num_microbatches: int) -> Packed:
        num, num_prompts = self.num_sequences / num_microbatches, self._num_parts / num_microbatches
        tokens, images = num * (prompt.num_tokens + self.response_tokens), num_prompts * prompt.num_image_tokens
        numbers = num, tokens, num_prompts, images, images * self._merge**2, num * self.response_tokens
        return Packed(*map(round, numbers))

    def _largest(self, prompt: Prompt, longest: Prompt) -> Packed:
        # A sequence beyond the budget has a microbatch of its own. Short responses leave room for the most images.
        budget, response = self._config.trainer.max_tokens_per_microbatch, self.response_tokens
        tokens = min(max(budget, self.widest), self.num_sequences * self.widest)
        most_sequences = min(max(1, budget // self._prompt_width), self.num_sequences)
        # where responses are short, more fit
        fits = range(min(self._fit, most_sequences), most_sequences + 1)
        most_prompts = max(_parts_together(number, self.n) for number in fits)
        images = max(longest.num_image_tokens, most_prompts * prompt.num_image_tokens)
        rows = max(self.longest_response, budget * response // (self._prompt_width + response))
        return Packed(most_sequences, tokens, most_prompts, images, images * self._merge**2, rows)

    def _decoding_batches(self) -> DecodingBatches:
        """As `rollout.native.engine.Decoder` divides its token budget, for prompts of one length and a longest one."""
        pipeline, budget = self._config.parallel.pipeline, self._config.rollout.max_batch_tokens
        num_batches = min(pipeline, self.num_prompts)
        most = -(-self.num_prompts // num_batches)
        responses = self.n * self.longest_response
        cost = self.longest_prompt.num_tokens + responses
        positions = max(cost, min(budget // pipeline, most * cost))
        return DecodingBatches(num_batches, min(most, positions // (self.student.num_tokens + responses)), positions)


def _parts_together(fit: int, n: int) -> int:
    """Different prompts in a microbatch with room for `fit` sequences.

    The n responses to a prompt stay together, or are divided into even parts that fit (`batch.split_by_token_budget`).
    """
    return fit // math.ceil(n / math.ceil(n / fit))


class Case:
    """One configuration on one kind of GPU: what memory and time follow from."""

    def __init__(self, config: PlanConfig) -> None:
        """Raises OptionError when sizes do not divide."""
        self.config, self.gpu, self.hf = config, GPUS[config.gpu], architecture(config)
        self.model = count_model(config, self.hf, config.world_size)
        self.work = Workload(config, self.hf, self.model.data_parallel, config.assume)


def patch_width(vision: Any) -> int:
    """Numbers of one patch of the vision tower: colours, times temporal patch, times its area."""
    return vision.in_channels * int(vision.temporal_patch_size) * int(vision.patch_size) ** 2
