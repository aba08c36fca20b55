"""The prompts of a run: each data-parallel rank reads and decodes its own share of every global batch."""

from __future__ import annotations

import faulthandler
import io
import pickle
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader

from nemo_vopd.batch import DroppedSample, PromptBatch, RecordKey, Sample
from nemo_vopd.config import DataConfig
from nemo_vopd.data.dataset import Records
from nemo_vopd.data.encoder import SampleEncoder
from nemo_vopd.data.order import Order
from nemo_vopd.data.processor import Processor
from nemo_vopd.errors import OptionError, RunError
from nemo_vopd.watchdog import beat


class PromptLoader(Iterator[PromptBatch]):
    """An endless iterator over the prompts of one data-parallel rank, one batch for each optimizer step.

    `position` is its whole state: the number of prompts of all ranks that lie before the next batch.
    """

    def __init__(self, batches: DataLoader, batch_size: int, position: int) -> None:
        """`batches` yields this rank's share of global batches of `batch_size` prompts, from `position` on."""
        self._batches: Iterator[PromptBatch] = iter(batches)
        self._timeout_seconds = batches.timeout
        self.batch_size, self.position = batch_size, position
        self._peeked: PromptBatch | None = None

    def __next__(self) -> PromptBatch:
        """The batch of the next step."""
        batch, self._peeked = self.peek(), None
        self.position += self.batch_size
        return batch

    def peek(self) -> PromptBatch:
        """The batch that `next` will give."""
        if self._peeked is None:
            try:
                self._peeked = next(self._batches)
            except RuntimeError as error:
                if "DataLoader timed out" not in str(error):
                    raise
                beat()  # taking the run down waits for those processes once more before the error is told
                faulthandler.dump_traceback()
                what = f"the loader's processes gave no batch within {self._timeout_seconds:g} seconds"
                remedy = "see whether the storage of data.path answers, or raise parallel.timeout_minutes"
                raise RunError(f"{what} (parallel.timeout_minutes); {remedy}") from None
        return self._peeked

    def close(self) -> None:
        """End the loader's processes."""
        self._batches = iter(())  # torch ends them when it loses the last reference to the iterator


def build_train_loader(
    data: DataConfig,
    teacher_view: str,
    processor: Processor,
    *,
    seed: int,
    dp_rank: int,
    dp_size: int,
    position: int = 0,
    timeout_seconds: float = 600.0,
) -> PromptLoader:
    """The loader of rank `dp_rank`: `data.batch_size / dp_size` prompts of each global batch, from `position` on.

    A batch for which its processes need longer than `timeout_seconds` ends the run. The global order follows from
    `seed` and the data sets alone (`nemo_vopd.data.order`).

    Raises OptionError when `data.path` is neither an Energon data set nor a blend (*.yaml) of some, or the batch does
    not divide.
    """
    if data.batch_size % dp_size:
        raise OptionError(
            "data.batch_size",
            data.batch_size,
            f"must be divisible by the data-parallel size {dp_size}",
            f"set it to a multiple of {dp_size}",
        )
    records = Records(data.path)
    order = Order(records.sizes, records.weights, seed)
    batches = DataLoader(
        _Prompts(records, SampleEncoder(data, teacher_view, processor)),  # type: ignore[arg-type]
        batch_sampler=_Share(order, position, data.batch_size, dp_rank, dp_size),  # type: ignore[arg-type]
        collate_fn=_as_it_is,  # type: ignore[arg-type]
        num_workers=data.num_workers,
        multiprocessing_context="fork" if data.num_workers else None,
        timeout=timeout_seconds if data.num_workers else 0,  # else this process reads, and the watchdog ends it
        generator=torch.Generator(),  # the iterator draws a seed, which must not come from the global generator
    )
    return PromptLoader(batches, data.batch_size, position)


class _Share:
    """The keys of one rank's records in each global batch, without end."""

    def __init__(self, order: Order, position: int, batch_size: int, dp_rank: int, dp_size: int) -> None:
        self._order, self._position, self._batch_size = order, position, batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size

    def __iter__(self) -> Iterator[list[RecordKey]]:
        start = self._position
        while True:
            end = start + self._batch_size
            yield [self._order[place] for place in range(start + self._dp_rank, end, self._dp_size)]
            start = end


class _Prompts:
    """What a loader process does with the keys of a batch."""

    def __init__(self, records: Records, encode: SampleEncoder) -> None:
        self._records, self._encode = records, encode

    def __getitems__(self, keys: list[RecordKey]) -> PromptBatch:
        encoded = [self._encode(self._records[key]) for key in keys]
        return EncodedBatch(
            samples=[item for item in encoded if isinstance(item, Sample)],
            dropped=[item for item in encoded if isinstance(item, DroppedSample)],
        )


def _as_it_is(batch: PromptBatch) -> PromptBatch:
    return batch


class EncodedBatch(PromptBatch):
    """A PromptBatch that crosses the process boundary by value.

    torch would hand each tensor over in a file descriptor of shared memory: hundreds for one batch, more than the
    usual limit of a process, in a /dev/shm that is small in containers.
    """

    def __reduce__(self):
        """Pickle the contents with tensors as plain arrays."""
        buffer = io.BytesIO()
        _ByValuePickler(buffer, protocol=5).dump((self.samples, self.dropped))
        return _load_batch, (buffer.getvalue(),)


def _load_batch(data: bytes) -> EncodedBatch:
    return EncodedBatch(*pickle.loads(data))


class _ByValuePickler(pickle.Pickler):
    def reducer_override(self, obj: object):
        return (_as_tensor, (obj.numpy(),)) if isinstance(obj, torch.Tensor) else NotImplemented


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)
