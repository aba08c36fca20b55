"""An OpenAI-compatible server (vLLM, SGLang, a hosted model): the model under test, or the judge of its answers."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import batched
from pathlib import Path

from tqdm import tqdm

from nemo_vopd.config import DataConfig
from nemo_vopd.errors import OptionError, RunError
from nemo_vopd.http import JSONClient, RequestFailed
from nemo_vopd.images import UnusableSample
from nemo_vopd.tools.evaluation.asking import Answer, Asked, Model, NotAnswered, complete_lines
from nemo_vopd.tools.evaluation.evaluate_options import EndpointConfig, JudgeConfig
from nemo_vopd.tools.evaluation.extraction import final_answer

_REFUSES_ONE = (400, 413, 422)
"""A prompt beyond the server's length, an image it cannot take: this question alone."""
_MOST_REFUSED = 20
_AGAIN = "what was answered is kept, the same command goes on"
_SLASH_V1 = "does the address end in /v1?"
_JUDGED_AT_ONCE = 256
JUDGE_PROMPT = """A question about an image was answered. Decide whether the reply gives the reference answer.

Question: {question}
Reference answer: {answer}
Reply: {reply}

The wording may differ, the content may not: another number, colour, name, direction or letter is wrong, and so is a \
reply that leaves several answers open or gives none. Say only Yes (the reply is right) or No (it is wrong)."""


class Endpoint:
    """Asks one model; requests run side by side, passing faults are tried again."""

    def __init__(self, options: EndpointConfig, name: str) -> None:
        """`name` is that of the options in messages (server | judge). Raises OptionError."""
        if options.url is None or options.model is None:
            missing = "url" if options.url is None else "model"
            remedy = f"give {name}.url=http://HOST:PORT/v1 and {name}.model=NAME"
            raise OptionError(f"{name}.{missing}", None, "is needed to ask a server", remedy)
        self.options, self._where = options, f"{name}.url={options.url}"
        self._num_answered = self._num_refused = 0
        self._client = JSONClient(
            options.url,
            timeout_seconds=options.timeout_seconds,
            retries=options.retries,
            pause_seconds=0.5,
            key=os.environ.get(options.api_key_variable, "none"),
            proxies=True,
        )

    def ask_all(
        self, requests: Sequence[tuple[str, Callable[[], tuple[str, bytes]] | None]], max_tokens: int
    ) -> Iterator[str | NotAnswered]:
        """The reply to each request (a text, and what gives its image as media type and file), greedy, in order.

        NotAnswered: the image raised UnusableSample, or the server refuses this request (too long, say). Raises
        RunError when it refuses all of them or does not answer.
        """
        with ThreadPoolExecutor(self.options.max_concurrent_requests) as pool:
            yield from pool.map(lambda request: self._ask(request[0], request[1], max_tokens), requests)

    def _ask(self, text: str, image: Callable[[], tuple[str, bytes]] | None, max_tokens: int) -> str | NotAnswered:
        content: list[dict] = [{"type": "text", "text": text}]
        try:
            if image is not None:
                media_type, file = image()
                url = f"data:{media_type};base64,{base64.b64encode(file).decode()}"
                content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        except UnusableSample as unusable:
            return NotAnswered(str(unusable))
        request = {"model": self.options.model, "messages": [{"role": "user", "content": content}]}
        request |= {"temperature": 0.0, "max_tokens": max_tokens, **(self.options.extra_body or {})}
        try:
            reply = self._client.call("/chat/completions", request)["choices"][0]["message"].get("content") or ""
            if not isinstance(reply, str):
                raise TypeError("the content is no text")
        except RequestFailed as failed:
            code, reason = failed.status, f"HTTP {failed.status}: {failed.message}"
            if code in _REFUSES_ONE:
                self._num_refused += 1
                # where refusals are the rule, the model's name or an option is wrong, not a question
                if self._num_answered or self._num_refused <= _MOST_REFUSED:
                    return NotAnswered(f"refused ({reason})")
            if code is not None and code < 300:
                what = f"sent what is no chat completion ({failed.message}); {_SLASH_V1}"
            elif failed.may_pass:
                what = f"does not answer ({failed.message if code is None else reason}); {_AGAIN}"
            else:
                key = f"; the key is read from {self.options.api_key_variable}" if code in (401, 403) else ""
                what = f"refuses a request ({reason}){key}"
            raise RunError(f"{self._where} {what}") from None
        except (TypeError, AttributeError, IndexError, KeyError) as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise RunError(f"{self._where} sent what is no chat completion ({what}); {_SLASH_V1}") from None
        self._num_answered += 1
        return reply.encode("utf-8", "replace").decode()  # half a surrogate pair can be sent, but not written


