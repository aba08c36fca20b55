"""What a path given as `source` is: JSONL, Vision-OPD-6K, parquet, or a data set that `datasets` saved."""

from __future__ import annotations

import json
import re
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from nemo_vopd.data.jsonl import JsonlSource
from nemo_vopd.data.rows import Source
from nemo_vopd.errors import OptionError

_FORMS = "a JSONL file, a folder with train.jsonl, parquet files, or a folder that datasets' save_to_disk wrote"
_PART_OF_SPLIT = re.compile(r"(.+)-\d+-of-\d+$")


def open_source(path: Path, split: str | None = None, image_root: Path | None = None) -> Source:
    """The source at `path`; nothing but names and headers is read.

    `split` chooses a part of a data set that has several; image paths are relative to `image_root` (null: the folder
    of the source). Raises OptionError (source, split, image_root).
    """
    if image_root is not None and not image_root.is_dir():
        raise OptionError("image_root", image_root, "is not a folder", "give the folder that image paths start from")
    if path.is_dir():
        return _open_folder(path, split, image_root)
    if not path.is_file():
        raise OptionError("source", path, "is not a file or folder", f"give {_FORMS}")
    if path.suffix == ".parquet":
        return _tables(path, [path], image_root or path.parent, path.stem, "parquet")
    return JsonlSource(path, path, (image_root or path.parent).resolve())


def _tables(path: Path, tables: Sequence[Path], root: Path, stem: str, layout: str) -> Source:
    from nemo_vopd.data.tables import TableSource  # pyarrow, which JSONL does without

    return TableSource(path, tuple(tables), root.resolve(), stem, layout)


def _open_folder(path: Path, split: str | None, image_root: Path | None) -> Source:
    if (path / "dataset_dict.json").is_file():
        splits = _read_json(path / "dataset_dict.json").get("splits", [])
        return _saved(path, path / _choose(splits, split, path), image_root)
    if (path / "state.json").is_file():
        return _saved(path, path, image_root)
    lines = [path / f"{split or 'train'}.jsonl"]
    if not lines[0].is_file():
        lines = sorted(path.glob("*.jsonl")) if split is None else []
    if len(lines) == 1:
        root = image_root or path
        _check_unpacked(root)
        known = (root / "teacher_images").is_dir()
        return JsonlSource(path, lines[0], root.resolve(), "Vision-OPD-6K" if known else "JSONL")
    tables = sorted(path.rglob("*.parquet"))
    if tables:
        return _tables(path, _of_split(tables, split, path), image_root or path, path.name, "parquet folder")
    names = ", ".join(line.name for line in sorted(path.glob("*.jsonl"))) or "no *.jsonl or *.parquet"
    raise OptionError("source", path, f"is a folder with {names}", f"give {_FORMS}")


def _choose(splits: Sequence[str], split: str | None, path: Path) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None or split not in splits:
        known = ", ".join(map(str, splits))
        raise OptionError("split", split or "null", f"{path} has the splits {known}", f"set split={splits[0]}")
    return split


def _of_split(tables: list[Path], split: str | None, path: Path) -> list[Path]:
    """The tables of one split, by the names that Hugging Face gives: data/train-00000-of-00004.parquet."""
    found: dict[str, list[Path]] = {}
    for table in tables:
        match = _PART_OF_SPLIT.match(table.stem)
        found.setdefault(match.group(1) if match else table.stem if split == table.stem else "", []).append(table)
    named = [name for name in found if name]
    if split is None and len(named) < 2:
        return tables
    return found[_choose(named, split, path)]


def _saved(path: Path, folder: Path, image_root: Path | None) -> Source:
    files = [folder / entry["filename"] for entry in _read_json(folder / "state.json").get("_data_files", [])]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        rule = f"lacks {missing[0]}" if missing else "names no data file in state.json"
        raise OptionError("source", folder, rule, "save or copy the data set again")
    return _tables(path, files, image_root or folder, path.name, "datasets (save_to_disk)")


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise OptionError("source", path, f"is damaged ({error})", "save or copy the data set again") from None
    if not isinstance(value, dict):
        raise OptionError("source", path, "is damaged (no JSON object)", "save or copy the data set again")
    return value


def _check_unpacked(root: Path) -> None:
    """Raise OptionError when a folder of images holds nothing but the archives it is published as."""
    for name in ("images", "teacher_images"):
        folder = root / name
        entries = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        archives = [entry for entry in entries if ".tar" in entry]
        if archives and not [entry for entry in entries if entry not in archives and not entry.startswith(".")]:
            target = root if _first_member(folder / archives[0]).startswith(f"{name}/") else folder
            pattern = re.sub(r"(\.tar(\.gz)?).*", r"\1", archives[0])
            remedy = f"unpack it: cat {folder}/{pattern}* | tar -xz -C {target}"
            raise OptionError("source", root, f"has its images still packed in {name}/{archives[0]}", remedy)


def _first_member(archive: Path) -> str:
    try:
        with tarfile.open(archive, "r|*") as tar:
            member = tar.next()
            return member.name.removeprefix("./") if member else ""
    except (tarfile.TarError, OSError, EOFError, zlib.error):
        return ""
