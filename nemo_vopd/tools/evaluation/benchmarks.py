"""The public benchmarks of fine-grained vision: where they are published, and how their rows become questions.

Prompts are those of the authors' evaluation (VisionOPD/Vision-OPD, eval/prepare_data.py) and, for MME-RealWorld, of its
own paper. Nothing is downloaded: nemo_vopd/tools/evaluation/benchmark_files.py reads local copies.
"""

from __future__ import annotations

import ast
import base64
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from nemo_vopd.errors import OptionError
from nemo_vopd.tools.evaluation.questions import OPTION, TEXT, YES_NO, Question, option_letter, parse_options

Row = dict[str, Any]

LONGEST_POINTER = 64
"""VLMEvalKit's TSV files store an image once; rows that share it hold the index of that row in its place."""
LETTER_PROMPT = "\nAnswer with the option's letter from the given choices directly."
WORD_PROMPT = "\nAnswer the question using a single word or phrase."
REALWORLD_PROMPTS = {
    "en": (
        " The choices are listed below:\n",
        "\nSelect the best answer to the above multiple-choice question based on the image. Respond with only the "
        "letter (A, B, C, D, or E) of the correct option.\nThe best answer is: ",
    ),
    "cn": (
        " 选项如下所示:\n",
        "\n根据图像选择上述多项选择题的最佳答案。只需回答正确选项的字母（A, B, C, D 或 E）。\n最佳答案为： ",
    ),
}


class Source(NamedTuple):
    """One published form of a benchmark."""

    benchmark: str
    patterns: tuple[str, ...]
    """Files below the folder of the benchmark; those of the first pattern that finds any are read."""
    columns: tuple[str, ...]
    question: Callable[[Row, Path], Question]
    """Builds the question of a row of the given file. Raises ValueError with a reason for a row that cannot be used."""


class Protocol(NamedTuple):
    """How published numbers were made, beyond the prompts: greedy, without reasoning first."""

    source: str
    """Where that is said."""
    pixels: tuple[int, int] | None
    """Smallest and largest size of an image in pixels; None: those of the model's own image processor."""
    max_response_length: int
    """In tokens."""


VISION_OPD = Protocol("VisionOPD/Vision-OPD, eval/run_eval.sh and infer.py", None, 32768)
MINI_O3 = Protocol("Mini-o3/Mini-o3, README, Evaluation (in one turn, without its tool)", (40_000, 2_000_000), 8192)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, where it comes from and how answers become its numbers."""

    name: str
    title: str
    published: str
    """Hugging Face data sets, and VLMEvalKit's TSV file."""
    num_questions: int | None
    """Number of questions of the whole published set, where it is known."""
    by_category: tuple[str, ...] = ()
    """Categories whose accuracies the headline is the mean of; none: it is the accuracy over all questions."""
    pairs: bool = False
    """Whether questions 2k-1 and 2k are a pair, so that the share of right pairs is reported too."""
    protocol: Protocol | None = VISION_OPD
    """What protocol=published is."""

    @property
    def sources(self) -> list[Source]:
        """The forms it is published in; the first one that is there is read."""
        return [source for source in _SOURCES if source.benchmark == self.name]


def find_benchmark(name: object) -> Benchmark:
    """The benchmark called `name`, however it is spelled (vstar, V*, hr_bench_4k). Raises OptionError (benchmark)."""
    aliases = {"vstarbench": "vstar", "vbench": "vstar", "mmerealworlden": "mmerealworld"}
    wanted = aliases.get(plain_name(str(name)), plain_name(str(name)))
    for benchmark in BENCHMARKS.values():
        if wanted in (plain_name(benchmark.name), plain_name(benchmark.title)):
            return benchmark
    raise OptionError("benchmark", name, "is unknown", f"choose from {', '.join(BENCHMARKS)}")


