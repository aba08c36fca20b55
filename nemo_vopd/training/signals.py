"""SIGINT, SIGTERM and SIGUSR1, remembered. Imports nothing heavy: a recipe listens before it loads Megatron."""

from __future__ import annotations

import os
import signal

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """While entered, remembers the signals: the run ends at the next step boundary, not in a collective.

    A second SIGINT (Ctrl-C) ends the process at once.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._process = os.getpid()

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
        name = signal.Signals(number).name
        if name == "SIGINT" and os.getpid() == self._process:  # a terminal sends it to the loader's processes, too
            again = self.received == name
            if again or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
                then = "ended at once" if again else "the run ends and is saved after this step; again: ends at once"
                os.write(2, f"\ninterrupted: {then}\n".encode())  # safe in a handler
            if again:
                os._exit(130)
        self.received = name
