"""Questions to a model, on the native engine or a server: in batches, each question once, in the order of the data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from nemo_vopd.batch import View
from nemo_vopd.config import DataConfig
from nemo_vopd.data.processor import Processor
from nemo_vopd.mcore import parallel
from nemo_vopd.rollout.native.engine import Decoder
from nemo_vopd.tools.evaluation.answers import Answer, AnswersFile, NotAnswered
from nemo_vopd.tools.evaluation.chat_server import Endpoint
from nemo_vopd.tools.evaluation.gap import greedy
from nemo_vopd.tools.evaluation.questions import Question
from nemo_vopd.views import UnusableSample

Asked = tuple[Question, str]
"""A question and the view that it is about; its image is decoded when it is its turn."""
Model = Callable[[list[Asked]], Iterable[str | NotAnswered]]
"""Gives a reply to each question, in order, as they come."""

_NUM_BLOCKS, _BLOCK_BYTES = 16, 1 << 16


def native_model(decoder: Decoder, processor: Processor, data: DataConfig, max_response_length: int) -> Model:
    """The model of `decoder`; images are resized as in training, by data.full and data.crop_pixels."""
    params = greedy(processor, max_response_length)
    pixels = {"full": data.full, "crop": data.crop_pixels}

    def reply(asked: list[Asked]) -> list[str | NotAnswered]:
        replies: dict[int, str | NotAnswered] = {}
        views: dict[int, View] = {}
        for place, (question, view) in enumerate(asked):
            try:
                views[place] = processor.view([question.image(view, data)], question.prompt, [pixels[view]])
            except UnusableSample as unusable:
                replies[place] = NotAnswered(str(unusable))
        names = [f"{question.id}/{view}" for question, view in map(asked.__getitem__, views)]
        for place, responses in zip(views, decoder(list(views.values()), names, params), strict=True):
            replies[place] = processor.decode(responses[0][0])
        return [replies[place] for place in range(len(asked))]

    return reply


def served_model(endpoint: Endpoint, data: DataConfig, max_response_length: int) -> Model:
    """The model behind `endpoint`, which resizes images itself. Raises RunError when asked in vain."""

    def reply(asked: list[Asked]) -> Iterable[str | NotAnswered]:
        requests = [(question.prompt, partial(question.file, view, data)) for question, view in asked]
        return endpoint.ask_all(requests, max_response_length)

    return reply


def weights_fingerprint(folder: Path) -> str:
    """A hash of the sizes of the weight files in `folder` and of some blocks of each: an export there changes it."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for part in range(_NUM_BLOCKS):
                stream.seek(max(0, size - _BLOCK_BYTES) * part // (_NUM_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]


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
    rank. What cannot be shown goes to `unusable`.
    """
    rank, num_ranks, collects = 0, 1, parallel.is_rank_zero()
    box = [dict(file.answers) if file is not None else {}]
    if group is not None:
        rank, num_ranks = group.rank(), group.size()
        dist.broadcast_object_list(box, src=0)
    before, answers = box[0], {}
    num_before, stream = 0, iter(questions)
    with tqdm(desc=title, unit=" questions", disable=not collects) as bar:
        while True:
            mine: list[Asked] = []
            num_read = num_open = 0
            for question in islice(stream, batch_size * num_ranks):
                num_read += 1
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
                    unusable.append(new.reason)
                    continue
                answers[new.id, new.view] = new
                if file is not None:
                    file.write(new)
            bar.update(num_read)
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
        return NotAnswered(f"{question.id}, {view} view: {reply.reason}")
    return Answer.of(question, view, reply, question.evidence_size())
