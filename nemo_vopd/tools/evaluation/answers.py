"""The answers file of an evaluation: every reply with what it needs to be graded, one JSON object a line.

An interrupted evaluation goes on where it stopped, scores can be computed anew without a model, and two models can be
compared question by question.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_vopd.errors import OptionError
from nemo_vopd.tools.evaluation.questions import Question


@dataclass
class Answer:
    """One reply and its question, without the image."""

    id: str
    view: str
    """full | crop"""
    reply: str
    answer: str
    kind: str
    options: dict[str, str] = field(default_factory=dict)
    question: str = ""
    category: str = ""
    subcategory: str = ""
    cluster: str = ""
    """The same for questions about one image."""
    evidence: float | None = None
    """Area of the evidence over that of the image."""


def answered(question: Question, view: str, reply: str, evidence: float | None) -> Answer:
    """The line for `reply` to `question`."""
    return Answer(
        question.id,
        view,
        reply,
        question.answer,
        question.kind,
        question.options,
        question.prompt,
        question.category,
        question.subcategory,
        question.cluster(),
        evidence,
    )


class AnswersFile:
    """`path`: a first line that says what was asked of whom, then answers."""

    def __init__(self, path: Path, settings: dict[str, Any], *, option: str = "output") -> None:
        """Read what an earlier evaluation with the same `settings` left; a line cut off by its end is dropped.

        Raises OptionError, naming `option`, when the file is of other settings or no answers file.
        """
        self.path, self.answers = path, {}
        header = json.dumps({"settings": settings}, ensure_ascii=False, sort_keys=True)
        if path.exists():
            found, self.answers = _read(path, option)
            different = [key for key in settings if settings[key] != found.get(key)]
            if different:
                key = different[0]
                rule = f"{path.name} holds answers with {key}={found.get(key)}, asked for is {settings[key]}"
                raise OptionError(option, path, rule, "name another output, or remove that file")
        else:
            _make_folder(path, option)
        partial = path.with_name(path.name + ".partial")
        lines = [header, *(_line(answer) for answer in self.answers.values())]
        try:
            partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            partial.replace(path)
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise OptionError(option, path, f"cannot be written ({error.strerror})", "name another place") from None

    def write(self, answers: list[Answer]) -> None:
        """Append `answers`."""
        for answer in answers:
            self.answers[answer.id, answer.view] = answer
            self._file.write(_line(answer) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Nothing is written after this."""
        self._file.close()


def read_answers(path: Path, option: str) -> list[Answer]:
    """The answers in `path`. Raises OptionError, naming `option`, when it is no answers file."""
    return list(_read(path, option)[1].values())


def _make_folder(path: Path, option: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(option, path, f"cannot be written ({error.strerror})", "name another place") from None


def _line(answer: Answer) -> str:
    return json.dumps(asdict(answer), ensure_ascii=False)


def _read(path: Path, option: str) -> tuple[dict[str, Any], dict[tuple[str, str], Answer]]:
    try:
        text = path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1].split("\n")[:-1]  # splitlines would cut at U+2028 in a reply
        settings = json.loads(complete[0])["settings"] if complete else {}
        answers = [Answer(**json.loads(line)) for line in complete[1:]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"is no answers file ({type(error).__name__})"
        raise OptionError(option, path, reason, "name another file, or remove that one") from None
    if not isinstance(settings, dict):
        raise OptionError(option, path, "is no answers file", "name another file, or remove that one")
    return settings, {(answer.id, answer.view): answer for answer in answers}
