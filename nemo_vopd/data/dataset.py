"""Energon data sets as storage: any record by its number, undecoded.

Preparation writes Energon's webdataset format (tar files, an index of byte offsets, `.nv-meta`), and Energon's own
reader fetches records from it. The files that could name code to run (`.nv-meta/dataset.yaml`) are never loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta

from nemo_vopd.batch import RecordKey
from nemo_vopd.data.blend import is_blend, read_blend
from nemo_vopd.errors import OptionError, printable

_REMEDY = "make one with python recipes/prepare_data.py source=FILE.jsonl output=DIRECTORY"
_OPEN_SHARDS = 16
"""Tar files of one data set that a process keeps open."""


@dataclass
class RawRecord:
    """A record as it is stored: nothing decoded yet."""

    key: RecordKey
    name: str
    """Its name in the shard."""
    image: bytes | None
    crop: bytes | None
    meta: bytes | None
    """JSON: id, question, bbox, answer."""


class Records:
    """The records of a data set, or of all data sets of a blend."""

    def __init__(self, path: str | Path) -> None:
        """Open `path` for reading. Raises OptionError (data.path) when it is no complete data set."""
        parts = read_blend(require_dataset(path)) if is_blend(path) else [(require_dataset(path), 1.0)]
        self.weights = [weight for _, weight in parts]
        self._readers = [_open(folder) for folder, _ in parts]

    @property
    def sizes(self) -> list[int]:
        """Number of records of each data set."""
        return [len(reader) for reader in self._readers]

    def __getitem__(self, key: RecordKey) -> RawRecord:
        """Read one record from its shard."""
        parts: dict[str, Any] = dict(self._readers[key.data_set][key.record])  # type: ignore[arg-type]
        return RawRecord(key, parts["__key__"], parts.get("image"), parts.get("crop"), parts.get("json"))


def _open(folder: Path) -> ShardInfosITarReader:
    path = EPath(folder.absolute())
    try:
        # preparation makes one Energon split, named train, also of the records it keeps for validation
        meta = WebdatasetMeta.from_config(path, split_part="train")
    except Exception as error:  # Energon has an error of its own for each field
        rule = f"is damaged (.nv-meta/split.yaml or .info.json: {printable(error)[:200]})"
        raise OptionError("data.path", folder, rule, _REMEDY) from None
    if meta.sample_excludes:
        rule = f"leaves out single records ({min(meta.sample_excludes)}) in .nv-meta/split.yaml, which is not supported"
        raise OptionError("data.path", folder, rule, "prepare the data set again without these records")
    return ShardInfosITarReader(path, meta.shards, itar_cache_size=_OPEN_SHARDS)


def iterate_records(path: str | Path, limit: int | None = None) -> Iterator[RawRecord]:
    """The first `limit` records (default: all) of the data set `path` in stored order.

    A blend gives one data set after the other, each record once whatever the weights.
    Raises OptionError (data.path) at the first item when `path` is no Energon data set.
    """
    records = Records(path)
    keys = (RecordKey(number, record) for number, size in enumerate(records.sizes) for record in range(size))
    yield from map(records.__getitem__, islice(keys, limit))


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
    if not (folder / ".nv-meta" / "dataset.yaml").is_file() or not (folder / ".nv-meta" / ".info.json").is_file():
        rule, inside = "is not an Energon data set (no .nv-meta)", [folder / "blend.yaml", folder / "train"]
        for place in inside:
            if place.exists():  # what prepare_data.py makes of several sources, or with validation_fraction
                raise OptionError(option, folder, rule, f"give {option}={place}")
        raise OptionError(option, folder, rule, _REMEDY)
    try:
        counts = _shard_counts(folder)
        missing = [name for name in counts if not (folder / name).is_file()]
        empty = not sum(counts.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OptionError(option, folder, "is damaged (.nv-meta/.info.json)", _REMEDY) from None
    if missing:
        raise OptionError(option, folder, f"lacks {missing[0]} ({len(missing)} shards in all)", "copy it again in full")
    if empty:
        raise OptionError(option, folder, "holds no records", _REMEDY)
    return folder


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
