"""One answer from a model directory, with the engine and the layout that training uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_vopd.config import Config
from nemo_vopd.data.processor import Processor
from nemo_vopd.decoding import load_image
from nemo_vopd.errors import OptionError
from nemo_vopd.images import UnusableSample
from nemo_vopd.mcore import parallel
from nemo_vopd.rollout.engine import SamplingParams
from nemo_vopd.rollout.native.engine import Decoder
from nemo_vopd.tools.evaluation.gap import answers
from nemo_vopd.vlm.build import build_vlm, check_model


def generate(
    config: Config, image: Path, prompt: str, max_new_tokens: int, temperature: float
) -> dict[str, Any] | None:
    """{"text": str, "token_ids": list of R ints, "log_probs": list of R floats} on rank 0, None on the others.

    `temperature` 0 is greedy, with log-probs at temperature 1. Raises OptionError when image or prompt cannot be used.
    """
    check_model(config)
    processor = Processor.from_pretrained(config.model.hf_path)
    try:
        view = processor.view([load_image(image.read_bytes())], prompt, [config.data.full])
    except UnusableSample as unusable:
        option, value = ("image", image) if "image" in unusable.reason else ("prompt", prompt)
        rule = f"cannot be used ({unusable.reason}: {unusable.detail})"
        raise OptionError(option, value, rule, "give an image in a common format and a plain question") from None
    groups = parallel.initialize(config.parallel, seed=config.seed)
    decoder = Decoder(build_vlm(config, groups), groups, config.rollout.max_batch_tokens)
    params = SamplingParams(
        n=1,
        temperature=temperature,
        top_p=config.rollout.top_p,
        max_response_length=max_new_tokens,
        end_token_ids=tuple(processor.end_token_ids),
        forbidden_token_ids=tuple(processor.forbidden_token_ids),
        seed=config.seed,
    )
    ((token_ids, log_probs),) = answers(decoder, [view], ["request"], params)
    if not parallel.is_rank_zero():
        return None
    return {"text": processor.decode(token_ids), "token_ids": token_ids.tolist(), "log_probs": log_probs.tolist()}
