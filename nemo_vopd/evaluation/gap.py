"""The regional-to-global gap: greedy accuracy on the crop view less that on the full view."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_vopd.batch import Sample
from nemo_vopd.config import Config, DataConfig
from nemo_vopd.data.processor import Processor
from nemo_vopd.data.task_encoder import iterate_samples, require_dataset
from nemo_vopd.errors import OptionError
from nemo_vopd.evaluation.scoring import exact_match
from nemo_vopd.rollout.engine import SamplingParams
from nemo_vopd.rollout.megatron import Decoder
from nemo_vopd.vlm import build_vlm


@dataclass
class Reply:
    """What the model said about one sample under each view."""

    id: str
    full: str
    crop: str
    full_correct: bool
    crop_correct: bool


@dataclass
class Gap:
    """Accuracies in [0, 1] over the same samples."""

    full_accuracy: float
    crop_accuracy: float
    replies: list[Reply]

    @property
    def gap(self) -> float:
        """Crop-view accuracy less full-view accuracy."""
        return self.crop_accuracy - self.full_accuracy


def measure_gap(
    decoder: Decoder,
    processor: Processor,
    samples: list[Sample],
    groups: ProcessGroupCollection,
    max_response_length: int,
) -> Gap:
    """Answer every sample greedily from its student view (full) and its teacher view (crop).

    Samples are shared out over data-parallel ranks; every rank returns the whole result. They need an answer, see
    `load_answered`.
    """
    dp = groups.dp_cp
    params = SamplingParams(
        temperature=0.0,
        max_response_length=max_response_length,
        end_token_ids=tuple(processor.end_token_ids),
        forbidden_token_ids=tuple(processor.forbidden_token_ids),
    )
    mine = samples[dp.rank() :: dp.size()]
    texts = []
    for views in ([s.student for s in mine], [s.teacher for s in mine]):
        responses = decoder(views, [s.id for s in mine], params) if mine else []
        texts.append([processor.decode(answers[0][0]) for answers in responses])
    replies = []
    for sample, full, crop in zip(mine, *texts, strict=True):
        assert sample.answer is not None, f"sample {sample.id} has no answer to compare with"
        right = exact_match(full, sample.answer), exact_match(crop, sample.answer)
        replies.append(Reply(sample.id, full, crop, *right))
    gathered: list = [None] * dp.size()
    dist.all_gather_object(gathered, replies, group=dp)
    replies = [reply for part in gathered for reply in part]
    num = max(1, len(replies))
    return Gap(sum(r.full_correct for r in replies) / num, sum(r.crop_correct for r in replies) / num, replies)


def evaluate_directory(config: Config, groups: ProcessGroupCollection, limit: int | None = None) -> Gap:
    """`measure_gap` of the model in `config.model.hf_path` on the first `limit` samples of `config.data.path`."""
    processor = Processor.from_pretrained(config.model.hf_path)
    samples = load_answered(config.data.path, config.data, processor, limit, option="data.path")
    decoder = Decoder(build_vlm(config, groups), groups, config.rollout.max_batch_tokens)
    return measure_gap(decoder, processor, samples, groups, config.rollout.max_response_length)


def load_answered(path: str, data: DataConfig, processor: Processor, limit: int | None, *, option: str) -> list[Sample]:
    """The first `limit` usable samples of the Energon data set `path`, full image beside crop.

    Raises OptionError, naming `option`, when there is none or one has no answer.
    """
    require_dataset(path, option)
    samples = [item for item in iterate_samples(path, data, "crop", processor, limit) if isinstance(item, Sample)]
    remedy = "evaluate on a data set with answers"
    if not samples:
        raise OptionError(option, path, "holds no usable sample", remedy)
    without = next((sample.id for sample in samples if sample.answer is None), None)
    if without is not None:
        raise OptionError(option, path, f"has no answer to compare with in sample {without}", remedy)
    return samples
