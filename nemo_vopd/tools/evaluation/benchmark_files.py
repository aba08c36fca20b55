"""Local copies of published benchmarks: which files there are, and their rows as questions, one at a time."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_vopd.errors import OptionError
from nemo_vopd.tools.evaluation.benchmarks import LONGEST_POINTER, Benchmark, Row, Source, plain_name
from nemo_vopd.tools.evaluation.questions import Question, told_apart

_DELIMITERS = {".tsv": "\t", ".csv": ","}
_LONGEST_REASON = 300  # in characters
_ROWS_AT_ONCE = 8  # of a parquet file: an image of HR-Bench 8K takes 10 MB


def read_benchmark(benchmark: Benchmark, path: Path, unusable: list[str]) -> Iterator[Question]:
    """The questions of `benchmark` in the order of its files, below `path` or in its folder there.

    A row that cannot be used, or that another of its files has too, is left out, and why goes to `unusable`. Raises
    OptionError (data.path) when there is no such file, a column is missing or no row can be used.
    """
    source, files = _files(benchmark, path)
    seen: dict[str, int] = {}
    places: dict[tuple[str, str, str], Path] = {}
    first_index: int | None = None
    for file in files:
        for number, row in enumerate(read_rows(file, source.columns), start=1):
            try:
                question = source.question(row, file)
                place = places.setdefault((question.id, question.prompt, question.cluster()), file)
                if place != file:
                    raise ValueError(f"is in {place} too")
                if benchmark.pairs:
                    if first_index is None:  # copies count from 0 or from 1, and their first rows may be unusable
                        first_index = 0 if int(question.id) == number - 1 else 1
                    question.id = str(int(question.id) + 1 - first_index)
                    if question.id in seen:
                        raise ValueError("has the index of an earlier row, so that its pair is unknown")
            except (ValueError, OSError) as error:
                # it may quote the file, and neither megabytes nor control sequences are for a terminal
                reason = "".join(c if c.isprintable() else "?" for c in str(error)[:_LONGEST_REASON])
                unusable.append(f"{file.name}, row {number}: {reason}")
                continue
            question.id = told_apart(question.id, seen)
            yield question
    if not seen:
        first = f" ({unusable[0]})" if unusable else ""
        raise OptionError("data.path", path, f"holds no usable question of {benchmark.title}{first}", "copy it again")


def _files(benchmark: Benchmark, path: Path) -> tuple[Source, list[Path]]:
    """The first published form whose files are there with all of its columns, else the first whose files are there."""
    if not path.exists():
        raise OptionError("data.path", path, "does not exist", f"give a copy of {benchmark.published}")
    found = [(source, files) for source in benchmark.sources if (files := _matching(benchmark, source, path))]
    if not found:
        wanted = " or ".join(source.patterns[0] for source in benchmark.sources)
        rule = f"holds no file of {benchmark.title} ({wanted})"
        raise OptionError("data.path", path, rule, f"copy {benchmark.published} there")
    for source, files in found:
        with _opened(files[0]) as (columns, _):
            if set(source.columns) <= set(columns):
                return source, files
    return found[0]


def _matching(benchmark: Benchmark, source: Source, path: Path) -> list[Path]:
    if path.is_file():
        return [path] if any(Path(p).suffix == path.suffix.lower() for p in source.patterns) else []
    names = {plain_name(benchmark.name), *map(plain_name, re.findall(r"[\w-]+/([\w-]+)", benchmark.published))}
    inner = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and plain_name(folder.name) in names]
    searches = [path.glob, *(search for folder in inner for search in (folder.glob, folder.rglob)), path.rglob]
    for search in searches:
        for pattern in source.patterns:
            if files := sorted(search(pattern)):
                return files
    return []


def read_rows(path: Path, columns: Iterable[str]) -> Iterator[Row]:
    """The rows of `path`, a file with at least `columns`; TSV images that point to an earlier row are filled in.

    Raises OptionError (data.path) when the file cannot be read, has other columns or is no table at all.
    """
    with _opened(path) as (found, rows):
        missing = [name for name in columns if name not in found]
        if missing:
            rule = f"has no column {missing[0]!r} (columns: {', '.join(found)})"
            remedy = f"give a copy of the published file, with the columns {', '.join(columns)}"
            raise OptionError("data.path", path, rule, remedy)
        yield from rows


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[list[str], Iterable[Row]]]:
    """The columns of `path`, and its rows as they are read. Raises OptionError (data.path) whenever it cannot be."""
    try:
        if (ending := path.suffix.lower()) == ".parquet":
            # buffered: else a whole row group, often a thousand images, is in memory at once
            with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
                batches = file.iter_batches(batch_size=_ROWS_AT_ONCE)
                yield file.schema_arrow.names, (row for batch in batches for row in batch.to_pylist())
        elif ending in _DELIMITERS:
            with _separated(path) as (columns, rows):
                yield columns, _with_images(rows, path) if ending == ".tsv" and "image" in columns else rows
        elif ending == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise OptionError("data.path", path, "is not a list of records", "give a copy of the published file")
            yield [name for name in (rows or [{}])[0] if all(name in row for row in rows)], rows
        else:
            endings = ", ".join((".parquet", *_DELIMITERS, ".json"))
            raise OptionError("data.path", path, "is no benchmark file", f"give one that ends in {endings}")
    except OptionError:
        raise
    except (OSError, ValueError, pa.ArrowException, csv.Error) as error:
        reason = " ".join(str(error).split())[:200]
        raise OptionError("data.path", path, f"cannot be read ({reason})", "copy it again in full") from None


@contextlib.contextmanager
def _separated(path: Path) -> Iterator[tuple[list[str], Iterator[Row]]]:
    csv.field_size_limit(sys.maxsize)  # an image in base64 is one field
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, delimiter=_DELIMITERS[path.suffix.lower()])
        yield list(rows.fieldnames or []), _whole(rows, path)


def _whole(rows: csv.DictReader, path: Path) -> Iterator[Row]:
    """`rows`. Raises OptionError (data.path) when a cell holds further rows, as after a mark that is not closed."""
    for number, row in enumerate(rows, start=1):
        for name, cell in row.items():
            # a text may have several lines, but hardly the delimiters of a row or a row of too many cells with them
            if name is not None and "\n" in (cell or ""):
                if None in row or cell.count(rows.reader.dialect.delimiter) >= len(row) - 1:
                    rule = f"has further rows in column {name} of row {number}: a quotation mark is not closed"
                    raise OptionError("data.path", path, rule, 'write " in a text as "", and that text between two "')
        yield row


def _with_images(rows: Iterable[Row], path: Path) -> Iterator[Row]:
    """`rows` with pointers replaced by images; only those that others point at are kept in memory."""
    with _separated(path) as (_, first_time):
        pointers = {image for row in first_time if 0 < len(image := row.get("image") or "") <= LONGEST_POINTER}
    images: dict[str, str] = {}
    for row in rows:
        image = row.get("image") or ""
        image = row["image"] = images.get(image, image)
        if row.get("index") in pointers:
            images[row["index"]] = image
        yield row
