"""JSON over HTTP, tried again where a failure may pass: vLLM's servers, a model under test, a judge."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from typing import Any

import httpx2

_LONGEST_PAUSE = 30.0
"""Longest pause between two attempts in seconds; a server may ask for twice as much."""
_PASSING = (408, 409, 429)
"""Codes below 500 after which the same request may succeed: timeout, conflict, too many requests."""


class RequestFailed(Exception):
    """A request that was not answered as asked."""

    def __init__(self, message: str, status: int | None = None, *, may_pass: bool = True) -> None:
        """`message` is one line; `status` is the server's code, None where none came.

        `may_pass` says whether the same request may succeed later.
        """
        super().__init__(message)
        self.message, self.status, self.may_pass, self.attempts = message, status, may_pass, 1


class JSONClient:
    """Asks the server at one address, from any thread, with a connection for each request."""

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float,
        retries: int,
        pause_seconds: float = 1.0,
        key: str | None = None,
        proxies: bool = False,
    ) -> None:
        """A request that fails, or takes `timeout_seconds`, is repeated `retries` times.

        The first pause is `pause_seconds`, each further one twice as long, unless the server asks for another. `key`
        goes with each request; `proxies` says whether those of the environment are used.
        """
        self.url, self.retries, self.pause_seconds = url.rstrip("/"), retries, pause_seconds
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # else a line for each request
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        limits = httpx2.Limits(max_keepalive_connections=0)  # a server may close one that is kept, which looks lost
        self._http = httpx2.Client(
            headers=headers, timeout=timeout_seconds, limits=limits, trust_env=proxies, follow_redirects=True
        )

    def call(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,
        given_up: threading.Event | None = None,
    ) -> Any:
        """The JSON answer to a GET, or to a POST of `body`; None if it is empty. Raises RequestFailed.

        `given_up` ends the waiting between two attempts. A page of HTML is not asked for again: it comes from another
        program than the one that was meant.
        """
        given_up, attempt = given_up or threading.Event(), 0
        options: Any = {} if timeout is None else {"timeout": timeout}
        # in ASCII, because half a surrogate pair, which a reply can hold, cannot be encoded otherwise
        content = None if body is None else json.dumps(body).encode()
        while True:
            pause = min(self.pause_seconds * 2**attempt, _LONGEST_PAUSE)
            try:
                answer = self._http.request(
                    "GET" if body is None else "POST", self.url + path, content=content, **options
                )
                if answer.is_success:
                    return json.loads(answer.content) if answer.content else None
                code = answer.status_code
                failed = RequestFailed(_message(answer), code, may_pass=code >= 500 or code in _PASSING)
                with contextlib.suppress(ValueError):
                    pause = min(float(answer.headers.get("Retry-After", pause)), 2 * _LONGEST_PAUSE)
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                failed = RequestFailed(_cause(error))
            except ValueError as error:
                page = answer.content.lstrip().startswith(b"<")
                failed = RequestFailed(f"no JSON: {_one_line(error)}", answer.status_code, may_pass=not page)
            failed.attempts = attempt = attempt + 1
            if not failed.may_pass or attempt > self.retries or given_up.wait(max(0.0, pause)):
                raise failed


def _message(answer: httpx2.Response) -> str:
    text: Any = answer.text
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return _one_line(text) or answer.reason_phrase


def _cause(error: Exception) -> str:
    """What the system said ("Connection refused"), else the library."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return _one_line(error) or type(error).__name__


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:500]
