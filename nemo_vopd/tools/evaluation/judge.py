"""A language model decides where rules cannot: whether a reply says the same as the answer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from nemo_vopd.errors import OptionError
from nemo_vopd.tools.evaluation.answers import Answer
from nemo_vopd.tools.evaluation.endpoint import Endpoint, text_content
from nemo_vopd.tools.evaluation.extraction import final_answer
from nemo_vopd.tools.evaluation.options import JudgeConfig

PROMPT = """A question about an image was answered. Decide whether the reply gives the reference answer.

Question: {question}
Reference answer: {answer}
Reply: {reply}

The wording may differ, the content may not: another number, colour, name, direction or letter is wrong, and so is a \
reply that leaves several answers open or gives none. Say only Yes (the reply is right) or No (it is wrong)."""
_AT_ONCE = 256


class Judge:
    """Asks about each pair of answer and reply once; verdicts are kept in `path` for the next time."""

    def __init__(self, options: JudgeConfig, path: Path | None) -> None:
        """Raises OptionError when judge.url or judge.model is missing."""
        self.endpoint, self.path, self.max_tokens = Endpoint(options, "judge"), path, options.max_tokens
        self.verdicts = _read(path) if path is not None and path.exists() else {}

    def __call__(self, answers: Sequence[Answer]) -> list[bool | None]:
        """Whether each of `answers` is right; None where the judge says neither. Raises RunError when it fails."""
        keys = [self._key(answer) for answer in answers]
        todo = {key: answer for key, answer in zip(keys, answers, strict=True) if key not in self.verdicts}
        waiting = iter(todo.items())
        with tqdm(total=len(todo), desc="judge", unit=" replies", disable=not todo) as bar:
            while some := list(islice(waiting, _AT_ONCE)):
                requests = [lambda a=answer: [text_content(question_for(a))] for _, answer in some]
                replies = self.endpoint.ask_all(requests, self.max_tokens)
                for (key, answer), reply in zip(some, replies, strict=True):
                    if (right := read_verdict(reply if isinstance(reply, str) else "")) is not None:
                        self._keep(key, answer, right)
                    bar.update()
        return [self.verdicts.get(key) for key in keys]

    def _key(self, answer: Answer) -> str:
        return hashlib.sha256(f"{self.endpoint.options.model}\n{question_for(answer)}".encode()).hexdigest()

    def _keep(self, key: str, answer: Answer, right: bool) -> None:
        self.verdicts[key] = right
        if self.path is not None:
            line = {"key": key, "right": right, "id": answer.id, "view": answer.view, "reply": answer.reply}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _read(path: Path) -> dict[str, bool]:
    """Earlier verdicts; a line cut off by the end of a process is left out."""
    text = path.read_text(encoding="utf-8")
    try:
        verdicts = [json.loads(line) for line in text[: text.rfind("\n") + 1].split("\n")[:-1]]
        return {str(verdict["key"]): bool(verdict["right"]) for verdict in verdicts}
    except (ValueError, TypeError, KeyError):
        rule = f"{path.name} beside it is no file of verdicts"
        raise OptionError("output", path, rule, "remove that file, or name another output") from None


def question_for(answer: Answer) -> str:
    """What the judge is asked about `answer`: reasoning of the model is left out."""
    reference = answer.answer
    if answer.options.get(reference):
        reference = f"({reference}) {answer.options[reference]}"
    return PROMPT.format(question=answer.question, answer=reference, reply=final_answer(answer.reply))


def read_verdict(reply: str) -> bool | None:
    """Yes or No in the judge's reply, after its reasoning if it gives one; None if it says neither or both."""
    words = re.findall(r"[a-z]+", reply.rsplit("</think>", 1)[-1].lower())
    said = {word for word in words if word in ("yes", "no")}
    return said == {"yes"} if len(said) == 1 else None
