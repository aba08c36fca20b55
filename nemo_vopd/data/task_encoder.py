"""The Energon side: raw records in one global order, encoded into student and teacher prompts.

The order of prompts must not depend on how the model is parallelised. Every data-parallel rank therefore opens
the data set as if it were the only one, reads the same global batches of undecoded records, and decodes only its
slice. Reading the others' bytes costs little next to decoding, and loader state is the same on every rank.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron.energon import (
    Cooker,
    SavableDataLoader,
    TaskEncoder,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    get_val_dataset,
    stateless,
)
from megatron.energon import Sample as EnergonSample
from megatron.energon.errors import reraise_exception
from PIL import Image

from nemo_vopd.batch import DroppedSample, PromptBatch, Sample, View
from nemo_vopd.config import DataConfig
from nemo_vopd.data.blend import is_blend, read_blend
from nemo_vopd.data.loader_state import ByValuePickler
from nemo_vopd.data.processor import Processor
from nemo_vopd.data.records import check_answer, check_id, check_question
from nemo_vopd.data.views import UnusableSample, check_sides, crop_box, draw_box, load_image
from nemo_vopd.errors import OptionError

_MAX_CHARACTERS_PER_TOKEN = 32
"""No readable text has more on average; that of English is between four and five."""


@edataclass
class RawRecord(EnergonSample):
    """A record as it is stored: nothing decoded yet."""

    image: bytes | None
    crop: bytes | None
    meta: bytes | None


@stateless
def _cook(parts: dict) -> RawRecord:
    return RawRecord(
        **basic_sample_keys(parts), image=parts.get("image"), crop=parts.get("crop"), meta=parts.get("json")
    )


class EncodedBatch(PromptBatch):
    """A PromptBatch that crosses the process boundary by value.

    torch would hand each tensor over in a file descriptor of shared memory: hundreds for one batch, more than the
    usual limit of a process, in a /dev/shm that is small in containers.
    """

    def __reduce__(self):
        """Pickle the contents with tensors as plain arrays."""
        buffer = io.BytesIO()
        ByValuePickler(buffer, protocol=5).dump((self.samples, self.dropped))
        return _load_batch, (buffer.getvalue(),)


def _load_batch(data: bytes) -> EncodedBatch:
    return EncodedBatch(*pickle.loads(data))


@dataclass
class SampleEncoder:
    """Builds the two prompts of a record. `teacher_view`: crop | full | full_and_crop | boxed."""

    data: DataConfig
    teacher_view: str
    processor: Processor

    def __call__(self, record: RawRecord) -> Sample | DroppedSample:
        """The Sample of `record`, or why it cannot be used."""
        sample_id = record.__key__
        try:
            meta = parse_meta(record.meta)
            sample_id = check_id(meta.get("id", sample_id))
            if record.image is None:
                raise UnusableSample("missing_image")
            return self._encode(sample_id, meta, load_image(record.image), record.crop)
        except UnusableSample as unusable:
            return DroppedSample(sample_id, unusable.reason, unusable.detail)

    def _encode(self, sample_id: str, meta: dict, stored: Image.Image, crop: bytes | None) -> Sample:
        data, bbox = self.data, meta.get("bbox")
        # the hint belongs to the prompt, never to the emptiness check
        question = check_question(meta.get("question")) + data.question_hint
        if len(question) > _MAX_CHARACTERS_PER_TOKEN * data.max_prompt_length:  # before tokenizing it at great cost
            detail = f"{len(question)} characters, data.max_prompt_length={data.max_prompt_length}"
            raise UnusableSample("overlong_prompt", detail)
        full = draw_box(stored, _required(bbox)) if data.draw_box else stored
        student = self._view([full], question, [data.full])
        if self.teacher_view == "full":
            teacher = student
        elif self.teacher_view == "boxed":
            teacher = self._view([draw_box(stored, _required(bbox))], question, [data.full])
        else:
            evidence = load_image(crop) if crop is not None else cut_crop(stored, bbox, data)
            if self.teacher_view == "crop":
                teacher = self._view([evidence], question, [data.crop_pixels])
            else:
                teacher = self._view([full, evidence], question, [data.full, data.crop_pixels])
        return Sample(sample_id, student, teacher, question, check_answer(meta.get("answer")))

    def _view(self, images: list[Image.Image], question: str, pixels: list) -> View:
        view = self.processor.view(images, question, pixels)
        if view.num_tokens > self.data.max_prompt_length:
            detail = f"{view.num_tokens} tokens, data.max_prompt_length={self.data.max_prompt_length}"
            raise UnusableSample("overlong_prompt", detail)
        return view


def cut_crop(image: Image.Image, bbox: object, data: DataConfig) -> Image.Image:
    """The evidence-centred crop of `image` around `bbox`, by `data.crop`. Raises UnusableSample."""
    if bbox is None:
        raise UnusableSample("missing_crop", "neither bbox nor crop image")
    box = crop_box(bbox, image.size, **vars(data.crop), min_pixels=data.crop_pixels.min_pixels)
    check_sides(box[2] - box[0], box[3] - box[1])
    return image.crop(box)


def _required(bbox: object) -> object:
    if bbox is None:
        raise UnusableSample("missing_box", "the view shows the evidence box, and the record has none")
    return bbox


def parse_meta(data: bytes | None) -> dict:
    """The stored json of a record (id, question, bbox, answer), its fields unchecked. Raises UnusableSample."""
    try:
        meta = json.loads(data or b"null")
    except (ValueError, RecursionError) as error:
        raise UnusableSample("malformed_record", f"not JSON: {error}") from None
    if not isinstance(meta, dict):
        raise UnusableSample("malformed_record", "the stored json is no object")
    return meta


class _RawTaskEncoder(TaskEncoder):
    """Records as they are stored."""

    decoder = None
    cookers = [Cooker(_cook)]

    @stateless
    def encode_sample(self, sample: RawRecord) -> RawRecord:
        """The record itself."""
        return sample


class VisionOPDTaskEncoder(TaskEncoder):
    """Energon's hooks: keep records raw up to `batch`, then encode every dp_size-th one from dp_rank on."""

    decoder = None  # images stay bytes until it is known which rank needs them
    cookers = [Cooker(_cook)]

    def __init__(self, encode: SampleEncoder, dp_rank: int = 0, dp_size: int = 1) -> None:
        self.encode, self.dp_rank, self.dp_size = encode, dp_rank, dp_size

    @stateless
    def encode_sample(self, sample: RawRecord) -> RawRecord:
        """Records pass through: shuffling and batching work on raw bytes."""
        return sample

    @stateless
    def batch(self, samples: list[RawRecord]) -> EncodedBatch:
        """This rank's share of one global batch."""
        encoded = [self.encode(record) for record in samples[self.dp_rank :: self.dp_size]]
        return EncodedBatch(
            samples=[item for item in encoded if isinstance(item, Sample)],
            dropped=[item for item in encoded if isinstance(item, DroppedSample)],
        )


