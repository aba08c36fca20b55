"""What the notes of all chunks add up to."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from nemo_vopd.tools.prepare.intake import Prepared
from nemo_vopd.views import UnusableSample

MEGAPIXEL_EDGES = (0, 0.01, 0.03, 0.1, 0.3, 1, 2, 4, 8, 16, 32, 100)
AREA_EDGES = (0, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


@dataclass
class Statistics:
    """What was kept, dropped and measured: in one chunk, in a source, or in several."""

    shards: dict[str, list[dict]] = field(default_factory=dict)
    """Split -> entries of `ShardWriter.finish`."""
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """Reason -> the first record that was dropped for it."""
    having: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("answer", "box", "crop", "hint"), 0))
    """Number of records with each of these."""
    megapixels: array[float] = field(default_factory=lambda: array("d"))
    relative_area: array[float] = field(default_factory=lambda: array("d"))
    largest_coordinate: float = 0.0
    """Largest coordinate of all boxes, in pixels."""

    @property
    def kept(self) -> int:
        """Records that were stored."""
        return sum(self.splits().values())

    def splits(self) -> dict[str, int]:
        """Records of each split."""
        return {name: sum(entry["records"] for entry in entries) for name, entries in sorted(self.shards.items())}

    def drop(self, place: str, unusable: UnusableSample) -> None:
        """Count the record at `place`, which cannot be used."""
        self.dropped[unusable.reason] += 1
        self.examples.setdefault(unusable.reason, f"{place}: {unusable.detail or unusable.reason}"[:200])

    def keep(self, record: Prepared) -> None:
        """Count a record that is stored."""
        self.having["answer"] += record.answer is not None
        self.having["box"] += record.bbox is not None
        self.having["crop"] += record.crop is not None
        self.having["hint"] += record.hinted
        self.megapixels.append(float(f"{record.size[0] * record.size[1] / 1e6:.6g}"))
        area = record.relative_area()
        if area is not None and record.bbox is not None:
            self.relative_area.append(float(f"{area:.6g}"))
            self.largest_coordinate = min(1e6, max(self.largest_coordinate, *record.bbox))

    def add(self, later: Statistics) -> None:
        """Add what comes later in the order of the records: of the examples, the earlier ones stay."""
        for split, entries in later.shards.items():
            self.shards.setdefault(split, []).extend(entries)
        self.dropped.update(later.dropped)
        self.examples = {**later.examples, **self.examples}
        self.having = {name: count + later.having[name] for name, count in self.having.items()}
        self.megapixels.extend(later.megapixels)
        self.relative_area.extend(later.relative_area)
        self.largest_coordinate = max(self.largest_coordinate, later.largest_coordinate)

    def to_json(self) -> str:
        """The note of a chunk."""
        return json.dumps(vars(self), default=list)


def total(parts: Iterable[Statistics]) -> Statistics:
    """The sum of `parts`, given in order."""
    whole = Statistics()
    for part in parts:
        whole.add(part)
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
