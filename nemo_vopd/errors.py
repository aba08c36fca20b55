"""What ends a run with one line: a user's mistake (option, value, rule, remedy), or a fault no option can mend."""

from __future__ import annotations

import re

_BREAKS = re.compile("[\t-\r\x85\u2028\u2029]+")
_CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]")
"""C0 and C1, marks that turn the direction of text around, invisible format characters, halves of surrogate pairs."""


def printable(text: object) -> str:
    """`text` on one line and safe to print: a server or a data set could send sequences that a terminal obeys.

    Line breaks and tabs become a space, control characters and marks of direction a question mark.
    """
    return _CONTROLS.sub("?", _BREAKS.sub(" ", str(text)))


class OptionError(ValueError):
    """A wrong value given by the user; recipes print it as one line and exit with code 2."""

    def __init__(self, option: str, value: object, rule: str, remedy: str) -> None:
        """Name the `option` as it is typed, the offending `value`, the `rule` it breaks and the `remedy`.

        A `value` of ... stands for an option that was typed without one.
        """
        super().__init__(f"{option}{'' if value is ... else f'={value}'}: {rule}; {remedy}")
        self.option, self.value, self.rule, self.remedy = option, value, rule, remedy

    def __reduce__(self):
        """Keep the four parts when the error crosses a process boundary (data workers)."""
        return OptionError, (self.option, self.value, self.rule, self.remedy)


class RunError(RuntimeError):
    """The run cannot go on, through no option of the user's; recipes print the message and exit with code 1."""


class EngineLost(RunError):
    """The rollout engine does not answer; raised alike on every rank, before a step has changed anything."""
