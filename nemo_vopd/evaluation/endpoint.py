"""An OpenAI-compatible server (vLLM, SGLang, a hosted model): the model under test, or the judge of its answers."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import APIError, APIStatusError, OpenAI

from nemo_vopd.data.views import UnusableSample
from nemo_vopd.errors import OptionError, RunError
from nemo_vopd.evaluation.options import EndpointConfig

Content = list[dict[str, Any]]


class Endpoint:
    """Asks one model; requests run side by side, passing faults are tried again."""

    def __init__(self, options: EndpointConfig, name: str) -> None:
        """`name` is that of the options in messages (server | judge). Raises OptionError."""
        if options.url is None or options.model is None:
            missing = "url" if options.url is None else "model"
            remedy = f"give {name}.url=http://HOST:PORT/v1 and {name}.model=NAME"
            raise OptionError(f"{name}.{missing}", None, "is needed to ask a server", remedy)
        self.options, self.name = options, name
        key = os.environ.get(options.api_key_variable, "none")
        self._client = OpenAI(
            base_url=options.url, api_key=key, timeout=options.timeout_seconds, max_retries=options.retries
        )

    def ask_all(self, requests: Sequence[Callable[[], Content]], max_tokens: int) -> Iterator[str | UnusableSample]:
        """The reply to each request (it makes the content of one user message), greedy, in order.

        A request that raises UnusableSample has it for a reply. Raises RunError.
        """

        def ask(request: Callable[[], Content]) -> str | UnusableSample:
            try:
                content = request()
            except UnusableSample as unusable:
                return unusable
            return self._ask(content, max_tokens)

        with ThreadPoolExecutor(self.options.max_concurrent_requests) as pool:
            futures = [pool.submit(ask, request) for request in requests]
            try:
                for future in futures:
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()

    def _ask(self, content: Content, max_tokens: int) -> str:
        url, name = self.options.url, self.name
        try:
            reply = self._client.chat.completions.create(
                model=self.options.model or "",
                messages=[{"role": "user", "content": content}],  # type: ignore[list-item]
                temperature=0.0,
                max_tokens=max_tokens,
                extra_body=self.options.extra_body or None,
            )
        except APIStatusError as error:
            reason = " ".join(str(error.message).split())[:300]
            raise RunError(f"{name}.url={url} refuses a request (HTTP {error.status_code}: {reason})") from None
        except APIError as error:
            reason = " ".join(str(error.__cause__ or error.message).split())[:300]
            again = "what was answered is kept, the same command goes on"
            raise RunError(f"{name}.url={url} does not answer ({reason}); {again}") from None
        if not reply.choices:
            raise RunError(f"{name}.url={url} sent a reply without choices; is it an OpenAI-compatible endpoint?")
        return reply.choices[0].message.content or ""


def image_content(media_type: str, file: bytes) -> dict[str, Any]:
    """An image file as a part of a message."""
    data = base64.b64encode(file).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{data}"}}


def text_content(text: str) -> dict[str, Any]:
    """`text` as a part of a message."""
    return {"type": "text", "text": text}