def plain_name(name: str) -> str:
    """`name` in letters and digits alone, which spellings share."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("*", "star"))


def help_text() -> str:
    """A line for each benchmark: where it is published and the columns that are needed."""
    lines = []
    for b in BENCHMARKS.values():
        lines.append(f"{b.name:19} {b.published}")
        lines += [f"{'':21}{Path(s.patterns[0]).name}: {', '.join(s.columns)}" for s in b.sources]
    return "\n".join(lines)


def _text(row: Row, *names: str) -> str:
    """The first of the cells `names` of `row` that is not empty."""
    return next((text for name in names if (text := _cell(row.get(name)))), "")


def _asked(row: Row, *names: str) -> str:
    """The question in the first of the cells `names` that is not empty. Raises ValueError if it has no word."""
    if not re.search(r"\w", text := _text(row, *names)):
        raise ValueError("has no question")
    return text


def _cell(value: object) -> str:
    """The text of a cell; tables write None or NaN into empty ones, TSV files nan. 0 is a text like any other.

    Raises ValueError for what is no text or number.
    """
    if isinstance(value, list | tuple | dict | bytes):
        raise ValueError(f"has a {type(value).__name__} in place of a text")
    text = "" if value is None else str(value).strip()
    return "" if text in ("nan", "NaN") else text


def _options(row: Row) -> dict[str, str]:
    return {letter: text for letter in "ABCDEF" if (text := _cell(row.get(letter)))}


def _listed(options: dict[str, str]) -> str:
    return "\n".join(f"({letter}) {text}" for letter, text in options.items())


def _image_file(cell: object) -> bytes | None:
    """The image file in a cell: a {"bytes": ...} struct (Hugging Face), plain bytes, or base64 text; None if empty.

    Base64 is read as other readers do, with line breaks and without padding. Raises ValueError for anything else.
    """
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    if isinstance(cell, bytes | bytearray):
        return bytes(cell) or None
    text = "".join(_cell(cell).split())
    if 0 < len(text) <= LONGEST_POINTER:
        raise ValueError(f"has {text!r} in place of an image, which is neither base64 nor the index of an earlier row")
    encoded = text.split(",", 1)[-1] if text.startswith("data:") else text
    try:
        return base64.b64decode(encoded.rstrip("=") + "=" * (-len(encoded.rstrip("=")) % 4), validate=True) or None
    except ValueError as error:
        raise ValueError(f"has an image that is no base64 ({error})") from None


def _image(cell: object) -> bytes:
    if (image := _image_file(cell)) is None:
        raise ValueError("has no image")
    return image


def _choice(row: Row, prompt: str, options: dict[str, str], **other: Any) -> Question:
    """A question with options, from the columns index, answer and image unless `other` has id, answer or full."""
    known: Any = {"id": _text(row, "index"), "answer": row.get("answer"), "full": row.get("image")} | other
    known["full"], letter = _image(known["full"]), option_letter(known["answer"])
    if len(options) < 2:
        raise ValueError("lists fewer than two options")
    if letter not in options:
        raise ValueError(f"has the answer {known['answer']!r}, which is none of its options {', '.join(options)}")
    return Question(prompt=prompt, kind=OPTION, options=options, **known | {"answer": letter})


def _vstar(row: Row, path: Path) -> Question:
    text = _asked(row, "text")
    prompt = text if text.endswith(LETTER_PROMPT.strip()) else text + LETTER_PROMPT
    names = {"id": _text(row, "question_id"), "category": _text(row, "category")}
    return _choice(row, prompt, parse_options(text), answer=_text(row, "label"), **names)


def _vstar_tsv(row: Row, path: Path) -> Question:
    options = _options(row)
    prompt = f"{_asked(row, 'question')}\n{_listed(options)}{LETTER_PROMPT}"
    return _choice(row, prompt, options, category=_text(row, "category"))


def _zoombench(row: Row, path: Path) -> Question:
    name, prompt, answer = _text(row, "id"), _asked(row, "query"), _text(row, "response")
    crop, options = _image_file(row["crop_image"]), parse_options(prompt)
    if options and option_letter(answer):
        return _choice(row, prompt, options, id=name, answer=answer, crop=crop, category="choice")
    if not answer:
        raise ValueError("has no answer")
    return Question(name, prompt, answer, TEXT, _image(row["image"]), crop, category="open")


def _hrbench(row: Row, path: Path) -> Question:
    """Each question occurs four times, with its options rotated."""
    options = _options(row)
    prompt = f"{_asked(row, 'question')} Select from the following choices.\n{_listed(options)}"
    return _choice(row, prompt, options, category=_text(row, "category"))


def _realworld(row: Row, path: Path, language: str) -> Question:
    before, after = REALWORLD_PROMPTS[language]
    listed = row["multi-choice options"]
    if not isinstance(listed, list):  # TSV files hold the list as Python would write it, or one text a line
        text = _cell(listed)
        try:
            listed = ast.literal_eval(text) if text.startswith("[") else text.splitlines()
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that it is documented to raise
            listed = text.splitlines()
    options_text = "\n".join(text for text in map(_cell, listed) if text not in (before.strip(), ""))
    task, _, domain = _text(row, "category").partition("/")
    image = row["bytes"] if "bytes" in row else row["image"]
    prompt = f"{_asked(row, 'question')}{before}{options_text}{after}"
    return _choice(row, prompt, parse_options(options_text), full=image, category=task, subcategory=domain)


def _visualprobe(row: Row, path: Path) -> Question:
    images, solution = row["images"], row["solution"]
    if not isinstance(images, list) or len(images) != 1:
        raise ValueError(f"has {len(images) if isinstance(images, list) else 'no'} images in place of one")
    name = _cell(images[0])
    # links are followed: a copy in the cache of Hugging Face consists of them
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"names the image {name}, which is outside the folder")
    level = re.search(r"VisualProbe_(Easy|Medium|Hard)", f"{path}/{name}", re.IGNORECASE)
    relative = re.sub(r"^VisualProbe_\w+/", "", name)
    file = next((f for f in (path.parent / name, path.parent / relative) if f.is_file()), None)
    if file is None:
        raise ValueError(f"names the image {name}, which is not beside {path}")
    answers = [text for text in map(_cell, solution if isinstance(solution, list) else [solution]) if text]
    if not answers:
        raise ValueError("has no answer")
    category, problem = level.group(1).capitalize() if level else "", re.sub("<image>\n?", "", _text(row, "problem"))
    asked = _asked({"problem": problem}, "problem"), answers[0], TEXT, file.read_bytes()
    return Question(f"{category}/{relative}", *asked, category=category, other_answers=answers[1:])


def _mmvp_number(row: Row) -> str:
    """The index of a row of MMVP; pandas writes 1.0 for 1. Raises ValueError if it is none, as pairs follow from it."""
    text = _text(row, "Index", "index")
    if not re.fullmatch(r"[0-9]{1,9}(\.0*)?", text):
        raise ValueError(f"has the index {text!r}, which is no whole number, so that its pair is unknown")
    return str(int(text.split(".")[0]))


def _mmvp(row: Row, path: Path) -> Question:
    number, image = _mmvp_number(row), _image_file(row.get("image"))
    if image is None:
        file = path.parent / "MMVP Images" / f"{number}.jpg"
        if not file.is_file():
            raise ValueError(f"needs the image {file}, which is missing")
        image = file.read_bytes()
    choices = _text(row, "Options", "options")
    prompt = f"{_asked(row, 'Question', 'question')} {choices}"
    answer = _text(row, "Correct Answer", "correct answer", "answer")
    return _choice(row, prompt, parse_options(choices), id=number, answer=answer, full=image)


def _mmvp_tsv(row: Row, path: Path) -> Question:
    options = _options(row)
    choices = " ".join(f"({letter.lower()}) {text}" for letter, text in options.items())
    return _choice(row, f"{_asked(row, 'question')} {choices}", options, id=_mmvp_number(row))


def _cv_bench(row: Row, path: Path) -> Question:
    prompt, category = _asked(row, "prompt"), _text(row, "type", "split")
    names = {"id": f"{category}/{_text(row, 'idx', 'index')}", "subcategory": _text(row, "source")}
    return _choice(row, prompt, parse_options(prompt), category=category, **names)


def _mmstar(row: Row, path: Path) -> Question:
    question, options = _asked(row, "question"), _options(row)
    # VLMEvalKit's file has the options in columns, the published one in the question
    prompt = f"{question}\nOptions: " + ", ".join(f"{k}: {v}" for k, v in options.items()) if options else question
    names = {"category": _text(row, "category"), "subcategory": _text(row, "l2_category")}
    return _choice(row, prompt, options or parse_options(question), **names)


def _pope(row: Row, path: Path) -> Question:
    image, answer, text = _image(row["image"]), _text(row, "answer").lower(), _asked(row, "question")
    if answer not in ("yes", "no"):
        raise ValueError(f"has the answer {answer!r}, neither yes nor no")
    prompt = text if text.endswith(WORD_PROMPT.strip()) else text + WORD_PROMPT
    category = _text(row, "category") or path.stem.split("-")[0]
    name = f"{category}/{_text(row, 'question_id', 'index', 'id')}"
    return Question(name, prompt, answer, YES_NO, image, category=category)


_KIT, _REALWORLD = "VLMEvalKit's", "yifanzhang114/MME-RealWorld"
_LITE = f"{_REALWORLD}-lite-lmms-eval; {_KIT} mme_realworld_lite.tsv"
_LEVELS = "Mini-o3/VisualProbe_Easy, _Medium and _Hard, side by side"
_MMVP = f"MMVP/MMVP (Questions.csv, MMVP Images/); lmms-lab-eval/MMVP; {_KIT} MMVP.tsv"
_CV_BENCH = f"nyu-visionx/CV-Bench; {_KIT} CV-Bench-2D.tsv and CV-Bench-3D.tsv"
_ALL = (
    Benchmark("vstar", "V*", f"lmms-lab/vstar-bench; {_KIT} VStarBench.tsv", 191),
    Benchmark("zoombench", "ZoomBench", "inclusionAI/ZoomBench", 845),
    Benchmark("hrbench-4k", "HR-Bench 4K", "DreamMr/HR-Bench", 800),
    Benchmark("hrbench-8k", "HR-Bench 8K", "DreamMr/HR-Bench", 800),
    Benchmark("mme-realworld", "MME-RealWorld", f"{_REALWORLD}-Lmms-eval; {_KIT} MME-RealWorld.tsv", None),
    Benchmark("mme-realworld-cn", "MME-RealWorld-CN", f"{_REALWORLD}-CN-Lmms-eval; {_KIT} MME-RealWorld-CN.tsv", None),
    Benchmark("mme-realworld-lite", "MME-RealWorld-Lite", _LITE, 1919),
    Benchmark("visualprobe", "VisualProbe", _LEVELS, 515, ("Easy", "Medium", "Hard"), protocol=MINI_O3),
    Benchmark("mmvp", "MMVP", _MMVP, 300, pairs=True),
    Benchmark("cv-bench", "CV-Bench", _CV_BENCH, 2638, ("2D", "3D")),
    Benchmark("mmstar", "MMStar", f"Lin-Chen/MMStar; {_KIT} MMStar.tsv", 1500),
    Benchmark("pope", "POPE", f"lmms-lab/POPE; {_KIT} POPE.tsv", 9000),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}

_HR_COLUMNS = "index, question, answer, A, B, C, D, category, image"
_REALWORLD_COLUMNS = "index, question, multi-choice options, answer, category"
_ENGLISH, _CHINESE = partial(_realworld, language="en"), partial(_realworld, language="cn")
_FORMS: tuple[tuple[str, str, str, Callable[[Row, Path], Question]], ...] = (  # the first that is there is read
    ("vstar", "data/test-*.parquet *.parquet", "image, text, label, question_id, category", _vstar),
    ("vstar", "*.tsv", "index, image, question, A, B, answer, category", _vstar_tsv),
    ("zoombench", "data/test*.parquet *.parquet", "id, query, response, image, crop_image", _zoombench),
    ("hrbench-4k", "hr_bench_4k.parquet hrbench_4k*.parquet *4k*.parquet *4k*.tsv", _HR_COLUMNS, _hrbench),
    ("hrbench-8k", "hr_bench_8k.parquet hrbench_8k*.parquet *8k*.parquet *8k*.tsv", _HR_COLUMNS, _hrbench),
    ("mme-realworld", "data/*.parquet *.parquet", f"{_REALWORLD_COLUMNS}, bytes", _ENGLISH),
    ("mme-realworld", "*.tsv", f"{_REALWORLD_COLUMNS}, image", _ENGLISH),
    ("mme-realworld-cn", "data/*.parquet *.parquet", f"{_REALWORLD_COLUMNS}, bytes", _CHINESE),
    ("mme-realworld-cn", "*.tsv", f"{_REALWORLD_COLUMNS}, image", _CHINESE),
    ("mme-realworld-lite", "data/*.parquet *.parquet", f"{_REALWORLD_COLUMNS}, bytes", _ENGLISH),
    ("mme-realworld-lite", "*.tsv", f"{_REALWORLD_COLUMNS}, image", _ENGLISH),
    ("visualprobe", "VisualProbe_*/val.json val.json", "images, problem, solution", _visualprobe),
    ("mmvp", "Questions.csv", "Index, Question, Options, Correct Answer", _mmvp),
    ("mmvp", "data/*.parquet *.parquet", "Index, Question, Options, Correct Answer, image", _mmvp),
    ("mmvp", "data/*.parquet *.parquet", "index, question, options, answer, image", _mmvp),
    ("mmvp", "*.tsv", "index, image, question, A, B, answer", _mmvp_tsv),
    ("cv-bench", "test_[23]d.parquet *.parquet", "idx, type, task, image, prompt, answer, source", _cv_bench),
    ("cv-bench", "CV-Bench-*.tsv *.tsv", "index, image, prompt, answer, split", _cv_bench),
    ("mmstar", "mmstar.parquet *.parquet *.tsv", "index, question, answer, category, l2_category, image", _mmstar),
    ("pope", "data/test-*.parquet Full/*.parquet *.parquet", "question_id, question, answer, image, category", _pope),
    ("pope", "*.tsv", "index, image, question, answer, category", _pope),
)
_SOURCES = [Source(name, tuple(p.split()), tuple(c.split(", ")), question) for name, p, c, question in _FORMS]
