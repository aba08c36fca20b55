"""The exact position of an Energon loader, as bytes that are safe to read back."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import torch
from megatron.energon import SavableDataLoader

from nemo_vopd import safe_pickle

_ENERGON = "megatron.energon"
_ALLOWED = {
    (f"{_ENERGON}.savable_loader", "SavableDataLoaderState"),
    (f"{_ENERGON}.savable_loader", "SavableDatasetCheckpoint"),
    (f"{_ENERGON}.savable_loader", "SavableDatasetState"),
    (f"{_ENERGON}.rng", "SystemRngState"),
    (f"{_ENERGON}.state", "FlexState"),
    (f"{_ENERGON}.flavors.webdataset.sample_loader", "SliceState"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    (__name__, "as_tensor"),
}


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """The tensor that was pickled as `array`."""
    return torch.from_numpy(array)


class ByValuePickler(pickle.Pickler):
    """Tensors as plain arrays: no shared memory, no reader of its own."""

    def reducer_override(self, obj: object):
        """Replace tensors."""
        return (as_tensor, (obj.numpy(),)) if isinstance(obj, torch.Tensor) else NotImplemented


def save_position(loader: SavableDataLoader) -> bytes:
    """Where `loader` stands, prefetched samples and shuffle buffers of its workers included."""
    buffer = io.BytesIO()
    ByValuePickler(buffer, protocol=4).dump(loader.save_state_rank())
    return buffer.getvalue()


def read_position(position: bytes) -> Any:
    """What `loader.restore_state_rank` takes, from `save_position` of a loader of the same options and data.

    Raises pickle.UnpicklingError when `position` holds anything but the state of a loader.
    """
    return safe_pickle.loads(position, _ALLOWED)
