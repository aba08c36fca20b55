"""What a path given as `source` is: JSONL, Vision-OPD-6K, parquet, or a data set that `datasets` saved."""

from __future__ import annotations

import json
import re
import shlex
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from nemo_vopd.errors import OptionError
from nemo_vopd.tools.prepare.rows import Source

_FORMS = (
    "a JSONL file, a JSON list, a folder with train.jsonl, parquet files, or a folder that datasets' save_to_disk wrote"
)
_PART_OF_SPLIT = re.compile(r"(.+)-(\d+)-of-(\d+)$")
_SPLIT = re.compile(r"(train|test|validation|val|dev|eval)(?:[-_].*)?$")
_ARCHIVE = re.compile(r"(.+(?:\.tar(?:\.(gz|bz2|xz|zst))?|\.(tgz|zip))).*$")
"""Name of an archive, and of the pieces that it was cut into (`.part-aa`, `aa`)."""
_TAR_FLAGS = {"gz": "-xz", "tgz": "-xz", "bz2": "-xj", "xz": "-xJ", "zst": "--zstd -x"}


def open_sources(paths: Sequence[Path], split: str | None = None, image_root: str | None = None) -> list[Source]:
    """The sources at `paths`; nothing but names and headers is read.

    `split` chooses a part of a data set that has several; of several sources, it is for those that have splits. Image
    paths are relative to `image_root` (null: the folder of the source). Raises OptionError (source, split, image_root).
    """
    if not paths:
        raise OptionError("source", "[]", "names nothing", "give a file or folder, or a list of them")
    root = None if image_root is None else Path(image_root)
    if root is not None and not root.is_dir():
        raise OptionError("image_root", root, "is not a folder", "give the folder that image paths start from")
    return [_open(path, split if len(paths) == 1 or _has_splits(path) else None, root) for path in paths]


def _open(path: Path, split: str | None, image_root: Path | None) -> Source:
    if path.is_dir():
        return _open_folder(path, split, image_root)
    if not path.is_file():
        raise OptionError("source", path, "is not a file or folder", f"give {_FORMS}")
    root, tabular = (image_root or path.parent).resolve(), path.suffix == ".parquet"
    layout = "parquet" if tabular else "JSON" if path.suffix == ".json" else "JSONL"
    return Source(path, [path], root, path.stem, layout, tabular)


def _has_splits(path: Path) -> bool:
    if (path / "dataset_dict.json").is_file():
        return True
    if not path.is_dir() or (path / "state.json").is_file():
        return False
    if lines := list(path.glob("*.jsonl")):
        return len(lines) > 1 or bool(_SPLIT.match(lines[0].stem))
    return any(_split_of(table, path) for table in path.rglob("*.parquet"))


def _open_folder(path: Path, split: str | None, image_root: Path | None) -> Source:
    saved, root = path, (image_root or path).resolve()
    if (path / "dataset_dict.json").is_file():
        saved = path / _choose(_read_json(path / "dataset_dict.json").get("splits", []), split, path)
    if saved != path or (path / "state.json").is_file():
        root = (image_root or saved).resolve()
        return Source(path, _saved_files(saved), root, path.name, "datasets (save_to_disk)", tabular=True)
    lines = [path / f"{split or 'train'}.jsonl"]
    if not lines[0].is_file():
        lines = sorted(path.glob("*.jsonl")) if split is None else []
    if len(lines) == 1:
        _check_unpacked(image_root or path)
        layout = "Vision-OPD-6K" if (root / "teacher_images").is_dir() else "JSONL"
        return Source(path, lines, root, lines[0].stem, layout, tabular=False)
    if tables := sorted(path.rglob("*.parquet")):
        tables = _of_split(tables, split, path)
        _check_parts(tables)
        return Source(path, tables, root, path.name, "parquet folder", tabular=True)
    names = ", ".join(line.name for line in sorted(path.glob("*.jsonl"))) or "no *.jsonl or *.parquet"
    raise OptionError("source", path, f"is a folder with {names}", f"give {_FORMS}")


def _choose(splits: Sequence[str], split: str | None, path: Path) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if not splits:
        raise OptionError("split", split or "null", f"{path} has no splits", "set split=null")
    if split is None or split not in splits:
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


def _check_parts(tables: Sequence[Path]) -> None:
    """Raise OptionError where names such as train-00000-of-00004.parquet tell of parts that are not there."""
    there: dict[tuple[Path, str, str], set[str]] = {}
    for table in tables:
        if match := _PART_OF_SPLIT.match(table.stem):
            name, part, count = match.groups()
            there.setdefault((table.parent, name, count), set()).add(part)
    for (folder, name, count), parts in there.items():
        numbers, width = {int(part) for part in parts}, len(next(iter(parts)))
        first = int(int(count) in numbers)  # some programs count from 1
        missing = [number for number in range(first, first + int(count)) if number not in numbers]
        if missing:
            named = ", ".join(f"{name}-{number:0{width}d}-of-{count}.parquet" for number in missing[:3])
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise OptionError("source", folder, f"lacks {named}{more}", "download or copy the missing files")


def _saved_files(folder: Path) -> list[Path]:
    files = [folder / entry["filename"] for entry in _read_json(folder / "state.json").get("_data_files", [])]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        rule = f"lacks {missing[0]}" if missing else "names no data file in state.json"
        raise OptionError("source", folder, rule, "save or copy the data set again")
    return files


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise OptionError("source", path, f"is damaged ({error})", "save or copy the data set again") from None
    return value


def _check_unpacked(root: Path) -> None:
    """Raise OptionError when images are there only in the archives they are published as: inside or beside a folder."""
    for name in ("images", "teacher_images"):
        inside = _entries(root / name)
        packed = _archives(inside)
        if len(packed) < len(inside):
            continue
        beside = [entry for entry in _entries(root) if re.match(rf"{name}\W", entry.name)]
        if archives := packed or _archives(beside):
            rule = f"has its images still packed in {archives[0].relative_to(root)}"
            raise OptionError("source", root, rule, f"unpack it: {_unpacking(archives[0], root, name)}")


def _entries(folder: Path) -> list[Path]:
    return sorted(e for e in folder.iterdir() if not e.name.startswith(".")) if folder.is_dir() else []


def _archives(paths: Sequence[Path]) -> list[Path]:
    return [path for path in paths if _ARCHIVE.match(path.name) and path.is_file()]


def _unpacking(archive: Path, root: Path, name: str) -> str:
    """The command that unpacks `archive`, with the other pieces where it is the first of several, as folder `name`."""
    match = _ARCHIVE.match(archive.name)
    assert match is not None
    whole = archive.with_name(match.group(1))
    kind = match.group(2) or match.group(3) or "tar"
    target = root if _first_folder(archive, kind) == name else root / name
    into = shlex.quote(str(target))
    pieces = shlex.quote(str(whole)) + ("*" if whole != archive else "")
    if kind == "zip":
        if whole == archive:
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
                name = file.read(int.from_bytes(header[26:28], "little")).decode(errors="replace")
        else:
            with tarfile.open(archive, "r|*") as tar:
                # an entry "./" (`tar cf x.tar .`) has no part
                name = next((member.name for member in tar if PurePosixPath(member.name).parts), "")
        return next(iter(PurePosixPath(name).parts), "")
    except (tarfile.TarError, OSError, EOFError, zlib.error):
        return ""
