"""Signs of life: long work says that it goes on, and a process that says nothing for too long is ended.

The clock is Python's faulthandler: a thread in C, which runs even while the interpreter is stuck in a call, writes the
stack of every thread to standard error and ends the process with code 1.
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import time
from collections.abc import Iterator

_MARGIN = 1.1
"""The limit of `parallel.timeout_minutes` first ends waits between ranks, whose errors say more."""
_EVERY = 1.0
"""Seconds between settings of the clock; each starts a thread."""


class _Clock:
    limit: float | None = None
    set_at = 0.0


@contextlib.contextmanager
def watched(minutes: float) -> Iterator[None]:
    """While entered, `minutes` (and a tenth) without a call of `beat` end this process with all stacks."""
    _Clock.limit, _Clock.set_at = 60 * minutes * _MARGIN, 0.0
    beat()
    try:
        yield
    finally:
        _Clock.limit = None
        faulthandler.cancel_dump_traceback_later()


def beat() -> None:
    """Say that work goes on; cheap enough for each token, and without effect while nobody watches."""
    now = time.monotonic()
    if _Clock.limit is not None and now - _Clock.set_at > min(_EVERY, _Clock.limit / 10):
        _Clock.set_at = now
        faulthandler.dump_traceback_later(_Clock.limit, exit=True, file=sys.stderr)
