"""Rectangles of flat ranges, and what is refused as checkpoint metadata."""

from __future__ import annotations

import pickle

import pytest
import torch

from nemo_vopd.mcore.sharded_state import _global_place, check_metadata, rectangles


@pytest.mark.parametrize("width", [1, 2, 5])
def test_rectangles_cover_a_flat_range_in_order_of_memory(width):
    total = 4 * width
    for start in range(total + 1):
        for length in range(total - start + 1):
            pieces = list(rectangles(start, length, width))
            assert len(pieces) <= 3
            visited = []
            for row, column, rows, columns in pieces:
                assert rows > 0 and 0 < columns <= width - column
                visited += [(row + i) * width + column + j for i in range(rows) for j in range(columns)]
            assert visited == list(range(start, start + length))


@pytest.mark.parametrize("split", ["replicated", "rows", "columns", "gated", "qkv"])
def test_places_put_the_whole_tensor_together(split):
    """The pieces of all ranks, written to their global places, give what splitting the tensor gave each rank."""
    size, rows, width = 2, 4, 3
    whole = torch.arange(float(rows * width * (1 if split == "replicated" else size)))
    whole = whole.view(-1, width * size if split == "columns" else width)
    for rank in range(size):
        local = {
            "replicated": lambda: whole,
            "columns": lambda rank=rank: whole.chunk(size, dim=1)[rank],
            "gated": lambda rank=rank: torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)]),
        }.get(split, lambda rank=rank: whole.chunk(size)[rank])()
        flat = local.reshape(-1)
        for start in range(flat.numel()):
            for length in range(1, flat.numel() - start + 1):
                offset = start
                for row, column, num, columns in rectangles(start, length, local.shape[1]):
                    for part, r, c in _global_place(row, column, num, tuple(local.shape), split, rank, size):
                        piece = flat[offset : offset + part * columns].view(part, columns)
                        assert torch.equal(piece, whole[r : r + part, c : c + columns])
                        offset += part * columns
                assert offset == start + length


class _Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def test_metadata_that_would_run_something_is_refused(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Payload(tmp_path / "ran")))
    with pytest.raises(pickle.UnpicklingError, match="open does not belong there"):
        check_metadata(tmp_path)
    assert not (tmp_path / "ran").exists()
