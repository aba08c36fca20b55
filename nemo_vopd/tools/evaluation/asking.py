"""Questions to a model, its replies to the answers file: in batches, each question once, in the order of the data.

The answers file holds every reply with what is needed to grade it, one JSON object a line. From it an interrupted
evaluation goes on, scores are computed anew without a model, and two models are compared question by question.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from nemo_vopd.errors import OptionError
from nemo_vopd.mcore import parallel
from nemo_vopd.tools.evaluation.questions import Question


@dataclass
class NotAnswered:
    """In place of a reply: why the question could not be put to the model."""

    reason: str
    id: str = ""
    """Of the question; `ask` sets it."""


Asked = tuple[Question, str]
"""A question and the view that it is about; its image is decoded when it is its turn."""
Model = Callable[[list[Asked]], Iterable[str | NotAnswered]]
"""Gives a reply to each question, in order, as they come."""


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
    other_answers: list[str] = field(default_factory=list)
    """Answers that are right too."""

    @property
    def accepted(self) -> list[str]:
        """Every answer that is right."""
        return [self.answer, *self.other_answers]

    @classmethod
    def of(cls, q: Question, view: str, reply: str, evidence: float | None) -> Answer:
        """The line for `reply` to `q` about its `view`."""
        graded = q.id, view, reply, q.answer, q.kind, q.options
        return cls(*graded, q.prompt, q.category, q.subcategory, q.cluster(), evidence, q.other_answers)

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


def read_answers(path: Path, option: str) -> tuple[dict[str, Any], list[Answer]]:
    """Settings and answers in `path`. Raises OptionError, naming `option`, when it is no answers file."""
    settings, answers = _read(path, option)
    return settings, list(answers.values())


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


def ask(
    questions: Iterable[Question],
    model: Model,
    group: dist.ProcessGroup | None,
    file: AnswersFile | None,
    *,
    views: list[str],
    batch_size: int,
    unusable: list[str],
    title: str,
) -> list[Answer]:
    """Ask `model` every question about each of its `views`; returns the answers, on every rank of `group`.

    The ranks share the questions; without a group this process asks alone. `file`, on rank 0, has what was answered
    before and gets what is new: as it comes where one process asks, else after each batch of `batch_size` questions a
    rank. Why a question has no answer about any of `views` goes to `unusable`.
    """
    rank, num_ranks, collects = 0, 1, parallel.is_rank_zero()
    box = [dict(file.answers) if file is not None else {}]
    if group is not None:
        rank, num_ranks = group.rank(), group.size()
        dist.broadcast_object_list(box, src=0)
    before, answers = box[0], {}
    num_before, stream = 0, iter(questions)
    failed: dict[str, list[str]] = {}
    with tqdm(desc=title, unit=" questions", disable=not collects) as bar:
        while True:
            mine: list[Asked] = []
            num_read = num_open = 0
            for question in islice(stream, batch_size * num_ranks):
                num_read += 1
                if not set(views) & set(question.views):
                    failed[question.id] = [f"{question.id}: has neither a box nor a crop"]
                kept = {v: again for v in views if (again := _known(before.get((question.id, v)), question))}
                answers |= {(question.id, view): answer for view, answer in kept.items()}
                num_before += len(kept)
                if missing := [view for view in question.views if view in views and view not in kept]:
                    if num_open % num_ranks == rank:  # the others' images are forgotten at once
                        mine += [(question, view) for view in missing]
                    num_open += 1
            if not num_read:
                break
            news = map(_answer, mine, model(mine)) if num_open else ()
            for new in news if group is None else parallel.gather_all(list(news), group):
                if isinstance(new, NotAnswered):
                    failed.setdefault(new.id, []).append(new.reason)
                    continue
                answers[new.id, new.view] = new
                if file is not None:
                    file.write(new)
            bar.update(num_read)
    answered = {name for name, _ in answers}
    partly = [reason for name, reasons in failed.items() if name in answered for reason in reasons]
    unusable += ["; ".join(reasons) for name, reasons in failed.items() if name not in answered]
    if partly and collects:
        print(f"{title}: questions used without one of their views: {len(partly)} ({partly[0]})", flush=True)
    if num_before and collects:
        print(f"{title}: {num_before} answers were there already", flush=True)
    return list(answers.values())


def _known(answer: Answer | None, question: Question) -> Answer | None:
    """An earlier `answer` to the same question about the same image, with the key that `question` has now."""
    if answer is None or answer.question != question.prompt or answer.cluster != question.cluster():
        return None
    return Answer.of(question, answer.view, answer.reply, answer.evidence)


def _answer(asked: Asked, reply: str | NotAnswered) -> Answer | NotAnswered:
    question, view = asked
    if isinstance(reply, NotAnswered):
        return NotAnswered(f"{question.id}, {view} view: {reply.reason}", question.id)
    return Answer.of(question, view, reply, question.evidence_size())
