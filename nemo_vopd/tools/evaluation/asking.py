"""Questions to a model, replies to the answers file: in batches, each question once, in the order of the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

from PIL import Image
from tqdm import tqdm

from nemo_vopd.config import DataConfig
from nemo_vopd.tools.evaluation.answers import Answer, AnswersFile, answered
from nemo_vopd.tools.evaluation.questions import Question

AnyT = TypeVar("AnyT")


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


class Model(Protocol):
    """What can be asked; of several processes each answers every `num_shares`-th question from `share` on."""

    num_shares: int
    share: int
    collects: bool
    """Whether this process keeps the answers file."""

    def __call__(self, requests: list[Request]) -> Iterable[str | NotAnswered]:
        """A reply to each request, in order, as they come."""
        ...

    def fingerprint(self) -> str | None:
        """What tells these weights from others of the same name; None where it cannot be known."""
        ...

    def from_collector(self, value: AnyT) -> AnyT:
        """The `value` of the process that collects, on every process."""
        ...

    def gather(self, part: AnyT) -> list[AnyT]:
        """The parts of all shares, on every process."""
        ...


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
                    file.write([new])
            bar.update(num_read)
    if num_before and model.collects:
        print(f"{title}: {num_before} answers were there already", flush=True)
    return list(answers.values())


def _known(answer: Answer | None, question: Question) -> Answer | None:
    """An earlier `answer` to the same question about the same image, with the key that `question` has now."""
    if answer is None or answer.question != question.prompt or answer.cluster != question.cluster():
        return None
    return answered(question, answer.view, answer.reply, answer.evidence)


def _replies(mine: list[Request], model: Model) -> Iterable[Answer | NotAnswered]:
    """What comes of this process's questions and those of the others, the same on every process."""
    own = map(_answer, mine, model(mine))
    return own if model.num_shares == 1 else [new for part in model.gather(list(own)) for new in part]


def _answer(request: Request, reply: str | NotAnswered) -> Answer | NotAnswered:
    if isinstance(reply, NotAnswered):
        return NotAnswered(f"{request.question.id}, {request.view} view: {reply.reason}")
    return answered(request.question, request.view, reply, request.question.evidence_size())
