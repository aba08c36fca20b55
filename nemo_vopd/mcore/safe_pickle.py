"""Pickles that others wrote, read without letting them run anything."""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, allowed: Collection[tuple[str, str]]) -> None:
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module: str, name: str):
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
        return super().find_class(module, name)


def loads(data: bytes, allowed: Collection[tuple[str, str]]):
    """The object in `data`, which may be made of builtins and the `allowed` (module, name) classes only.

    Raises pickle.UnpicklingError when it names another class or function, or is cut off.
    """
    try:
        return _Unpickler(io.BytesIO(data), allowed).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # damaged bytes raise almost anything
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None
