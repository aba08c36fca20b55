"""SIGTERM and SIGUSR1, remembered. Imports nothing heavy: a recipe listens before it loads Megatron."""

from __future__ import annotations

import signal

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """While entered, remembers SIGTERM and SIGUSR1: the run ends at the next step boundary, not in a collective."""

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> StopSignals:
        """Listen."""
        self._previous = {number: signal.getsignal(number) for number in _SIGNALS}
        self.listen()
        return self

    def listen(self) -> None:
        """Take the signals (again: Lightning's handler would leave the loop of one rank alone, without a save)."""
        for number in _SIGNALS:
            signal.signal(number, self._remember)

    def __exit__(self, *_: object) -> None:
        """Hand the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number).name
