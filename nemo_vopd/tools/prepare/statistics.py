"""What the notes of all chunks add up to."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MEGAPIXEL_EDGES = (0, 0.01, 0.03, 0.1, 0.3, 1, 2, 4, 8, 16, 32, 100)
AREA_EDGES = (0, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


@dataclass
class Statistics:
    """Of one source or of several."""

    shards: dict[str, list[dict]] = field(default_factory=dict)
    """Split -> entries of `ShardWriter.finish`."""
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """Reason -> the first record that was dropped for it."""
    with_answer: int = 0
    with_box: int = 0
    with_crop: int = 0
    with_hint: int = 0
    megapixels: array[float] = field(default_factory=lambda: array("d"))
    relative_area: array[float] = field(default_factory=lambda: array("d"))
    largest_coordinate: float = 0.0
    """Of all boxes, in pixels."""

    @property
    def kept(self) -> int:
        """Records that were stored."""
        return sum(self.splits().values())

    def splits(self) -> dict[str, int]:
        """Records of each split."""
        return {name: sum(entry["records"] for entry in entries) for name, entries in sorted(self.shards.items())}

    def add(self, note: dict) -> None:
        """Count what the note of one chunk says; chunks come in order."""
        for split, entry in note["shards"].items():
            self.shards.setdefault(split, []).append(entry)
        self.dropped.update(note["dropped"])
        for reason, example in note["examples"].items():
            self.examples.setdefault(reason, example)
        for name in ("with_answer", "with_box", "with_crop", "with_hint"):
            setattr(self, name, getattr(self, name) + note[name])
        self.megapixels.extend(note["megapixels"])
        self.relative_area.extend(note["relative_area"])
        self.largest_coordinate = max(self.largest_coordinate, note["largest_coordinate"])


def gather(notes: Iterable[Path]) -> Statistics:
    """The sum of the `notes`, given in order."""
    statistics = Statistics()
    for note in notes:
        statistics.add(json.loads(note.read_bytes()))
    return statistics


def total(parts: Sequence[Statistics]) -> Statistics:
    """The sum over sources; examples are the first source's that has one."""
    whole = Statistics()
    for part in parts:
        for split, entries in part.shards.items():
            whole.shards.setdefault(split, []).extend(entries)
        whole.dropped.update(part.dropped)
        whole.examples = {**part.examples, **whole.examples}
        for name in ("with_answer", "with_box", "with_crop", "with_hint"):
            setattr(whole, name, getattr(whole, name) + getattr(part, name))
        whole.megapixels.extend(part.megapixels)
        whole.relative_area.extend(part.relative_area)
        whole.largest_coordinate = max(whole.largest_coordinate, part.largest_coordinate)
    return whole


def histogram(values: Sequence[float], edges: Sequence[float]) -> dict:
    """{"edges": [n + 1], "counts": [n], "median": number or null}; empty bins at both ends are left out."""
    if not values:
        return {"edges": [], "counts": [], "median": None}
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), np.array(edges, dtype=float))
    used = np.flatnonzero(counts)
    low, high = int(used[0]), int(used[-1]) + 1
    median = float(f"{np.median(values):.6g}")
    return {"edges": list(edges[low : high + 1]), "counts": counts[low:high].tolist(), "median": median}
