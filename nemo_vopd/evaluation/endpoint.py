"""An OpenAI-compatible server (vLLM, SGLang, a hosted model): the model under test, or the judge of its answers."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import APIError, APIStatusError, OpenAI
from PIL import Image

from nemo_vopd.errors import OptionError, RunError
from nemo_vopd.evaluation.options import EndpointConfig


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

    def ask_all(self, requests: list[list[dict[str, Any]]], max_tokens: int) -> Iterator[str]:
        """The reply to each request (the content of one user message), greedy, in order. Raises RunError."""
        with ThreadPoolExecutor(self.options.max_concurrent_requests) as pool:
            futures = [pool.submit(self._ask, content, max_tokens) for content in requests]
            try:
                for future in futures:
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()

    def _ask(self, content: list[dict[str, Any]], max_tokens: int) -> str:
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


def image_content(image: Image.Image) -> dict[str, Any]:
    """`image` as a part of a message: a PNG, so that the server sees the very pixels."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def text_content(text: str) -> dict[str, Any]:
    """`text` as a part of a message."""
    return {"type": "text", "text": text}