def served_model(endpoint: Endpoint, data: DataConfig, max_response_length: int) -> Model:
    """The model behind `endpoint`, which resizes images itself. Raises RunError when asked in vain."""

    def reply(asked: list[Asked]) -> Iterator[str | NotAnswered]:
        requests = [(question.prompt, partial(question.file, view, data)) for question, view in asked]
        return endpoint.ask_all(requests, max_response_length)

    return reply


class Judge(Endpoint):
    """A language model that decides where rules cannot whether a reply says the same as the answer.

    It is asked about each pair of answer and reply once; verdicts are kept in `path` for the next time.
    """

    def __init__(self, options: JudgeConfig, path: Path | None) -> None:
        """Raises OptionError: judge.url or judge.model is missing, or `path` is no file of verdicts (output)."""
        super().__init__(options, "judge")
        self.path, self.max_tokens = path, options.max_tokens
        self.verdicts: dict[str, bool] = {}
        if path is None or not path.exists():
            return
        try:
            for verdict in map(json.loads, complete_lines(path)):
                self.verdicts[str(verdict["key"])] = bool(verdict["right"])
        except (ValueError, TypeError, KeyError):
            rule = f"{path.name} beside it is no file of verdicts"
            raise OptionError("output", path, rule, "remove that file, or name another output") from None

    def __call__(self, answers: Sequence[Answer]) -> list[bool | None]:
        """Whether each of `answers` is right; None where the judge says neither. Raises RunError when it fails."""
        questions = [_question(answer) for answer in answers]
        todo = {q: answer for q, answer in zip(questions, answers, strict=True) if self._key(q) not in self.verdicts}
        with tqdm(total=len(todo), desc="judge", unit=" replies", disable=not todo) as bar:
            for some in batched(todo.items(), _JUDGED_AT_ONCE):
                replies = self.ask_all([(question, None) for question, _ in some], self.max_tokens)
                for (question, answer), reply in zip(some, replies, strict=True):
                    if (right := read_verdict(reply if isinstance(reply, str) else "")) is not None:
                        self._keep(self._key(question), answer, right)
                    bar.update()
        return [self.verdicts.get(self._key(question)) for question in questions]

    def _key(self, question: str) -> str:
        return hashlib.sha256(f"{self.options.model}\n{question}".encode()).hexdigest()

    def _keep(self, key: str, answer: Answer, right: bool) -> None:
        self.verdicts[key] = right
        if self.path is not None:
            line = {"key": key, "right": right, "id": answer.id, "view": answer.view, "reply": answer.reply}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _question(answer: Answer) -> str:
    """What the judge is asked about `answer`: reasoning of the model is left out."""
    options = answer.options
    reference = " or ".join(f"({one}) {options[one]}" if options.get(one) else one for one in answer.accepted)
    return JUDGE_PROMPT.format(question=answer.question, answer=reference, reply=final_answer(answer.reply))


def read_verdict(reply: str) -> bool | None:
    """Yes or No in the judge's reply, after its reasoning if it gives one; None if it says neither or both."""
    words = re.findall(r"[a-z]+", reply.rsplit("</think>", 1)[-1].lower())
    said = {word for word in words if word in ("yes", "no")}
    return said == {"yes"} if len(said) == 1 else None
