"""The regional-to-global gap: greedy accuracy on the crop view less that on the full view, while training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_vopd.batch import Sample
from nemo_vopd.config import Config, DataConfig
from nemo_vopd.data.dataset import require_dataset
from nemo_vopd.data.encoder import iterate_samples
from nemo_vopd.data.processor import Processor
from nemo_vopd.errors import OptionError
from nemo_vopd.rollout.engine import SamplingParams
from nemo_vopd.rollout.native.engine import Decoder
from nemo_vopd.tools.evaluation.questions import classify
from nemo_vopd.tools.evaluation.results import grade
from nemo_vopd.vlm.build import build_vlm

_MAX_BYTES = 1 << 30
"""Of the images that a rank holds at a time, both views together: some forty samples of a million pixels."""


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
    path: str,
    data: DataConfig,
    groups: ProcessGroupCollection,
    max_response_length: int,
    limit: int | None = None,
    *,
    option: str = "data.path",
) -> Gap:
    """Answer the first `limit` usable samples of the Energon data set `path` from the full and the crop view.

    Data-parallel ranks share the samples, a few in memory at a time; every rank returns the whole result, in stored
    order. Raises OptionError, naming `option`, on every rank when there is no sample or one has no answer.
    """
    require_dataset(path, option)
    group = groups.dp_cp
    params = greedy(processor, max_response_length)
    # the place of a sample among all records keeps the order of the data set whatever the number of ranks
    stream = iterate_samples(path, data, "crop", processor, limit, dp_rank=group.rank(), dp_size=group.size())
    mine: list[tuple[int, Reply | str]] = []
    samples = ((place, item) for place, item in enumerate(stream) if isinstance(item, Sample))
    for some in _batches(samples):
        replies = _answer(decoder, processor, [sample for _, sample in some], params)
        places = [place * group.size() + group.rank() for place, _ in some]
        mine += zip(places, replies, strict=True)
    gathered: list = [None] * group.size()
    dist.all_gather_object(gathered, mine, group=group)
    replies = [reply for _, reply in sorted((pair for part in gathered for pair in part), key=lambda pair: pair[0])]
    remedy = "evaluate on a data set with answers"
    if not replies:
        raise OptionError(option, path, "holds no usable sample", remedy)
    for reply in replies:
        if isinstance(reply, str):
            raise OptionError(option, path, f"has no answer to compare with in sample {reply}", remedy)
    num = len(replies)
    return Gap(sum(r.full_correct for r in replies) / num, sum(r.crop_correct for r in replies) / num, replies)


def _batches(samples: Iterator[tuple[int, Sample]]) -> Iterator[list[tuple[int, Sample]]]:
    batch, num_bytes = [], 0
    for place, sample in samples:
        batch.append((place, sample))
        num_bytes += sample.student.pixel_values.nbytes + sample.teacher.pixel_values.nbytes
        if num_bytes > _MAX_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def greedy(processor: Processor, max_response_length: int) -> SamplingParams:
    """One most likely response of at most so many tokens."""
    return SamplingParams(
        temperature=0.0,
        max_response_length=max_response_length,
        end_token_ids=tuple(processor.end_token_ids),
        forbidden_token_ids=tuple(processor.forbidden_token_ids),
    )


def _answer(
    decoder: Decoder, processor: Processor, samples: list[Sample], params: SamplingParams
) -> Iterator[Reply | str]:
    """The reply to each sample; the id of one without an answer."""
    texts = []
    for views in ([s.student for s in samples], [s.teacher for s in samples]):
        responses = decoder(views, [s.id for s in samples], params)
        texts.append([processor.decode(answers[0][0]) for answers in responses])
    for sample, full, crop in zip(samples, *texts, strict=True):
        if sample.answer is None:
            yield sample.id
            continue
        kind, answer, options = classify(sample.question, sample.answer)
        right = [bool(grade(text, answer, kind, options)) for text in (full, crop)]
        yield Reply(sample.id, full, crop, *right)


def evaluate_directory(config: Config, groups: ProcessGroupCollection, limit: int | None = None) -> Gap:
    """`measure_gap` of the model in `config.model.hf_path` on the first `limit` samples of `config.data.path`."""
    processor = Processor.from_pretrained(config.model.hf_path)
    decoder = Decoder(build_vlm(config, groups), groups, config.rollout.max_batch_tokens)
    length = config.rollout.max_response_length
    return measure_gap(decoder, processor, config.data.path, config.data, groups, length, limit)
