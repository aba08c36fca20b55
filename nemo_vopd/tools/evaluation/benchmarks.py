"""The public benchmarks of fine-grained vision, read from local copies of their published files.

Nothing is downloaded. How a row becomes a question: nemo_vopd/tools/evaluation/benchmark_rows.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_vopd.errors import OptionError
from nemo_vopd.tools.evaluation import benchmark_rows as rows
from nemo_vopd.tools.evaluation.questions import Question, told_apart
from nemo_vopd.tools.evaluation.rows import check_columns, columns_of, read_rows


@dataclass(frozen=True)
class Source:
    """One published form of a benchmark."""

    patterns: tuple[str, ...]
    """Files below the folder of the benchmark; those of the first pattern that finds any are read."""
    columns: tuple[str, ...]
    question: Callable[[rows.Row, Path], Question]
    """Builds the question of a row of the given file. Raises ValueError for a row that cannot be used."""


@dataclass(frozen=True)
class Scoring:
    """How answers become numbers."""

    mean_of: str = "questions"
    """questions: the headline is the accuracy over all of them; categories: the mean of the categories' accuracies."""
    pairs: bool = False
    """Whether questions 2k-1 and 2k are a pair, so that the share of right pairs is reported too."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark and where it comes from."""

    name: str
    title: str
    published: str
    """Hugging Face data sets, and VLMEvalKit's TSV file."""
    sources: tuple[Source, ...]
    num_questions: int | None
    """Number of questions of the whole published set, where it is known."""
    scoring: Scoring = Scoring()


def _source(patterns: str, columns: str, question: Callable[[rows.Row, Path], Question]) -> Source:
    return Source(tuple(patterns.split()), tuple(columns.split(", ")), question)


def _benchmark(name: str, title: str, published: str, num_questions: int | None, *sources: Source, **scoring: Any):
    return Benchmark(name, title, published, sources, num_questions, Scoring(**scoring))


def _hr_bench(size: str) -> Benchmark:
    patterns = f"hr_bench_{size}.parquet hrbench_{size}*.parquet *{size}*.parquet *{size}*.tsv"
    source = _source(patterns, "index, question, answer, A, B, C, D, category, image", rows.hrbench)
    return Benchmark(f"hrbench-{size}", f"HR-Bench {size.upper()}", "DreamMr/HR-Bench", (source,), 800)


def _realworld(ending: str, published: str, language: str = "en", num_questions: int | None = None) -> Benchmark:
    columns, question = "index, question, multi-choice options, answer, category", rows.realworld(language)
    parquet = _source("data/*.parquet *.parquet", f"{columns}, bytes", question)
    sources = parquet, _source("*.tsv", f"{columns}, image", question)
    name = f"MME-RealWorld{ending}"
    return Benchmark(name.lower(), name, f"yifanzhang114/{published}", sources, num_questions)


