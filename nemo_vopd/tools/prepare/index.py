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
_READ_BYTES = 1 << 20


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
    """Note what `verify` compares with. `shards`: entries of `ShardWriter.finish`."""
    names = sorted(path.relative_to(folder).as_posix() for path in [*folder.glob("*.idx"), *folder.glob(f"{META}/*")])
    entries = {entry["shard"]: {key: entry[key] for key in ("records", "bytes", "sha256")} for entry in shards}
    index = {name: _sha256(folder / name) for name in names}
    text = json.dumps({"format": 1, "source": source, "shards": entries, "index": index}, indent=1)
    (folder / MANIFEST).write_text(text + "\n")


def verify(folder: Path, *, workers: int = 4, progress: bool = True) -> dict[str, int]:
    """Compare every prepared data set in `folder` with its manifest: each file's contents, counts, Energon's index.

    Returns {"data_sets", "shards", "records", "bytes"}. Raises OptionError (verify) naming the first file that is
    damaged, and how many there are.
    """
    manifests = [folder / MANIFEST] if (folder / MANIFEST).is_file() else []
    for part in _expected_parts(folder):
        if not (folder / part / MANIFEST).is_file():
            raise OptionError("verify", folder, f"lacks {part}/{MANIFEST}", "copy the data set again in full")
        manifests.append(folder / part / MANIFEST)
    if not manifests:
        rule = f"is no prepared data set (no {MANIFEST})"
        raise OptionError("verify", folder, rule, "give the output folder of prepare_data.py")
    totals = {"data_sets": len(manifests), "shards": 0, "records": 0, "bytes": 0}
    problems: list[str] = []
    for blend in sorted(folder.glob("*.yaml")):
        for part, _ in read_blend(blend, "verify"):
            if not (part / MANIFEST).is_file():
                problems.append(f"{blend.name} names {part.relative_to(folder)}, which is missing")
    for manifest in manifests:
        _verify_one(manifest, folder, totals, problems, workers, progress)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise OptionError("verify", folder, problems[0] + more, "copy the data set again or prepare it anew")
    return totals


def _expected_parts(folder: Path) -> list[str]:
    card = folder / "data_card.json"
    try:
        return [part for part in json.loads(card.read_bytes())["parts"] if part != "."] if card.is_file() else []
    except (ValueError, KeyError, TypeError):
        raise OptionError("verify", folder, "data_card.json is damaged", "copy the data set again") from None


def _verify_one(
    manifest: Path, root: Path, totals: dict[str, int], problems: list[str], workers: int, progress: bool
) -> None:
    """Add the numbers of one data set to `totals` and what is wrong with it to `problems`."""
    folder = manifest.parent
    try:
        known = json.loads(manifest.read_bytes())
        shards, index = dict(known["shards"]), dict(known["index"])
        sizes = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in shards.items()}
        totals["records"] += sum(int(entry["records"]) for entry in shards.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        problems.append(f"{manifest.relative_to(root)} is damaged")
        return
    totals["shards"] += len(shards)
    totals["bytes"] += sum(size for size, _ in sizes.values())
    expected = {**{name: (-1, digest) for name, digest in index.items()}, **sizes}

    def check(name: str) -> str | None:
        path = folder / name
        if not path.is_file():
            return f"{path.relative_to(root)} is missing"
        size, digest = expected[name]
        if size >= 0 and path.stat().st_size != size:
            return f"{path.relative_to(root)} has {path.stat().st_size} bytes in place of {size}"
        return None if _sha256(path) == digest else f"{path.relative_to(root)} has other contents than were written"

    with ThreadPoolExecutor(workers) as pool:
        checked = pool.map(check, sorted(expected))
        bar = tqdm(checked, total=len(expected), desc="verify", disable=not progress, leave=False)
        problems += [problem for problem in bar if problem]
    problems += [f"{folder.relative_to(root) / name} is not of this data set" for name in _strangers(folder, shards)]
    problems += _index_problems(folder, root, shards)


def _strangers(folder: Path, shards: dict) -> Iterator[str]:
    return (path.name for path in sorted(folder.glob("shard-*.tar")) if path.name not in shards)


def _index_problems(folder: Path, root: Path, shards: dict) -> Iterator[str]:
    """Energon's counts against those of the manifest."""
    info = folder / META / ".info.json"
    name = info.relative_to(root)
    try:
        counts = json.loads(info.read_bytes())["shard_counts"]
        if counts != {shard: entry["records"] for shard, entry in shards.items()}:
            yield f"{name} counts other records than were written"
    except FileNotFoundError:
        yield f"{name} is missing"
    except (ValueError, KeyError, TypeError):
        yield f"{name} is damaged"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
