"""The loader's batches in order, and the position from which a batch that was not trained on is read again."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.energon import SavableDataLoader

from nemo_vopd.batch import PromptBatch
from nemo_vopd.data.loader_state import save_position


class PromptStream(Iterator):
    """`next` gives the batch of the next step; `peek` the one after it, ahead of time."""

    def __init__(self, loader: SavableDataLoader, position: bytes | None, *, remember: bool) -> None:
        """`loader` stands at `position` (None: at its beginning).

        `remember` keeps the position before each batch, for engines that can be lost within a step or work ahead;
        it asks the loader's workers at every batch.
        """
        self._loader, self._batches, self._remember = loader, iter(loader), remember
        self._ahead: tuple[PromptBatch, bytes | None] | None = None
        self._before, self._after = None, position

    def __next__(self) -> PromptBatch:
        """The batch of the next step."""
        batch, after = self._ahead or self._fetch()
        self._ahead = None
        self._before, self._after = self._after, after
        return batch

    def peek(self) -> PromptBatch:
        """The batch that `next` will give."""
        self._ahead = self._ahead or self._fetch()
        return self._ahead[0]

    def position(self, *, undo: bool = False) -> bytes | None:
        """Where to go on after the batch that `next` gave last; with `undo` where that batch itself is read again.

        None is the beginning of the data. `undo` is known only with `remember`.
        """
        if undo:
            assert self._remember
            return self._before
        return self._after if self._remember else save_position(self._loader)

    def close(self) -> None:
        """End the loader's processes; left to the interpreter's exit they take seconds."""
        self._batches.close()  # type: ignore[attr-defined]

    def _fetch(self) -> tuple[PromptBatch, bytes | None]:
        batch = next(self._batches)
        return batch, save_position(self._loader) if self._remember else None
