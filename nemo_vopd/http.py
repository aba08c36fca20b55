"""JSON over HTTP, tried again where a failure may pass: vLLM's servers, a model under test, a judge."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from typing import Any

import httpx2

from nemo_vopd.errors import printable
from nemo_vopd.watchdog import beat

_LONGEST_PAUSE = 30.0
"""Longest pause between two attempts in seconds; a server may ask for twice as much."""
_PASSING = (408, 409, 429)
"""Codes below 500 after which the same request may succeed: timeout, conflict, too many requests."""
_LARGEST_REPLY = 2**24
"""Bytes that a reply may have, unless a request asks for more."""


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
        """A request that fails is repeated `retries` times; so is one that is not answered whole in `timeout_seconds`.

        The first pause is `pause_seconds`, each further one twice as long, unless the server asks for another. `key`
        goes with each request; `proxies` says whether those of the environment are used. Redirections are not followed.
        """
        self.url, self.retries, self.pause_seconds = url.rstrip("/"), retries, pause_seconds
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # else a line for each request
        # not compressed: a small reply could unfold to any size
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx2.Limits(max_keepalive_connections=0)  # a server may close one that is kept, which looks lost
        self._timeout = timeout_seconds
        self._http = httpx2.Client(headers=headers, limits=limits, trust_env=proxies)

    def call(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,
        largest_reply: int = _LARGEST_REPLY,
        given_up: threading.Event | None = None,
    ) -> Any:
        """The JSON answer to a GET, or to a POST of `body`; None if it is empty. Raises RequestFailed.

        `timeout` replaces the client's, `largest_reply` is in bytes, and `given_up` ends the waiting between two
        attempts. A page of HTML is not asked for again: it comes from another program than the one that was meant.
        """
        given_up, attempt = given_up or threading.Event(), 0
        seconds = self._timeout if timeout is None else timeout
        # in ASCII, because half a surrogate pair, which a reply can hold, cannot be encoded otherwise
        content = None if body is None else json.dumps(body).encode()
        method = "GET" if body is None else "POST"
        while True:
            beat()
            pause = min(self.pause_seconds * 2**attempt, _LONGEST_PAUSE)
            try:
                answer, reply = self._exchange(method, self.url + path, content, seconds, largest_reply)
                if answer.is_success:
                    return _parse(reply, answer.status_code)
                code = answer.status_code
                failed = RequestFailed(_message(answer, reply), code, may_pass=code >= 500 or code in _PASSING)
                with contextlib.suppress(ValueError):
                    pause = min(float(answer.headers.get("Retry-After", pause)), 2 * _LONGEST_PAUSE)
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                failed = RequestFailed(_cause(error))
            except RequestFailed as error:
                failed = error
            failed.attempts = attempt = attempt + 1
            if not failed.may_pass or attempt > self.retries or given_up.wait(max(0.0, pause)):
                raise failed

    def _exchange(
        self, method: str, url: str, content: bytes | None, seconds: float, largest: int
    ) -> tuple[httpx2.Response, bytes]:
        """The response to one request, and its content."""
        with _Deadline(seconds) as deadline:
            extensions = {"trace": deadline.trace}
            with self._http.stream(method, url, content=content, timeout=seconds, extensions=extensions) as answer:
                reply = bytearray()
                for piece in answer.iter_raw():
                    reply += piece
                    if len(reply) > largest:
                        raise RequestFailed(f"the reply has more than {largest} bytes", answer.status_code)
        return answer, bytes(reply)


class _Deadline:
    """Ends one exchange that is not complete after some seconds, however its bytes trickle.

    The time limits of httpx2 are those of a socket: each byte that arrives begins them anew.
    """

    def __init__(self, seconds: float) -> None:
        self._passed, self._socket = False, None
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Raise TimeoutException when the time was over: what ended then may look complete."""
        self._timer.cancel()
        self._check()

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Called by httpx2 at each stage of the exchange."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._socket = info["return_value"].get_extra_info("socket")
        self._check()

    def _check(self) -> None:
        if self._passed:
            raise httpx2.TimeoutException("timed out")

    def _end(self) -> None:
        self._passed = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                # the base class's method, because that of an encrypted socket is not made for another thread
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


def _parse(reply: bytes, status: int) -> Any:
    try:
        return json.loads(reply) if reply else None
    except (ValueError, RecursionError) as error:
        page = reply.lstrip().startswith(b"<")
        raise RequestFailed(f"no JSON: {_one_line(error)}", status, may_pass=not page) from None


def _message(answer: httpx2.Response, reply: bytes) -> str:
    if answer.next_request is not None:
        return _one_line(f"it has moved to {answer.next_request.url}")
    text: Any = reply.decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        text = json.loads(text)["error"]["message"]
    return _one_line(text) or _one_line(answer.reason_phrase)


def _cause(error: Exception) -> str:
    """What the system said ("Connection refused"), else the library."""
    cause: BaseException | None = None if isinstance(error, httpx2.TimeoutException) else error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return _one_line(error) or type(error).__name__


def _one_line(text: object) -> str:
    return printable(" ".join(str(text).split())[:500])
