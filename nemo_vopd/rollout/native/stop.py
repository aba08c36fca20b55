"""Stop strings: a response ends with the token that completes one of them."""

from __future__ import annotations

from collections.abc import Callable

_MARGIN = 4
"""Characters at the start of a decoded tail that are not trusted: part of a character, a space left out."""


class StopStrings:
    """Looks for stop strings where a response has just grown; only its tail is decoded."""

    def __init__(self, stop: tuple[str, ...], decode: Callable[[list[int]], str] | None) -> None:
        """`decode` turns token ids into text; without `stop` it is not needed."""
        if stop and decode is None:
            raise ValueError("stop strings need a function that decodes token ids")
        if "" in stop:
            raise ValueError("a stop string must not be empty")
        self.stop, self.decode = stop, decode
        self.longest = max(map(len, stop), default=0)
        self._last_characters = {text[-1] for text in stop}
        self._may_complete: dict[int, bool] = {}

    def __call__(self, tokens: list[int]) -> bool:
        """Whether the last of `tokens`, a whole response so far, completes a stop string."""
        if not self.stop or not self._candidate(tokens[-1]):
            return False
        assert self.decode is not None
        # A token may be no text at all (special tokens) or a part of a character: take more until there is enough.
        num, text = self.longest + _MARGIN, ""
        while len(text) < self.longest + _MARGIN:
            text = self.decode(tokens[-num:])
            if num >= len(tokens):
                break
            num *= 2
        return any(stop in text for stop in self.stop)

    def _candidate(self, token: int) -> bool:
        """Whether `token` can hold the end of a stop string: known after its first appearance."""
        if token not in self._may_complete:
            assert self.decode is not None
            # twice, as some tokenizers leave out a space at the start; U+FFFD stands for part of a character
            text = self.decode([token, token])
            self._may_complete[token] = "\ufffd" in text or not self._last_characters.isdisjoint(text)
        return self._may_complete[token]
