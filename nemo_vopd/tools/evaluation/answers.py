"""Replies to questions and the file that keeps them, one JSON object a line.

The file holds every reply with what is needed to grade it: from it an interrupted evaluation goes on, scores are
computed anew without a model, and two models are compared question by question.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_vopd.errors import OptionError
from nemo_vopd.tools.evaluation.questions import Question


@dataclass
class NotAnswered:
    """In place of a reply: why the question could not be put to the model."""

    reason: str


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

    @classmethod
    def of(cls, q: Question, view: str, reply: str, evidence: float | None) -> Answer:
        """The line for `reply` to `q` about its `view`."""
        graded = q.id, view, reply, q.answer, q.kind, q.options
        return cls(*graded, q.prompt, q.category, q.subcategory, q.cluster(), evidence)

    def line(self) -> str:
        """The answer as a line of the file."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


class AnswersFile:
    """`path`: a first line that says what was asked of whom, then answers."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Read what an earlier evaluation with the same `settings` left.

        Raises OptionError (output) when the file is of other settings or no answers file.
        """
        self.answers: dict[tuple[str, str], Answer] = {}
        if path.exists():
            found, self.answers = _read(path, "output")
            for key, value in settings.items():
                if value != found.get(key):
                    rule = f"{path.name} holds answers with {key}={found.get(key)}, asked for is {value}"
                    raise OptionError("output", path, rule, "name another output, or remove that file")
        header = json.dumps({"settings": settings}, ensure_ascii=False, sort_keys=True) + "\n"
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(header + "".join(a.line() for a in self.answers.values()), encoding="utf-8")
            partial.replace(path)
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise OptionError("output", path, f"cannot be written ({error.strerror})", "name another place") from None

    def write(self, answer: Answer) -> None:
        """Append `answer`."""
        self.answers[answer.id, answer.view] = answer
        self._file.write(answer.line())

    def close(self) -> None:
        """Nothing is written after this."""
        self._file.close()


def read_answers(path: Path, option: str) -> list[Answer]:
    """The answers in `path`. Raises OptionError, naming `option`, when it is no answers file."""
    return list(_read(path, option)[1].values())


def _read(path: Path, option: str) -> tuple[dict[str, Any], dict[tuple[str, str], Answer]]:
    try:
        lines = complete_lines(path)
        settings = dict(json.loads(lines[0])["settings"]) if lines else {}
        answers = [Answer(**json.loads(line)) for line in lines[1:]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"is no answers file ({type(error).__name__})"
        raise OptionError(option, path, reason, "name another file, or remove that one") from None
    return settings, {(answer.id, answer.view): answer for answer in answers}


def complete_lines(path: Path) -> list[str]:
    """The lines of a file, less one that the end of a process cut off."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]  # splitlines would cut at U+2028 in a reply
