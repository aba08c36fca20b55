"""Energon's index of a folder of shards, and a manifest by which damage is found later."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from nemo_vopd.data.blend import read_blend
from nemo_vopd.errors import OptionError

MANIFEST = "manifest.json"
META = ".nv-meta"
_DATASET_YAML = "__module__: megatron.energon\n__class__: CrudeWebdataset\nsubflavors:\n  nemo_vopd: 1\n"


def load_energon() -> None:
    """Import what `write_index` needs (torch comes with it: seconds), for a thread that has time for it."""
    import megatron.energon.flavors.webdataset.prepare  # noqa: F401


def write_index(folder: Path, *, progress: bool = False) -> None:
    """Energon's index of the shards in `folder`; the same shards give the same files, byte for byte."""
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator  # imports torch

    shards = sorted(path.name for path in folder.glob("shard-*.tar"))
    for left_over in [*folder.glob("shard-*.idx*"), *folder.glob(META)]:
        shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()

    def bar(items: Iterator, total: int) -> Iterator:
        return iter(tqdm(items, total=total, desc="index", disable=not progress, leave=False))

    with contextlib.redirect_stdout(io.StringIO()):  # Energon's own progress notes
        WebdatasetPreparator.prepare_dataset(
            folder,
            shards,
            split_parts_ratio=[("train", 1.0)],
            shuffle_seed=None,
            progress_fn=bar,
            workers=1,  # several would write their rows in the order in which they get through
        )
    meta = folder / META
    (meta / "dataset.yaml").write_text(_DATASET_YAML)
    # Energon draws one at random
    digest = hashlib.sha256((meta / ".info.json").read_bytes()).digest()
    (meta / "index.uuid").write_text(str(uuid.UUID(bytes=digest[:16], version=4)))


def write_manifest(folder: Path, shards: list[dict], source: str) -> None:
    """Note what `verify` compares with. `shards`: entries of `Statistics.shards`."""
    names = sorted(path.relative_to(folder).as_posix() for path in [*folder.glob("*.idx"), *folder.glob(f"{META}/*")])
    entries = {entry["shard"]: {key: entry[key] for key in ("records", "bytes", "sha256")} for entry in shards}
    index = {name: sha256(folder / name) for name in names}
    text = json.dumps({"format": 1, "source": source, "shards": entries, "index": index}, indent=1)
    (folder / MANIFEST).write_text(text + "\n")


def sha256(path: Path) -> str:
    """Hash of a file's contents, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path, *, workers: int = 4, progress: bool = True) -> dict[str, int]:
    """Compare every prepared data set in `folder` with its manifest: each file's contents, counts, Energon's index.

    Returns {"data_sets", "shards", "records", "bytes"}. Raises OptionError (verify) naming the first file that is
    damaged, and how many there are.
    """
    parts = [folder] if (folder / MANIFEST).is_file() else []
    for name in _parts_of_card(folder):
        if not (folder / name / MANIFEST).is_file():
            raise OptionError("verify", folder, f"lacks {name}/{MANIFEST}", "copy the data set again in full")
        parts.append(folder / name)
    if not parts:
        rule = f"is no prepared data set (no {MANIFEST})"
        raise OptionError("verify", folder, rule, "give the output folder of prepare_data.py")
    problems = [
        f"{blend.name} names {part.relative_to(folder)}, which is missing"
        for blend in sorted(folder.glob("*.yaml"))
        for part, _ in read_blend(blend, "verify")
        if not (part / MANIFEST).is_file()
    ]
    totals = {"data_sets": len(parts), "shards": 0, "records": 0, "bytes": 0}
    for part in parts:
        where = "" if part == folder else f"{part.relative_to(folder).as_posix()}/"
        problems += [f"{where}{problem}" for problem in _problems(part, totals, workers, progress)]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise OptionError("verify", folder, problems[0] + more, "copy the data set again or prepare it anew")
    return totals


def _parts_of_card(folder: Path) -> list[str]:
    card = folder / "data_card.json"
    try:
        return [part for part in json.loads(card.read_bytes())["parts"] if part != "."] if card.is_file() else []
    except (ValueError, KeyError, TypeError):
        raise OptionError("verify", folder, "data_card.json is damaged", "copy the data set again") from None


def _problems(folder: Path, totals: dict[str, int], workers: int, progress: bool) -> Iterator[str]:
    """What is wrong with the data set `folder`, beginning with a file's name; its numbers are added to `totals`."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        shards = {name: (int(one["records"]), int(one["bytes"])) for name, one in manifest["shards"].items()}
        digests = {**manifest["index"], **{name: one["sha256"] for name, one in manifest["shards"].items()}}
    except (ValueError, KeyError, TypeError, AttributeError):
        yield f"{MANIFEST} is damaged"
        return
    counts = {name: records for name, (records, _) in shards.items()}
    totals["shards"] += len(shards)
    totals["records"] += sum(counts.values())
    totals["bytes"] += sum(num_bytes for _, num_bytes in shards.values())

    def check(name: str) -> str | None:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if name in shards and size != shards[name][1]:
            return f"{name} has {size} bytes in place of {shards[name][1]}"
        return None if sha256(path) == digests[name] else f"{name} has other contents than were written"

    with ThreadPoolExecutor(workers) as pool:
        checked = pool.map(check, sorted(digests))
        yield from filter(None, tqdm(checked, "verify", len(digests), disable=not progress, leave=False))
    strangers = sorted({path.name for path in folder.glob("shard-*.tar")} - shards.keys())
    yield from (f"{name} is not of this data set" for name in strangers)
    info = f"{META}/.info.json"
    try:
        if json.loads((folder / info).read_bytes())["shard_counts"] != counts:
            yield f"{info} counts other records than were written"
    except FileNotFoundError:
        yield f"{info} is missing"
    except (ValueError, KeyError, TypeError):
        yield f"{info} is damaged"
