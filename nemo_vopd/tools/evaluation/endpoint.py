"""An OpenAI-compatible server (vLLM, SGLang, a hosted model): the model under test, or the judge of its answers."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nemo_vopd.errors import OptionError, RunError
from nemo_vopd.http import JSONClient, RequestFailed
from nemo_vopd.tools.evaluation.answers import NotAnswered
from nemo_vopd.tools.evaluation.options import EndpointConfig
from nemo_vopd.views import UnusableSample

Content = list[dict[str, Any]]
_REFUSES_ONE = (400, 413, 422)
"""A prompt beyond the server's length, an image it cannot take: this question alone."""
_MOST_REFUSED = 20
_AGAIN = "what was answered is kept, the same command goes on"


class Endpoint:
    """Asks one model; requests run side by side, passing faults are tried again."""

    def __init__(self, options: EndpointConfig, name: str) -> None:
        """`name` is that of the options in messages (server | judge). Raises OptionError."""
        if options.url is None or options.model is None:
            missing = "url" if options.url is None else "model"
            remedy = f"give {name}.url=http://HOST:PORT/v1 and {name}.model=NAME"
            raise OptionError(f"{name}.{missing}", None, "is needed to ask a server", remedy)
        self.options, self.name = options, name
        self._num_answered = self._num_refused = 0
        self._client = JSONClient(
            options.url,
            timeout_seconds=options.timeout_seconds,
            retries=options.retries,
            pause_seconds=0.5,
            key=os.environ.get(options.api_key_variable, "none"),
            proxies=True,
        )

    def ask_all(self, requests: Sequence[Callable[[], Content]], max_tokens: int) -> Iterator[str | NotAnswered]:
        """The reply to each request (it makes the content of one user message), greedy, in order.

        NotAnswered: making a request raised UnusableSample, or the server refuses this one (too long, say). Raises
        RunError when it refuses all of them or does not answer.
        """

        def ask(request: Callable[[], Content]) -> str | NotAnswered:
            try:
                content = request()
            except UnusableSample as unusable:
                return NotAnswered(str(unusable))
            return self._ask(content, max_tokens)

        with ThreadPoolExecutor(self.options.max_concurrent_requests) as pool:
            futures = [pool.submit(ask, request) for request in requests]
            try:
                for future in futures:
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()

    def _ask(self, content: Content, max_tokens: int) -> str | NotAnswered:
        where = f"{self.name}.url={self.options.url}"
        request = {"model": self.options.model, "messages": [{"role": "user", "content": content}]}
        request |= {"temperature": 0.0, "max_tokens": max_tokens, **(self.options.extra_body or {})}
        try:
            reply = self._client.call("/chat/completions", request)
            text = reply["choices"][0]["message"].get("content") or ""
            if not isinstance(text, str):
                raise TypeError("the content is no text")
        except RequestFailed as failed:
            code, reason = failed.status, f"HTTP {failed.status}: {failed.message}"
            if code in _REFUSES_ONE and not self._refuses_all():
                return NotAnswered(f"refused ({reason})")
            if code is not None and code < 300:
                what = f"sent what is no chat completion ({failed.message}); does the address end in /v1?"
            elif failed.may_pass:
                what = f"does not answer ({failed.message if code is None else reason}); {_AGAIN}"
            else:
                key = f"; the key is read from {self.options.api_key_variable}" if code in (401, 403) else ""
                what = f"refuses a request ({reason}){key}"
            raise RunError(f"{where} {what}") from None
        except (TypeError, AttributeError, IndexError, KeyError) as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise RunError(f"{where} sent what is no chat completion ({what}); does the address end in /v1?") from None
        self._num_answered += 1
        return text.encode("utf-8", "replace").decode()  # half a surrogate pair can be sent, but not written

    def _refuses_all(self) -> bool:
        """Whether refusals have become the rule: then the model's name or an option is wrong, not a question."""
        self._num_refused += 1
        return self._num_answered == 0 and self._num_refused > _MOST_REFUSED


def image_content(media_type: str, file: bytes) -> dict[str, Any]:
    """An image file as a part of a message."""
    data = base64.b64encode(file).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{data}"}}


def text_content(text: str) -> dict[str, Any]:
    """`text` as a part of a message."""
    return {"type": "text", "text": text}
