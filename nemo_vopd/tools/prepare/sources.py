"""What a path given as `source` is: JSONL, Vision-OPD-6K, parquet, or a data set that `datasets` saved."""

from __future__ import annotations

import json
import re
import shlex
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from nemo_vopd.errors import OptionError
from nemo_vopd.tools.prepare.jsonl import JsonlSource
from nemo_vopd.tools.prepare.rows import Source

_FORMS = "a JSONL file, a folder with train.jsonl, parquet files, or a folder that datasets' save_to_disk wrote"
_PART_OF_SPLIT = re.compile(r"(.+)-\d+-of-\d+$")
_SPLIT = re.compile(r"(train|test|validation|val|dev|eval)(?:[-_].*)?$")
_ARCHIVE = re.compile(r"(.+(?:\.tar(?:\.(gz|bz2|xz|zst))?|\.(tgz|zip))).*$")
"""Its name, without what follows where it was cut into pieces (`.part-aa`, `aa`)."""
_TAR_FLAGS = {"gz": "-xz", "tgz": "-xz", "bz2": "-xj", "xz": "-xJ", "zst": "--zstd -x"}


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


def open_sources(paths: Sequence[Path], split: str | None = None, image_root: Path | None = None) -> list[Source]:
    """The sources at `paths`, as `open_source`; of several, `split` is for those that have splits."""
    return [open_source(path, split if len(paths) == 1 or _has_splits(path) else None, image_root) for path in paths]


def _has_splits(path: Path) -> bool:
    if (path / "dataset_dict.json").is_file():
        return True
    if not path.is_dir() or (path / "state.json").is_file():
        return False
    lines = list(path.glob("*.jsonl"))
    if lines:
        return len(lines) > 1 or bool(_SPLIT.match(lines[0].stem))
    return any(_split_of(table, path) for table in path.rglob("*.parquet"))


def _tables(path: Path, tables: Sequence[Path], root: Path, stem: str, layout: str) -> Source:
    from nemo_vopd.tools.prepare.tables import TableSource  # pyarrow, which JSONL does without

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
        if not splits:
            raise OptionError("split", split or "null", f"{path} has no splits", "set split=null")
        known = ", ".join(map(str, splits))
        remedy = f"set split={'train' if 'train' in splits else splits[0]}"
        raise OptionError("split", split or "null", f"{path} has the splits {known}", remedy)
    return split


def _of_split(tables: list[Path], split: str | None, path: Path) -> list[Path]:
    """The tables of one split, by their names."""
    found: dict[str, list[Path]] = {}
    for table in tables:
        found.setdefault(_split_of(table, path) or (table.stem if split == table.stem else ""), []).append(table)
    named = [name for name in found if name]
    if split is None and len(named) < 2:
        return tables
    return found[_choose(named, split, path)]


def _split_of(table: Path, path: Path) -> str:
    """The split that a table of the folder `path` is named after; "" for none.

    Hugging Face gives the names data/train-00000-of-00004.parquet and default/train/0000.parquet.
    """
    for name in (table.stem, *([table.parent.name] if table.parent != path else [])):
        if match := _PART_OF_SPLIT.match(name) or _SPLIT.match(name):
            return match.group(1)
    return ""


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
    """Raise OptionError when images are there only in the archives they are published as: inside or beside a folder."""
    for name in ("images", "teacher_images"):
        inside = _entries(root / name)
        packed = [entry for entry in inside if _is_archive(entry)]
        if len(packed) < len(inside):
            continue
        beside = [entry for entry in _entries(root) if re.match(rf"{name}\W", entry.name) and _is_archive(entry)]
        if archives := packed or beside:
            rule = f"has its images still packed in {archives[0].relative_to(root)}"
            raise OptionError("source", root, rule, f"unpack it: {_unpacking(archives, root, name)}")


def _entries(folder: Path) -> list[Path]:
    return sorted(e for e in folder.iterdir() if not e.name.startswith(".")) if folder.is_dir() else []


def _is_archive(path: Path) -> bool:
    return bool(_ARCHIVE.match(path.name)) and path.is_file()


def _unpacking(archives: Sequence[Path], root: Path, name: str) -> str:
    """The command that unpacks the first of `archives`, with the pieces it was cut into, as the folder `name`."""
    match = _ARCHIVE.match(archives[0].name)
    assert match is not None
    whole = archives[0].with_name(match.group(1))
    kind = match.group(2) or match.group(3) or "tar"
    target = root if _first_folder(archives[0], kind) == name else root / name
    into = shlex.quote(str(target))
    pieces = shlex.quote(str(whole)) + ("*" if whole != archives[0] else "")
    if kind == "zip":
        if whole == archives[0]:
            return f"unzip {pieces} -d {into}"
        joined = shlex.quote(str(root / f"{name}-joined.zip"))
        return f"cat {pieces} > {joined} && unzip {joined} -d {into}"
    made = "" if target.is_dir() else f"mkdir -p {into} && "
    return f"{made}cat {pieces} | tar {_TAR_FLAGS.get(kind, '-x')} -C {into}"


def _first_folder(archive: Path, kind: str) -> str:
    """First part of the path of the first member; "" when there is none, or it cannot be read."""
    try:
        if kind == "zip":
            with open(archive, "rb") as file:  # the first header, which the first of several pieces has as well
                header = file.read(30)
                return _first_part([file.read(int.from_bytes(header[26:28], "little")).decode(errors="replace")])
        with tarfile.open(archive, "r|*") as tar:
            return _first_part(member.name for member in tar)
    except (tarfile.TarError, OSError, EOFError, zlib.error):
        return ""


def _first_part(members: Iterable[str]) -> str:
    """tarfile strips the slash of a folder's entry, and "./" (`tar cf x.tar .`) has no part."""
    return next((path.parts[0] for path in map(PurePosixPath, members) if path.parts), "")
