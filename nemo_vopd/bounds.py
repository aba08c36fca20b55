"""Bounds of options, declared with the fields of a dataclass and checked in one place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from nemo_vopd.errors import OptionError


@dataclass(frozen=True)
class Bounds:
    """The values that an option may have."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    one_of: tuple[str, ...] = ()
    suggest: Any = None
    """Value that the remedy names."""

    def __post_init__(self):
        """Raise ValueError for numbers without a lower end, which no rule in words describes."""
        if not self.one_of and self.at_least is None and self.above is None:
            raise ValueError("bounds of a number need at_least or above")

    @property
    def rule(self) -> str:
        """The rule in words: must be at least 1, must lie in [0, 1], must be one of ..."""
        if self.one_of:
            return f"must be one of {', '.join(self.one_of)}"
        if self.at_most is None and self.below is None:
            return "must be positive" if self.at_least is None else f"must be at least {self.at_least:g}"
        low = f"({self.above:g}" if self.at_least is None else f"[{self.at_least:g}"
        high = f"{self.below:g})" if self.at_most is None else f"{self.at_most:g}]"
        return f"must lie in {low}, {high}"

    def allow(self, value: Any) -> bool:
        """Whether `value` keeps the rule."""
        if self.one_of:
            return value in self.one_of
        low = value > self.above if self.at_least is None else value >= self.at_least
        return low and (self.at_most is None or value <= self.at_most) and (self.below is None or value < self.below)


def bounded(default: Any, **bounds: Any) -> Any:
    """A field with a `default` and `Bounds`; the remedy of its error suggests the default unless told otherwise."""
    if default is not None and "suggest" not in bounds and not {"at_most", "below", "above"}.isdisjoint(bounds):
        bounds["suggest"] = default
    return field(default=default, metadata={"bounds": Bounds(**bounds)})


def bounded_options(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Bounds, bool]]:
    """(option, value, bounds, whether null is allowed) of every bounded field of `config` and of dataclasses in it."""
    for one in fields(config):
        option, value = f"{prefix}{one.name}", getattr(config, one.name)
        if "bounds" in one.metadata:
            yield option, value, one.metadata["bounds"], "None" in str(one.type)
        elif is_dataclass(value):
            yield from bounded_options(value, f"{option}.")


def check_bounds(config: Any) -> None:
    """Raise OptionError for the first field of the dataclass `config` that is out of its bounds."""
    for option, value, bounds, optional in bounded_options(config):
        if value is None:
            continue
        if bounds.one_of:
            remedy = f"set {option}={bounds.suggest or bounds.one_of[0]}"
        elif bounds.suggest is None:
            remedy = f"set {option}={bounds.at_least:g} or more"
        else:
            remedy = f"set it to {bounds.suggest}"
        if isinstance(value, float) and not math.isfinite(value):
            raise OptionError(option, value, "must be a finite number", remedy)
        if not bounds.allow(value):
            raise OptionError(option, value, bounds.rule + " or null" * optional, remedy)