def build_train_loader(
    data: DataConfig, teacher_view: str, processor: Processor, *, seed: int, dp_rank: int, dp_size: int
) -> SavableDataLoader:
    """An endless, shuffled loader of PromptBatch: `data.batch_size / dp_size` records of each global batch.

    The order follows from `seed`, `data.num_workers`, `data.shuffle_buffer_size` and `data.batch_size`, not from
    dp_size. `save_state_rank()` and `restore_state_rank(state)` continue at the exact batch; the state is the same
    on every rank. `iter(loader).close()` before dropping a loader ends its workers at once; left to the garbage
    collector they take 5 s each.

    Raises OptionError when `data.path` is neither an Energon data set nor a blend (*.yaml) of some, the batch does not
    divide, or workers outnumber records.
    """
    if data.batch_size % dp_size:
        raise OptionError(
            "data.batch_size",
            data.batch_size,
            f"must be divisible by the data-parallel size {dp_size}",
            f"set it to a multiple of {dp_size}",
        )
    path = require_dataset(data.path)
    for part in _parts(path):
        # of a blend, a worker without records of one part would draw the others instead of it
        num_records = sum(_shard_counts(part).values())
        if data.num_workers > num_records:
            rule = f"must not exceed the {num_records} records of {part}: each worker reads its own share"
            raise OptionError("data.num_workers", data.num_workers, rule, f"set it to {num_records} or less")
    dataset = get_train_dataset(
        path,
        worker_config=_worker_config(data.num_workers, seed),
        batch_size=data.batch_size,
        shuffle_buffer_size=data.shuffle_buffer_size,
        max_samples_per_sequence=None,
        task_encoder=VisionOPDTaskEncoder(SampleEncoder(data, teacher_view, processor), dp_rank, dp_size),
    )
    return get_savable_loader(dataset)


