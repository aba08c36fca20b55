"""Float32 state as Megatron's distributed checkpoint (torch_dist), readable under any other layout.

Every data-parallel rank owns a flat range of each parameter. Such a range is at most three rectangles of the
parameter, and rectangles are what the format stores: each rank writes its own memory where it lies, nothing is
gathered, and a reader with other sizes of parallelism asks for other rectangles of the same global tensors.
(Megatron's own `fully_reshardable` gathers each data-parallel group's state on every rank before it writes.)
"""

from __future__ import annotations

import pickle
import queue
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_vopd.mcore import safe_pickle
from nemo_vopd.mcore.stage import Stage

Shards = dict[str, tuple[Tensor, int]]
"""Parameter name -> (this rank's flat float32 elements, where they start within the parameter)."""


def rectangles(start: int, length: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row, first column, rows, columns) that cover elements [start, start + length) of a [*, width] matrix.

    In order of memory, so that consecutive elements fill one rectangle after the other.
    """
    end = start + length
    while start < end:
        row, column = divmod(start, width)
        if column or end - start < width:
            columns = min(width - column, end - start)
            yield row, column, 1, columns
            start += columns
        else:
            rows = (end - start) // width
            yield row, 0, rows, width
            start += rows * width


def _global_place(
    row: int, column: int, rows: int, shape: tuple[int, int], split: str, rank: int, size: int
) -> Iterator[tuple[int, int, int]]:
    """(rows of the piece, global row, global column) of a local rectangle of `rows` rows in a local `shape`."""
    if split == "replicated":
        yield rows, row, column
    elif split == "columns":
        yield rows, row, column + rank * shape[1]
    elif split == "gated":  # gate rows of all ranks first, then up rows of all ranks
        half = shape[0] // 2
        in_gate = max(0, min(rows, half - row))
        if in_gate:
            yield in_gate, rank * half + row, column
        if rows > in_gate:
            yield rows - in_gate, (size + rank) * half + row + in_gate - half, column
    else:  # rows, and query groups one after the other
        yield rows, rank * shape[0] + row, column


def sharded_state(
    kinds: dict[str, Shards], stage: Stage, groups: ProcessGroupCollection
) -> dict[str, dict[int, ShardedTensor]]:
    """Megatron's description of all `kinds` of state: `<kind>.<canonical tensor name>` -> pieces on this rank.

    The pieces are views of the shards: saving reads and loading fills them. Tensors are stored as matrices
    [first dimension, all others], query-key-value and gate-up as one, as Megatron fuses them.
    """
    rank, size = groups.tp.rank(), groups.tp.size()
    result: dict[str, dict[int, ShardedTensor]] = {}
    parameters = dict(stage.named_parameters())
    for kind, shards in kinds.items():
        for name, (flat, start) in shards.items():
            rule, shape = stage.weight_rule(name), parameters[name].shape
            local = shape[0], parameters[name].numel() // shape[0]
            times = {"replicated": (1, 1), "columns": (1, size)}.get(rule.split, (size, 1))
            whole = rule.num_rows or local[0] * times[0], local[1] * times[1]
            # copies are read by all and written by one: over tensor parallelism, and of a tied head
            replica = int(not rule.export or (rule.split == "replicated" and rank > 0))
            pieces = result.setdefault(f"{kind}.{rule.names[0]}", {})
            offset = 0
            for row, column, rows, columns in rectangles(start, flat.numel(), local[1]):
                for part, global_row, global_column in _global_place(row, column, rows, local, rule.split, rank, size):
                    data = flat[offset : offset + part * columns].view(part, columns)
                    offset += part * columns
                    data = data[: max(0, whole[0] - global_row)]  # rows that only fill a shard up are not stored
                    if data.numel():
                        key, place = f"{kind}.{rule.names[0]}", (global_row, global_column)
                        pieces[len(pieces)] = ShardedTensor(
                            key, data, data.dtype, tuple(data.shape), whole, place, None, replica_id=replica
                        )
    return result


def save_request(kinds: dict[str, Shards], stage: Stage, groups: ProcessGroupCollection, folder: Path) -> AsyncRequest:
    """Plan the save of `kinds` into the existing, empty `folder`; every rank calls it.

    `execute_sync()` of the result writes at once; Megatron's AsyncCallsQueue writes it in the background.
    """
    filesystem_async._results_queue = _ResultsFile()  # type: ignore[assignment]
    state = sharded_state(kinds, stage, groups)
    # coverage without overlap is checked by the planner (for every rectangle, on rank 0)
    request = dist_checkpointing.save(
        state, str(folder), validate_access_integrity=False, async_sharded_save=True, async_strategy="mcore"
    )
    assert request is not None
    return request


class _ResultsFile:
    """How the writer process tells this one what it wrote: through a private temporary file.

    Megatron uses the queue of a manager process, which takes seconds to spawn, imports the user's main module again
    and outlives a killed rank.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="nemo_vopd-")
        self._file = Path(self._folder.name) / "results"

    def put(self, results: object) -> None:
        """Called once, by the writer."""
        self._file.write_bytes(pickle.dumps(results))

    def get_nowait(self) -> object:
        """Called once the writer has ended."""
        if not self._file.exists():
            raise queue.Empty
        results = pickle.loads(self._file.read_bytes())
        self._folder.cleanup()
        return results


@torch.no_grad()
def load(kinds: dict[str, Shards], stage: Stage, groups: ProcessGroupCollection, folder: Path) -> None:
    """Fill the shards of `kinds` from the checkpoint in `folder`; every rank calls it.

    Raises KeyError or megatron's CheckpointingException when tensors are missing or have other sizes.
    """
    state = sharded_state(kinds, stage, groups)
    targets: Any = {key: {i: piece.data for i, piece in pieces.items()} for key, pieces in state.items()}
    loaded: Any = dist_checkpointing.load(state, str(folder), validate_access_integrity=False)
    for key, pieces in targets.items():
        for i, target in pieces.items():
            if target.data_ptr() != loaded[key][i].data_ptr():
                target.copy_(loaded[key][i])


def check_metadata(folder: Path) -> None:
    """Read the one pickled file of the format with a reader that cannot run code.

    Raises pickle.UnpicklingError when it names anything but metadata, or is damaged.
    """
    safe_pickle.loads((folder / ".metadata").read_bytes(), _METADATA)


_CHECKPOINT = "torch.distributed.checkpoint"
_METADATA = {
    *((f"{_CHECKPOINT}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_CHECKPOINT}.metadata", name) for name in ("ChunkStorageMetadata", "TensorStorageMetadata")),
    *((f"{_CHECKPOINT}.metadata", name) for name in ("BytesStorageMetadata", "_MEM_FORMAT_ENCODING")),
    *((f"{_CHECKPOINT}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch.serialization", "_get_layout"),
}
