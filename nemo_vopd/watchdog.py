"""A watchdog ends a process that has stopped to work: code that may run for long calls `beat` as it goes on.

The watchdog is Python's faulthandler. Its thread is written in C and runs even while the interpreter is stuck in a
call; it writes the stack of every thread to standard error and ends the process with code 1.
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import time
from collections.abc import Iterator

_MARGIN = 1.1
"""Factor on the limit: a wait for another rank ends at the limit itself, and its error says more than a stack."""
_EVERY = 1.0
"""Shortest time in seconds between two settings of the timer, each of which starts a thread."""


class _Timer:
    limit: float | None = None
    set_at = 0.0


@contextlib.contextmanager
def watched(minutes: float) -> Iterator[None]:
    """Within it, the process ends with all stacks after `minutes` and a tenth more without a call of `beat`."""
    _Timer.limit, _Timer.set_at = 60 * minutes * _MARGIN, 0.0
    beat()
    try:
        yield
    finally:
        _Timer.limit = None
        faulthandler.cancel_dump_traceback_later()


def beat() -> None:
    """Tell the watchdog that work goes on. It costs little enough for each token, and nothing outside of `watched`."""
    now = time.monotonic()
    if _Timer.limit is not None and now - _Timer.set_at > min(_EVERY, _Timer.limit / 10):
        _Timer.set_at = now
        faulthandler.dump_traceback_later(_Timer.limit, exit=True, file=sys.stderr)
