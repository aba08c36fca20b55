"""From a row of a published benchmark file to a question, with the prompts of the authors' evaluation.

Each function takes a row and its file, and raises ValueError with a reason for a row that cannot be used.
Prompts: VisionOPD/Vision-OPD, eval/prepare_data.py; MME-RealWorld's are those of its own paper.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_vopd.tools.evaluation.questions import OPTION, TEXT, YES_NO, Question, option_letter, parse_options
from nemo_vopd.tools.evaluation.rows import image_bytes, text_list

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
Row = dict[str, Any]


def _text(row: Row, *names: str) -> str:
    return next((str(row[name]).strip() for name in names if row.get(name) not in (None, "")), "")


def _options(row: Row) -> dict[str, str]:
    return {letter: str(row[letter]).strip() for letter in "ABCDEF" if str(row.get(letter) or "").strip()}


def _listed(options: dict[str, str]) -> str:
    return "\n".join(f"({letter}) {text}" for letter, text in options.items())


def _image(cell: object) -> bytes:
    if (image := image_bytes(cell)) is None:
        raise ValueError("has no image")
    return image


def _choice(row: Row, prompt: str, options: dict[str, str], **other: Any) -> Question:
    """A question with options, from the columns index, answer and image unless `other` has id, answer or full.

    Raises ValueError when image, answer or options are missing.
    """
    known: Any = {"id": _text(row, "index"), "answer": row.get("answer"), "full": row.get("image")} | other
    known["full"] = _image(known["full"])
    letter, options = option_letter(known["answer"]), options or dict.fromkeys("ABCDE", "")
    if letter not in options:
        raise ValueError(f"has the answer {known['answer']!r}, which is none of its options {', '.join(options)}")
    return Question(prompt=prompt, kind=OPTION, options=options, **known | {"answer": letter})


def vstar(row: Row, path: Path) -> Question:
    """V* as lmms-lab publishes it: options in the text."""
    text = _text(row, "text")
    prompt = text if text.endswith(LETTER_PROMPT.strip()) else text + LETTER_PROMPT
    names = {"id": _text(row, "question_id"), "category": _text(row, "category")}
    return _choice(row, prompt, parse_options(text), answer=_text(row, "label"), **names)


def vstar_tsv(row: Row, path: Path) -> Question:
    """V* as VLMEvalKit publishes it."""
    options = _options(row)
    prompt = f"{_text(row, 'question')}\n{_listed(options)}{LETTER_PROMPT}"
    return _choice(row, prompt, options, category=_text(row, "category"))


def zoombench(row: Row, path: Path) -> Question:
    """ZoomBench: choices and open questions, full image and crop."""
    name, prompt, answer = (_text(row, column) for column in ("id", "query", "response"))
    full, crop = _image(row["image"]), image_bytes(row["crop_image"])
    options = parse_options(prompt)
    letter = option_letter(answer)
    if letter is not None and letter in options:
        return Question(name, prompt, letter, OPTION, full, crop, options=options, category="choice")
    return Question(name, prompt, answer, TEXT, full, crop, category="open")


def hrbench(row: Row, path: Path) -> Question:
    """HR-Bench; each question occurs four times with its options rotated."""
    options, prompt = _options(row), _text(row, "question")
    if options:
        prompt += " Select from the following choices.\n" + _listed(options)
    return _choice(row, prompt, options, category=_text(row, "category"))


def realworld(language: str) -> Callable[[Row, Path], Question]:
    """MME-RealWorld in `language` (en | cn)."""
    before, after = REALWORLD_PROMPTS[language]

    def question(row: Row, path: Path) -> Question:
        lines = [line for line in text_list(row["multi-choice options"]) if line not in (before.strip(), "")]
        options = parse_options("\n".join(lines)) or _options(row)
        prompt = f"{_text(row, 'question')}{before}" + "\n".join(lines) + after
        task, _, domain = _text(row, "category").partition("/")
        image = row["bytes"] if "bytes" in row else row["image"]
        return _choice(row, prompt, options, full=image, category=task, subcategory=domain)

    return question


def visualprobe(row: Row, path: Path) -> Question:
    """VisualProbe: open questions of three levels."""
    images = row["images"]
    if not isinstance(images, list) or not images:
        raise ValueError("has no image")
    name = str(images[0])
    level = re.search(r"VisualProbe_(Easy|Medium|Hard)", f"{path}/{name}", re.IGNORECASE)
    relative = re.sub(r"^VisualProbe_\w+/", "", name)
    file = next((f for f in (path.parent / name, path.parent / relative) if f.is_file()), None)
    if file is None:
        raise ValueError(f"names the image {name}, which is not beside {path}")
    prompt = str(row["problem"]).replace("<image>\n", "").replace("<image>", "").strip()
    category, answer = level.group(1).capitalize() if level else "", str(row["solution"]).strip()
    return Question(f"{category}/{relative}", prompt, answer, TEXT, file.read_bytes(), category=category)


def mmvp(row: Row, path: Path) -> Question:
    """MMVP: pairs of images with the same question."""
    number = _text(row, "Index", "index")
    image = image_bytes(row.get("image"))
    if image is None:
        file = path.parent / "MMVP Images" / f"{number}.jpg"
        if not file.is_file():
            raise ValueError(f"needs the image {file}, which is missing")
        image = file.read_bytes()
    choices = _text(row, "Options", "options")
    prompt = f"{_text(row, 'Question', 'question')} {choices}"
    answer = _text(row, "Correct Answer", "correct answer", "answer")
    return _choice(row, prompt, parse_options(choices), id=number, answer=answer, full=image)


def mmvp_tsv(row: Row, path: Path) -> Question:
    """MMVP as VLMEvalKit publishes it."""
    options = _options(row)
    choices = " ".join(f"({letter.lower()}) {text}" for letter, text in options.items())
    return _choice(row, f"{_text(row, 'question')} {choices}", options)


def cv_bench(row: Row, path: Path) -> Question:
    """CV-Bench, two and three dimensions."""
    prompt, category = _text(row, "prompt"), _text(row, "type", "split")
    names = {"id": f"{category}/{_text(row, 'idx', 'index')}", "subcategory": _text(row, "source")}
    return _choice(row, prompt, parse_options(prompt) or _options(row), category=category, **names)


def mmstar(row: Row, path: Path) -> Question:
    """MMStar."""
    question = _text(row, "question")
    options = _options(row)
    # VLMEvalKit's file has the options in columns, the published one in the question
    prompt = f"{question}\nOptions: " + ", ".join(f"{k}: {v}" for k, v in options.items()) if options else question
    names = {"category": _text(row, "category"), "subcategory": _text(row, "l2_category")}
    return _choice(row, prompt, options or parse_options(question), **names)


def pope(row: Row, path: Path) -> Question:
    """POPE: whether an object is in the image."""
    image, answer, text = _image(row["image"]), _text(row, "answer").lower(), _text(row, "question")
    if answer not in ("yes", "no"):
        raise ValueError(f"has the answer {answer!r}, neither yes nor no")
    prompt = text if text.endswith(WORD_PROMPT.strip()) else text + WORD_PROMPT
    category = _text(row, "category") or path.stem.split("-")[0]
    name = f"{category}/{_text(row, 'question_id', 'index', 'id')}"
    return Question(name, prompt, answer, YES_NO, image, category=category)
