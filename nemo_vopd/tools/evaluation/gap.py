"""The regional-to-global gap: greedy accuracy on the crop view less that on the full view, while training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_vopd.batch import DroppedSample, Sample, View
from nemo_vopd.config import DataConfig
from nemo_vopd.data.dataset import require_dataset
from nemo_vopd.data.encoder import iterate_samples
from nemo_vopd.data.processor import Processor
from nemo_vopd.errors import OptionError, RunError
from nemo_vopd.mcore import parallel
from nemo_vopd.rollout.engine import SamplingParams
from nemo_vopd.rollout.native.engine import Decoder
from nemo_vopd.tools.evaluation.questions import classify, grade

_MAX_BYTES = 1 << 30
"""Bytes of images that a rank holds at a time, both views together: some forty samples of a million pixels."""

Response = tuple[Tensor, Tensor]


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
    """The replies to the samples, in stored order, and accuracies in [0, 1] over all of them."""

    replies: list[Reply]

    @property
    def full_accuracy(self) -> float:
        """Share of the samples that are answered rightly from the full view."""
        return sum(reply.full_correct for reply in self.replies) / len(self.replies)

    @property
    def crop_accuracy(self) -> float:
        """Share of the samples that are answered rightly from the crop."""
        return sum(reply.crop_correct for reply in self.replies) / len(self.replies)

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

    Data-parallel ranks share the samples, a few in memory at a time; every rank returns the whole result. Raises
    OptionError, naming `option`, on every rank when no sample can be used; those without an answer are left out.
    """
    require_dataset(path, option)
    group, params = groups.dp_cp, greedy(processor, max_response_length)
    # the place of a sample among all records keeps the order of the data set whatever the number of ranks
    stream = iterate_samples(path, data, "crop", processor, limit, dp_rank=group.rank(), dp_size=group.size())
    mine: list[tuple[int, Reply | str]] = []
    for some in _batches(stream):
        names, texts = [sample.id for sample in some.values()], []
        for views in ([sample.student for sample in some.values()], [sample.teacher for sample in some.values()]):
            texts.append([processor.decode(ids) for ids, _ in answers(decoder, views, names, params)])
        for (place, sample), full, crop in zip(some.items(), *texts, strict=True):
            mine.append((place * group.size() + group.rank(), _graded(sample, full, crop)))
    found = dict(parallel.gather_all(mine, group))
    replies = [found[place] for place in sorted(found) if isinstance(found[place], Reply)]
    if not replies:
        raise OptionError(option, path, "holds no usable sample with an answer", "evaluate on a data set with answers")
    if len(replies) < len(found) and parallel.is_rank_zero():
        print(f"{option}={path}: {len(found) - len(replies)} samples without an answer are left out", flush=True)
    return Gap(replies)


def answers(decoder: Decoder, views: list[View], names: list[str], params: SamplingParams) -> list[Response]:
    """The first answer (token_ids [R], log_probs [R]) to each view. Raises RunError where a number is not finite."""
    first = [responses[0] for responses in decoder(views, names, params)]
    for name, (_, log_probs) in zip(names, first, strict=True):
        if not log_probs.isfinite().all():
            what = f"the model's probabilities for {name} are not finite: its weights overflow in this number format"
            raise RunError(f"{what}; try precision.dtype=fp32, or export the model from an earlier checkpoint")
    return first


def _batches(stream: Iterable[Sample | DroppedSample]) -> Iterator[dict[int, Sample]]:
    """The usable samples of `stream` by their place in it, as many at a time as may be in memory."""
    batch, num_bytes = {}, 0
    for place, sample in enumerate(stream):
        if isinstance(sample, DroppedSample):
            continue
        batch[place] = sample
        num_bytes += sample.student.pixel_values.nbytes + sample.teacher.pixel_values.nbytes
        if num_bytes > _MAX_BYTES:
            yield batch
            batch, num_bytes = {}, 0
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


def _graded(sample: Sample, full: str, crop: str) -> Reply | str:
    """The replies to a sample; its id where it has no answer to compare with."""
    if not sample.answers:
        return sample.id
    kind, accepted, options = classify(sample.question, sample.answers)
    full_correct, crop_correct = (bool(grade(text, accepted, kind, options)) for text in (full, crop))
    return Reply(sample.id, full, crop, full_correct, crop_correct)
