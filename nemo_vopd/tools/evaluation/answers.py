"""Questions to a model, its replies to the answers file: in batches, each question once, in the order of the data.

The answers file holds every reply with what is needed to grade it, one JSON object a line. From it an interrupted
evaluation goes on, scores are computed anew without a model, and two models are compared question by question.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from nemo_vopd.config import DataConfig
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

    def __init__(self, path: Path, settings: dict[str, Any], *, option: str = "output") -> None:
        """Read what an earlier evaluation with the same `settings` left; a line cut off by its end is dropped.

        Raises OptionError, naming `option`, when the file is of other settings or no answers file.
        """
        self.answers: dict[tuple[str, str], Answer] = {}
        if path.exists():
            found, self.answers = _read(path, option)
            for key, value in settings.items():
                if value != found.get(key):
                    rule = f"{path.name} holds answers with {key}={found.get(key)}, asked for is {value}"
                    raise OptionError(option, path, rule, "name another output, or remove that file")
        header = json.dumps({"settings": settings}, ensure_ascii=False, sort_keys=True) + "\n"
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(header + "".join(a.line() for a in self.answers.values()), encoding="utf-8")
            partial.replace(path)
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise OptionError(option, path, f"cannot be written ({error.strerror})", "name another place") from None

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
        text = path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1].split("\n")[:-1]  # splitlines would cut at U+2028 in a reply
        settings = dict(json.loads(complete[0])["settings"]) if complete else {}
        answers = [Answer(**json.loads(line)) for line in complete[1:]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"is no answers file ({type(error).__name__})"
        raise OptionError(option, path, reason, "name another file, or remove that one") from None
    return settings, {(answer.id, answer.view): answer for answer in answers}


@dataclass
class Request:
    """A question about one of its views; images are decoded when they are asked for, one at a time."""

    question: Question
    view: str
    data: DataConfig

    @property
    def name(self) -> str:
        """Unique among requests."""
        return f"{self.question.id}/{self.view}"

    def image(self) -> Image.Image:
        """The RGB image. Raises UnusableSample."""
        return self.question.image(self.view, self.data)

    def file(self) -> tuple[str, bytes]:
        """(media type, image file), as it is stored if that shows everyone the same. Raises UnusableSample."""
        return self.question.file(self.view, self.data)


@dataclass
class NotAnswered:
    """In place of a reply: why the question could not be put to the model."""

    reason: str


class Model:
    """What can be asked: by one process, or by several that take every `num_shares`-th question from `share` on."""

    num_shares, share = 1, 0
    collects = True
    """Whether this process keeps the answers file."""

    def __call__(self, requests: list[Request]) -> Iterable[str | NotAnswered]:
        """A reply to each request, in order, as they come."""
        raise NotImplementedError

    def fingerprint(self) -> str | None:
        """What tells these weights from others of the same name; None where it cannot be known."""
        return None

    def from_collector[AnyT](self, value: AnyT) -> AnyT:
        """The `value` of the process that collects, on every process."""
        return value

    def gather[AnyT](self, part: AnyT) -> list[AnyT]:
        """The parts of all shares, on every process."""
        return [part]


def ask(
    questions: Iterable[Question],
    model: Model,
    file: AnswersFile | None,
    data: DataConfig,
    *,
    views: tuple[str, ...],
    batch_size: int,
    unusable: list[str],
    title: str,
) -> list[Answer]:
    """Ask `model` every question about each of its `views`; returns the answers, on every process.

    `file`, where the model collects, has what was answered before and gets what is new: as it comes where one process
    asks, else after each batch of `batch_size` questions a share. What cannot be shown goes to `unusable`.
    """
    before = model.from_collector(dict(file.answers) if file is not None else {})
    answers: dict[tuple[str, str], Answer] = {}
    num_before, stream = 0, iter(questions)
    with tqdm(desc=title, unit=" questions", disable=not model.collects) as bar:
        while True:
            mine: list[Request] = []
            num_read = num_open = 0
            for question in islice(stream, batch_size * model.num_shares):
                num_read += 1
                kept = {v: again for v in views if (again := _known(before.get((question.id, v)), question))}
                answers |= {(question.id, view): answer for view, answer in kept.items()}
                num_before += len(kept)
                if missing := [view for view in question.views if view in views and view not in kept]:
                    if num_open % model.num_shares == model.share:  # the others' images are forgotten at once
                        mine += [Request(question, view, data) for view in missing]
                    num_open += 1
            if not num_read:
                break
            for new in _replies(mine, model) if num_open else ():
                if isinstance(new, NotAnswered):
                    unusable.append(new.reason)
                    continue
                answers[new.id, new.view] = new
                if file is not None:
                    file.write(new)
            bar.update(num_read)
    if num_before and model.collects:
        print(f"{title}: {num_before} answers were there already", flush=True)
    return list(answers.values())


def _known(answer: Answer | None, question: Question) -> Answer | None:
    """An earlier `answer` to the same question about the same image, with the key that `question` has now."""
    if answer is None or answer.question != question.prompt or answer.cluster != question.cluster():
        return None
    return Answer.of(question, answer.view, answer.reply, answer.evidence)


def _replies(mine: list[Request], model: Model) -> Iterable[Answer | NotAnswered]:
    """What comes of this process's questions and those of the others, the same on every process."""
    own = map(_answer, mine, model(mine))
    return own if model.num_shares == 1 else [new for part in model.gather(list(own)) for new in part]


def _answer(request: Request, reply: str | NotAnswered) -> Answer | NotAnswered:
    if isinstance(reply, NotAnswered):
        return NotAnswered(f"{request.question.id}, {request.view} view: {reply.reason}")
    return Answer.of(request.question, request.view, reply, request.question.evidence_size())
