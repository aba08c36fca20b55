"""What one step is made of: prompts, responses, tokens, microbatches and decoding batches of a data-parallel rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nemo_vopd.config import Config, PixelConfig
from nemo_vopd.errors import OptionError
from nemo_vopd.tools.planning.assumptions import Assumptions, Gpu
from nemo_vopd.tools.planning.count import ModelCount


@dataclass(frozen=True)
class Prompt:
    """Sizes of one prompt as one policy sees it."""

    num_tokens: int
    num_image_tokens: int
    num_patches: int


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
class DecodingBatches:
    """Continuous batching of a rank's prompts: one batch for each pipeline stage, refilled as responses end."""

    num_batches: int
    num_prompts: int
    """Prompts in each batch at one time."""
    num_positions: int
    """Positions in each batch's KV cache."""


@dataclass(frozen=True)
class Workload:
    """One step of one data-parallel rank."""

    num_prompts: int
    n: int
    response_tokens: int
    longest_response: int
    student: Prompt
    teacher: Prompt
    longest_prompt: Prompt
    """The longest prompt of the full view."""
    longest_teacher_prompt: Prompt
    num_microbatches: int
    student_mean: Packed
    """The average microbatch, which decides the time."""
    teacher_mean: Packed
    student_most: Packed
    """The largest microbatch, which decides the memory."""
    teacher_most: Packed
    decoding: DecodingBatches

    @property
    def num_sequences(self) -> int:
        """Prompt and response, once for each view."""
        return self.num_prompts * self.n


@dataclass(frozen=True)
class Case:
    """One configuration on one kind of GPU: what memory and time follow from."""

    config: Config
    hf: Any
    """The Hugging Face configuration of the model."""
    gpu: Gpu
    assume: Assumptions
    world_size: int
    model: ModelCount
    work: Workload


def patch_width(vision: Any) -> int:
    """Numbers of one patch of the vision tower: colours, times temporal patch, times its area."""
    return vision.in_channels * int(vision.temporal_patch_size) * int(vision.patch_size) ** 2


def image_tokens(limits: PixelConfig, patch_side: int, tokens: int | None) -> int:
    """Tokens of one image within `limits`; None is the largest image."""
    side = patch_side**2
    most, least = limits.max_pixels // side, -(-limits.min_pixels // side)
    return max(least, min(most, tokens if tokens is not None else most, most))


def workload(config: Config, hf: Any, data_parallel: int, assume: Assumptions) -> Workload:
    """The arithmetic of one step. Raises OptionError when the prompts do not divide."""
    if config.data.batch_size % data_parallel:
        size = config.data.batch_size
        below, above = size // data_parallel * data_parallel, (size // data_parallel + 1) * data_parallel
        rule = f"must be divisible by the data-parallel size {data_parallel}"
        raise OptionError("data.batch_size", size, rule, f"set it to {below or above} or {above}")
    vision = hf.vision_config
    merge = vision.spatial_merge_size
    side = int(vision.patch_size) * merge

    def prompt(text: int, *images: int) -> Prompt:
        num_images = sum(images)
        num_tokens = min(num_images + text, config.data.max_prompt_length)
        return Prompt(num_tokens, num_images, num_images * merge**2)

    def both_views(text: int, full_tokens: int | None, crop_tokens: int | None) -> tuple[Prompt, Prompt]:
        full = image_tokens(config.data.full, side, full_tokens)
        crop = image_tokens(config.data.crop_pixels, side, crop_tokens)
        seen = {"crop": [crop], "full_and_crop": [full, crop]}.get(config.distill.teacher_view, [full])
        return prompt(text, full), prompt(text, *seen)

    student, teacher = both_views(assume.text_tokens, assume.full_image_tokens, assume.crop_image_tokens)
    longest, longest_teacher = both_views(assume.longest_text_tokens, None, None)

    longest_response = config.rollout.max_response_length
    response = min(assume.response_tokens, longest_response)
    num_prompts, n = config.data.batch_size // data_parallel, config.rollout.n
    budget = config.trainer.max_tokens_per_microbatch
    # both views share a microbatch's sequences, and the wider one decides how many fit
    width = max(student.num_tokens, teacher.num_tokens) + response
    fit = max(1, budget // width)
    num_parts = num_prompts * math.ceil(n / fit)
    num_microbatches = math.ceil(num_parts / _parts_together(fit, n))
    per_microbatch, images_of = num_prompts * n / num_microbatches, num_parts / num_microbatches
    if config.parallel.virtual_pipeline > 1:  # filled up to whole rounds of the pipeline
        num_microbatches += -num_microbatches % config.parallel.pipeline

    def mean(of: Prompt) -> Packed:
        tokens, images = per_microbatch * (of.num_tokens + response), images_of * of.num_image_tokens
        numbers = per_microbatch, tokens, images_of, images, images * merge**2, per_microbatch * response
        return Packed(*map(round, numbers))

    def largest(of: Prompt, longest: Prompt) -> Packed:
        # A sequence beyond the budget has a microbatch of its own. Short responses leave room for the most images.
        tokens = min(max(budget, widest), num_prompts * n * widest)
        most_sequences = min(max(1, budget // max(student.num_tokens, teacher.num_tokens)), num_prompts * n)
        # where responses are short, more fit
        fits = range(min(fit, most_sequences), most_sequences + 1)
        most_prompts = max(_parts_together(number, n) for number in fits)
        images = max(longest.num_image_tokens, most_prompts * of.num_image_tokens)
        rows = max(longest_response, budget * response // width)
        return Packed(most_sequences, tokens, most_prompts, images, images * merge**2, rows)

    widest = max(longest.num_tokens, longest_teacher.num_tokens) + longest_response
    return Workload(
        num_prompts=num_prompts,
        n=n,
        response_tokens=response,
        longest_response=longest_response,
        student=student,
        teacher=teacher,
        longest_prompt=longest,
        longest_teacher_prompt=longest_teacher,
        num_microbatches=num_microbatches,
        student_mean=mean(student),
        teacher_mean=mean(teacher),
        student_most=largest(student, longest),
        teacher_most=largest(teacher, longest_teacher),
        decoding=_decoding_batches(config, num_prompts, student.num_tokens, longest.num_tokens),
    )


def _parts_together(fit: int, n: int) -> int:
    """Different prompts in a microbatch with room for `fit` sequences.

    The n responses to a prompt stay together, or are divided into even parts that fit (`batch.split_by_token_budget`).
    """
    num_parts = math.ceil(n / fit)
    return fit // math.ceil(n / num_parts)


def _decoding_batches(config: Config, num_prompts: int, prompt_tokens: int, longest_prompt: int) -> DecodingBatches:
    """As `rollout.native.engine.Decoder` divides its token budget, for prompts of one length and a longest one."""
    num_batches = min(config.parallel.pipeline, num_prompts)
    most = -(-num_prompts // num_batches)
    responses = config.rollout.n * config.rollout.max_response_length
    cost = longest_prompt + responses
    positions = max(cost, min(config.rollout.max_batch_tokens // config.parallel.pipeline, most * cost))
    return DecodingBatches(num_batches, min(most, positions // (prompt_tokens + responses)), positions)
