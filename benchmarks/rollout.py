"""The native engine against Hugging Face's `generate` with its cache: the same weights and prompts, in turn."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from benchmarks.measure import Row, measure_in_turn
from nemo_vopd.batch import View
from nemo_vopd.config import Config, PixelConfig
from nemo_vopd.data.processor import Processor
from nemo_vopd.mcore import cpu, parallel
from nemo_vopd.rollout.engine import SamplingParams
from nemo_vopd.rollout.native.batching import Counts
from nemo_vopd.rollout.native.engine import Decoder
from nemo_vopd.vlm.build import build_vlm

UNEQUAL = 3
"""Times the prompts of a batch, where responses end at different lengths."""


def rollout(
    config: Config,
    *,
    num_prompts: int,
    prompt_tokens: int,
    response_tokens: int,
    mean_response_tokens: int,
    repeats: int,
) -> list[Row]:
    """Equal responses to an eighth of the prompts and to all with n = 8, to all with n = 1; unequal ones with n = 1.

    Prompts of unequal responses have half the length up to the whole; random end ids, as many as make the mean response
    `mean_response_tokens` if all ids were as likely, end them.
    """
    groups = parallel.initialize(config.parallel, seed=config.seed)
    processor = Processor.from_pretrained(config.model.hf_path)
    student = build_vlm(config, groups)
    dtype = student.config.params_dtype
    reference: Any = AutoModelForImageTextToText.from_pretrained(config.model.hf_path, dtype=dtype)
    reference.to(cpu.device())
    forbidden = tuple(processor.forbidden_token_ids)
    params = SamplingParams(max_response_length=response_tokens, forbidden_token_ids=forbidden)
    random = np.random.default_rng(0)
    others = np.setdiff1d(np.arange(processor.vocab_size), forbidden)
    ends = random.choice(others, max(1, round(len(others) / mean_response_tokens)), replace=False)
    unequal = dataclasses.replace(params, end_token_ids=tuple(ends.tolist()))
    pixels = config.data.full

    def decoder(params: SamplingParams, continuous: bool = True) -> Decoder:
        budget = num_prompts * (prompt_tokens + params.n * response_tokens)
        return Decoder(student, groups, budget, continuous=continuous)

    rows: list[Row] = []
    prompts = [_view(processor, random, prompt_tokens, pixels) for _ in range(num_prompts)]
    for num, n in ((num_prompts // 8, 8), (num_prompts, 8), (num_prompts, 1)):
        equal, views = dataclasses.replace(params, n=n), prompts[: max(1, num)]
        hugging_face = _Generate(reference, processor, views, equal, num_prompts)
        rows += _compare("equal", {"generate": hugging_face, "native": _Native(decoder(equal), views, equal)}, repeats)
    lengths = random.integers(prompt_tokens // 2, prompt_tokens + 1, UNEQUAL * num_prompts)
    views = [_view(processor, random, int(length), pixels) for length in lengths]
    engines = {
        "generate": _Generate(reference, processor, views, unequal, num_prompts),
        "native, static batches": _Native(decoder(unequal, continuous=False), views, unequal),
        "native": _Native(decoder(unequal), views, unequal),
    }
    return rows + _compare("unequal", engines, repeats)


def _view(processor: Processor, random: np.random.Generator, num_tokens: int, pixels: PixelConfig) -> View:
    """A prompt of about `num_tokens` with the largest square image of noise within `pixels`."""
    side = int(pixels.max_pixels**0.5)
    image = Image.fromarray(random.integers(0, 255, (side, side, 3), dtype=np.uint8))
    missing = num_tokens - processor.view([image], "a", [pixels]).num_tokens
    return processor.view([image], "a" + " a" * max(0, missing), [pixels])


class _Native:
    """The native engine on `views`."""

    def __init__(self, decoder: Decoder, views: list[View], params: SamplingParams) -> None:
        self.decoder, self.views, self.params = decoder, views, params

    def __call__(self) -> None:
        self.decoder.counts = Counts()
        answers = self.decoder(self.views, [str(i) for i in range(len(self.views))], self.params)
        self.num_tokens = sum(len(tokens) for pairs in answers for tokens, _ in pairs)

    def facts(self) -> Row:
        counts = self.decoder.counts
        padding = counts.prompt_tokens - sum(view.num_tokens for view in self.views)
        useful = counts.row_steps - counts.ended_row_steps
        occupancy = useful / (counts.steps * counts.most_rows)
        return {"padded_prompt_tokens": padding, "steps": counts.steps, "occupancy": occupancy}


class _Generate:
    """Hugging Face's `generate` on `views`, `at_once` prompts in a batch, padded on the left."""

    def __init__(self, model: Any, processor: Processor, views: list[View], params: SamplingParams, at_once: int):
        self.model, self.pad, self.views, self.params = model, processor.pad_token_id, views, params
        self.batches = [views[i : i + at_once] for i in range(0, len(views), at_once)]

    def __call__(self) -> None:
        self.lengths = [self._generate(batch) for batch in self.batches]
        self.num_tokens = sum(map(sum, self.lengths))

    def _generate(self, views: list[View]) -> list[int]:
        params, longest = self.params, max(view.num_tokens for view in views)
        token_ids = torch.full((len(views), longest), self.pad)
        attended = torch.zeros_like(token_ids)
        for i, view in enumerate(views):
            token_ids[i, longest - view.num_tokens :] = view.token_ids
            attended[i, longest - view.num_tokens :] = 1
        inputs = {
            "input_ids": token_ids,
            "attention_mask": attended,
            "mm_token_type_ids": (token_ids == self.model.config.image_token_id).int(),
            "pixel_values": torch.cat([view.pixel_values for view in views]),
            "image_grid_thw": torch.cat([view.grid_thw for view in views]),
        }
        with torch.no_grad():
            generated = self.model.generate(
                **{name: tensor.to(self.model.device) for name, tensor in inputs.items()},
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=params.n,
                max_new_tokens=params.max_response_length,
                eos_token_id=list(params.end_token_ids) or None,
                pad_token_id=self.pad,
                suppress_tokens=list(params.forbidden_token_ids),
            )
        responses = generated[:, longest:].cpu()
        ends = torch.isin(responses, torch.tensor(params.end_token_ids, dtype=torch.int64)).int()
        before = (ends.cumsum(dim=1) - ends == 0).sum(dim=1)  # up to the first end token, or all
        return before.tolist()

    def facts(self) -> Row:
        padding = sum(len(b) * max(v.num_tokens for v in b) - sum(v.num_tokens for v in b) for b in self.batches)
        # the first token comes from the prompt; a batch goes on until its longest response has ended
        steps = [max(lengths) - 1 for lengths in self.lengths]
        places = sum(len(lengths) * num for lengths, num in zip(self.lengths, steps, strict=True))
        occupancy = (self.num_tokens - sum(map(len, self.lengths))) / places
        return {"padded_prompt_tokens": padding * self.params.n, "steps": sum(steps), "occupancy": occupancy}


def _compare(workload: str, engines: dict[str, _Native | _Generate], repeats: int) -> list[Row]:
    """A row for each engine; `ratio` is the throughput over that of the first."""
    rows: list[Row] = []
    times = measure_in_turn(list(engines.values()), repeats, resident=True)
    for (name, engine), found in zip(engines.items(), times, strict=True):
        speed = engine.num_tokens / found.seconds
        row: Row = {"responses": workload, "prompts": len(engine.views), "n": engine.params.n, "engine": name}
        row |= {"ms": found.seconds * 1e3, "tokens": engine.num_tokens, "tokens_per_second": speed}
        row |= {"extra_gib": found.extra_gib, **engine.facts()}
        rows.append({**row, "ratio": speed / float(rows[0]["tokens_per_second"]) if rows else 1.0})
    return rows