_KIT = "VLMEvalKit's"
_ALL = (
    _benchmark(
        "vstar",
        "V*",
        f"lmms-lab/vstar-bench; {_KIT} VStarBench.tsv",
        191,
        _source("data/test-*.parquet *.parquet", "image, text, label, question_id, category", rows.vstar),
        _source("*.tsv", "index, image, question, A, B, answer, category", rows.vstar_tsv),
    ),
    _benchmark(
        "zoombench",
        "ZoomBench",
        "inclusionAI/ZoomBench",
        845,
        _source("data/test*.parquet *.parquet", "id, query, response, image, crop_image", rows.zoombench),
    ),
    _hr_bench("4k"),
    _hr_bench("8k"),
    _realworld("", f"MME-RealWorld-Lmms-eval; {_KIT} MME-RealWorld.tsv"),
    _realworld("-CN", f"MME-RealWorld-CN-Lmms-eval; {_KIT} MME-RealWorld-CN.tsv", "cn"),
    _realworld("-Lite", f"MME-RealWorld-lite-lmms-eval; {_KIT} mme_realworld_lite.tsv", num_questions=1919),
    _benchmark(
        "visualprobe",
        "VisualProbe",
        "Mini-o3/VisualProbe_Easy, _Medium and _Hard, side by side",
        515,
        _source("VisualProbe_*/val.json val.json", "images, problem, solution", rows.visualprobe),
        mean_of="categories",
    ),
    _benchmark(
        "mmvp",
        "MMVP",
        f"MMVP/MMVP (Questions.csv, MMVP Images/); lmms-lab-eval/MMVP; {_KIT} MMVP.tsv",
        300,
        _source("Questions.csv", "Index, Question, Options, Correct Answer", rows.mmvp),
        _source("data/*.parquet *.parquet", "Index, Question, Options, Correct Answer, image", rows.mmvp),
        _source("data/*.parquet *.parquet", "index, question, options, answer, image", rows.mmvp),
        _source("*.tsv", "index, image, question, A, B, answer", rows.mmvp_tsv),
        pairs=True,
    ),
    _benchmark(
        "cv-bench",
        "CV-Bench",
        f"nyu-visionx/CV-Bench; {_KIT} CV-Bench-2D.tsv and CV-Bench-3D.tsv",
        2638,
        _source("test_[23]d.parquet *.parquet", "idx, type, task, image, prompt, answer, source", rows.cv_bench),
        _source("CV-Bench-*.tsv *.tsv", "index, image, prompt, answer, split", rows.cv_bench),
        mean_of="categories",
    ),
    _benchmark(
        "mmstar",
        "MMStar",
        f"Lin-Chen/MMStar; {_KIT} MMStar.tsv",
        1500,
        _source("mmstar.parquet *.parquet *.tsv", "index, question, answer, category, l2_category, image", rows.mmstar),
    ),
    _benchmark(
        "pope",
        "POPE",
        f"lmms-lab/POPE; {_KIT} POPE.tsv",
        9000,
        _source(
            "data/test-*.parquet Full/*.parquet *.parquet", "question_id, question, answer, image, category", rows.pope
        ),
        _source("*.tsv", "index, image, question, answer, category", rows.pope),
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}


def find_benchmark(name: object) -> Benchmark:
    """The benchmark called `name`, however it is spelled (vstar, V*, hr_bench_4k). Raises OptionError (benchmark)."""
    aliases = {"vstarbench": "vstar", "vbench": "vstar", "mmerealworlden": "mmerealworld"}
    wanted = aliases.get(_plain(str(name)), _plain(str(name)))
    for benchmark in BENCHMARKS.values():
        if wanted in (_plain(benchmark.name), _plain(benchmark.title)):
            return benchmark
    raise OptionError("benchmark", name, "is unknown", f"choose from {', '.join(BENCHMARKS)}")


def read_benchmark(benchmark: Benchmark, path: Path, unusable: list[str]) -> Iterator[Question]:
    """The questions of `benchmark` in the order of its files, below `path` or in its folder there.

    A row that cannot be used is left out, and why goes to `unusable`. Raises OptionError (data.path) when there is no
    such file, a column is missing or no row can be used.
    """
    source, files = _files(benchmark, path)
    seen: dict[str, int] = {}
    for file in files:
        for number, row in enumerate(read_rows(file, source.columns), start=1):
            try:
                question = source.question(row, file)
            except (ValueError, OSError) as error:
                unusable.append(f"{file.name}, row {number}: {error}")
                continue
            question.id = told_apart(question.id, seen)
            yield question
    if not seen:
        first = f" ({unusable[0]})" if unusable else ""
        raise OptionError("data.path", path, f"holds no usable question of {benchmark.title}{first}", "copy it again")


def _files(benchmark: Benchmark, path: Path) -> tuple[Source, list[Path]]:
    """The published form that is there, and its files."""
    if not path.exists():
        raise OptionError("data.path", path, "does not exist", f"give a copy of {benchmark.published}")
    found = [(source, files) for source in benchmark.sources if (files := _matching(benchmark, source, path))]
    if not found:
        wanted = " or ".join(source.patterns[0] for source in benchmark.sources)
        rule = f"holds no file of {benchmark.title} ({wanted})"
        raise OptionError("data.path", path, rule, f"copy {benchmark.published} there")
    for source, files in found:
        if set(source.columns) <= set(columns_of(files[0])):
            return source, files
    source, files = found[0]
    check_columns(columns_of(files[0]), source.columns, files[0], "data.path")
    raise AssertionError


def _matching(benchmark: Benchmark, source: Source, path: Path) -> list[Path]:
    if path.is_file():
        return [path] if any(Path(p).suffix == path.suffix.lower() for p in source.patterns) else []
    names = {_plain(benchmark.name), *map(_plain, re.findall(r"[\w-]+/([\w-]+)", benchmark.published))}
    inner = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and _plain(folder.name) in names]
    searches = [path.glob, *(search for folder in inner for search in (folder.glob, folder.rglob)), path.rglob]
    for search in searches:
        for pattern in source.patterns:
            if files := sorted(search(pattern)):
                return files
    return []


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("*", "star"))


def help_text() -> str:
    """A line for each benchmark: where it is published and the columns that are needed."""
    lines = []
    for b in BENCHMARKS.values():
        lines.append(f"{b.name:19} {b.published}")
        lines += [f"{'':21}{Path(s.patterns[0]).name}: {', '.join(s.columns)}" for s in b.sources]
    return "\n".join(lines)