def iterate_records(path: str | Path, limit: int | None = None) -> Iterator[RawRecord]:
    """The first `limit` records (default: all) of the Energon data set `path` in stored order, undecoded.

    Of a blend, one data set after the other, each record once whatever the weights.
    Raises OptionError (data.path) at the first item when `path` is no Energon data set.
    """
    for part in _parts(require_dataset(path)):
        dataset = get_val_dataset(
            part,
            split_part="train",  # an Energon split, of which prepare.py writes one
            worker_config=_worker_config(num_workers=0, seed=0),
            batch_size=None,  # type: ignore[arg-type]
            task_encoder=_RawTaskEncoder(),
        )
        # no forced garbage collection: Energon's every ten batches is every ten records here, and takes longer than
        # they do
        for record in islice(get_savable_loader(dataset, gc_collect_every_n_steps=0), limit):
            yield record
            limit = None if limit is None else limit - 1


def iterate_samples(
    path: str | Path,
    data: DataConfig,
    teacher_view: str,
    processor: Processor,
    limit: int | None = None,
    *,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Iterator[Sample | DroppedSample]:
    """Every `dp_size`-th of the first `limit` records (default: all) of `path`, from `dp_rank` on, for evaluation.

    Views follow `data` and `teacher_view`; `data.path` is not used. Raises OptionError as `iterate_records` does.
    """
    encode = SampleEncoder(data, teacher_view, processor)
    yield from map(encode, islice(iterate_records(path, limit), dp_rank, None, dp_size))


def _worker_config(num_workers: int, seed: int) -> WorkerConfig:
    return WorkerConfig(
        rank=0,
        world_size=1,
        num_workers=num_workers,
        seed_offset=seed,
        # Unusable records are counted in `batch`; anything that still raises is a bug. Energon would log it and
        # skip the batch on this rank alone, and ranks would train on different steps from then on.
        global_error_handler=reraise_exception,
    )


def require_dataset(path: str | Path, option: str = "data.path") -> Path:
    """`path`, if it is an Energon data set with all of its shards, or a blend (*.yaml) of such ones.

    Raises OptionError naming `option`.
    """
    if is_blend(path):
        for part, _ in read_blend(path, option):
            _require_folder(part, option)
        return Path(path)
    return _require_folder(Path(path), option)


def _require_folder(folder: Path, option: str) -> Path:
    remedy = "make one with python recipes/prepare_data.py source=FILE.jsonl output=DIRECTORY"
    if not (folder / ".nv-meta" / "dataset.yaml").is_file() or not (folder / ".nv-meta" / ".info.json").is_file():
        rule, inside = "is not an Energon data set (no .nv-meta)", [folder / "blend.yaml", folder / "train"]
        for place in inside:
            if place.exists():  # what prepare_data.py makes of several sources, or with validation_fraction
                raise OptionError(option, folder, rule, f"give {option}={place}")
        raise OptionError(option, folder, rule, remedy)
    try:
        missing = [name for name in _shard_counts(folder) if not (folder / name).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OptionError(option, folder, "is damaged (.nv-meta/.info.json)", remedy) from None
    if missing:
        raise OptionError(option, folder, f"lacks {missing[0]} ({len(missing)} shards in all)", "copy it again in full")
    return folder


def _parts(path: Path) -> list[Path]:
    """The data sets of a blend, or the data set itself."""
    return [part for part, _ in read_blend(path)] if is_blend(path) else [path]


def fingerprint(path: str | Path) -> str:
    """What tells the data set (or blend) `path` from others and is the same for its copies.

    Shards and their sizes; of a blend, those of its parts and their weights.
    """
    if is_blend(path):
        parts = [[fingerprint(part), weight] for part, weight in read_blend(path)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    index = (Path(path) / ".nv-meta" / ".info.json").read_bytes()
    shards = json.loads(index)["shard_counts"]
    sizes = {name: (Path(path) / name).stat().st_size for name in shards}
    return hashlib.sha256(index + json.dumps(sizes, sort_keys=True).encode()).hexdigest()


def _shard_counts(folder: Path) -> dict[str, int]:
    """Records of each shard file, as Energon's index has them."""
    return json.loads((folder / ".nv-meta" / ".info.json").read_text())["shard_counts"]
