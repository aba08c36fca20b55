"""What a run left in its folder, read with whatever holes it has: crashed, unfinished, of another version."""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nemo_vopd.tools.report.examples_file import Examples, read_examples
from nemo_vopd.tools.report.numbers import NAN, as_float

FILES = (
    "summary.json", "status.json", "metrics.jsonl", "evaluations.jsonl", "dropped.jsonl", "warmup.jsonl",
    "config.yaml", "environment.json", "examples.json", "results",
)  # fmt: skip
"""What tells the folder of a run from another one."""
_EXAMPLES_PER_REASON = 5
_LARGEST_STEP = 1e12
_DEEPEST = 50
"""Levels of nesting that are kept: nothing that a run writes has as many."""


@dataclass
class Curves:
    """The columns of a file of JSON lines, in the order of their steps."""

    steps: np.ndarray = field(default_factory=lambda: np.array([]))
    """[N] float64."""
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """[N] each, NaN where a line has no number; a dictionary's entries are columns `<key>/<entry>`."""

    def get(self, key: str) -> np.ndarray:
        """The column `key`, all NaN if there is none."""
        return self.columns.get(key, np.full(len(self.steps), NAN))


@dataclass
class Drops:
    """The lines of dropped.jsonl, counted by reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """(id, detail) of the first few of each reason."""


@dataclass
class Results:
    """One file of recipes/evaluate.py."""

    name: str
    """Its file name without the ending."""
    data: dict[str, Any]

    @property
    def benchmarks(self) -> dict[str, dict[str, Any]]:
        """The entry of each benchmark."""
        return _dicts(self.data.get("results"))

    @property
    def comparison(self) -> dict[str, dict[str, Any]]:
        """Difference from another model, with its interval, for each benchmark."""
        return _dicts(self.data.get("comparison"))


@dataclass
class Run:
    """Everything the report shows of one run; what is not there is empty."""

    name: str
    summary: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    data_card: dict[str, Any] = field(default_factory=dict)
    metrics: Curves = field(default_factory=Curves)
    warmup: Curves = field(default_factory=Curves)
    evaluations: Curves = field(default_factory=Curves)
    drops: Drops = field(default_factory=Drops)
    results: list[Results] = field(default_factory=list)
    examples: Examples = field(default_factory=Examples)
    notes: list[str] = field(default_factory=list)
    """What could not be read."""

    @property
    def num_questions(self) -> float:
        """Number of questions that each accuracy in `evaluations` is taken over; NaN where it is not known."""
        counted = self.evaluations.get("num_samples")
        if len(counted) and np.isfinite(counted).all():
            return float(counted.min())
        asked = self.config.get("evaluation")  # earlier runs tell how many questions were wanted
        return as_float(asked.get("num_samples")) if isinstance(asked, dict) else NAN


def names_apart(first: Path, second: Path) -> tuple[str, str]:
    """Short names of two folders: the parts of their paths in which they differ."""
    parts = [list(Path(os.path.realpath(folder)).parts) for folder in (first, second)]
    for end in (0, -1):
        while min(map(len, parts)) > 1 and parts[0][end] == parts[1][end]:
            for one in parts:
                del one[end]
    return "/".join(parts[0]), "/".join(parts[1])


def is_run(folder: Path) -> bool:
    """Whether `folder` holds anything that a run writes."""
    return any(os.path.exists(folder / name) for name in FILES)


def read_run(folder: Path, results: Iterable[Path] = (), leave_out: Iterable[Path] = ()) -> Run:
    """The run in `folder`, with the result files in its `results`, but for `leave_out`, and those in `results`.

    The quickstart keeps the files of its training run in `train`: what `folder` itself lacks is looked for there.
    """
    notes: list[str] = []

    def place(name: str) -> Path:
        return folder / name if os.path.exists(folder / name) else folder / "train" / name

    hidden = {os.path.realpath(path) for path in leave_out}
    found = {os.path.realpath(path): path for path in [*sorted((folder / "results").glob("*.json")), *results]}
    config = _read_yaml(place("config.yaml"), notes)
    return Run(
        name=folder.resolve().name,
        summary=_read_object(place("summary.json"), notes),
        status=_read_object(place("status.json"), notes),
        config=config,
        environment=_read_object(place("environment.json"), notes),
        data_card=_data_card(config, notes),
        metrics=read_curves(place("metrics.jsonl"), notes),
        warmup=read_curves(place("warmup.jsonl"), notes),
        evaluations=read_curves(place("evaluations.jsonl"), notes),
        drops=_read_drops(place("dropped.jsonl"), notes),
        results=[read_results(path, notes) for real, path in found.items() if real not in hidden],
        examples=read_examples(_read_object(place("examples.json"), notes)),
        notes=notes,
    )


def read_results(path: Path, notes: list[str]) -> Results:
    """The result file `path`; empty, with a line in `notes`, when it is not readable."""
    return Results(path.stem, _read_object(path, notes))


def read_curves(path: Path, notes: list[str]) -> Curves:
    """The numbers in the JSON lines of `path`; a line without a step takes its position."""
    columns: dict[str, array] = {}
    num = 0
    for row in _lines(path, notes):
        for key, value in row.items():
            entries = value.items() if isinstance(value, dict) else ((None, value),)
            for entry, number in entries:
                name = key if entry is None else f"{key}/{entry}"
                column = columns.setdefault(name, array("d"))
                column.extend([NAN] * (num - len(column)))
                if len(column) == num:  # "a/b" and "b" of "a" have one name
                    column.append(as_float(number))
        num += 1
    arrays = {name: np.concatenate([c, np.full(num - len(c), NAN)]) for name, c in columns.items()}
    steps = arrays.pop("step", np.full(num, NAN))
    steps = np.where(np.abs(steps) <= _LARGEST_STEP, steps, np.arange(num, dtype=float))
    order = np.argsort(steps, kind="stable")
    known = {name: column[order] for name, column in arrays.items() if np.isfinite(column).any()}
    return Curves(steps[order], known)


def _read_drops(path: Path, notes: list[str]) -> Drops:
    drops = Drops()
    for row in _lines(path, notes):
        reason, name, detail = (str(_shallow(row[key])) if key in row else "" for key in ("reason", "id", "detail"))
        reason = reason or "no reason given"
        drops.counts[reason] += 1
        examples = drops.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES_PER_REASON:
            examples.append((name, detail))
    return drops


def _lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; the others are counted in `notes`."""
    if not os.path.isfile(path):
        return
    num_bad = 0
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                row = _parse(line)
                if isinstance(row, dict):
                    yield row
                else:
                    num_bad += bool(line.strip())
    except OSError as error:
        notes.append(f"{path.name}: cannot be read ({error.strerror})")
    if num_bad:
        notes.append(f"{path.name}: {num_bad} line{'s' * (num_bad > 1)} cut off or damaged, left out")


def _parse(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _read_text(path, notes)
    if text is None:
        return {}
    value = _parse(text)
    if not isinstance(value, dict):
        notes.append(f"{path.name}: no JSON object, left out")
        return {}
    return _shallow(value)


def _read_yaml(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _read_text(path, notes)
    if text is None:
        return {}
    try:
        value = yaml.safe_load(text)
        json.dumps(value, default=str, skipkeys=True)  # fails on what no text can show: cycles, endless numbers
    except (yaml.YAMLError, RecursionError, ValueError, ArithmeticError, TypeError, LookupError, AttributeError):
        value = None  # the constructors of dates, numbers and the like raise errors of their own
    if not isinstance(value, dict):
        notes.append(f"{path.name}: no YAML of options, left out")
        return {}
    return _shallow(value)


def _read_text(path: Path, notes: list[str]) -> str | None:
    """The text of a file; None if there is none, with a line in `notes` if it is there but unreadable."""
    if not os.path.isfile(path):  # unlike Path.is_file, also false for names that are too long
        return None
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        notes.append(f"{path.name}: cannot be read ({error.strerror})")
        return None


def _shallow(value: Any, levels: int = _DEEPEST) -> Any:
    """`value` with what is nested deeper than `levels` left out, so that walking it ends."""
    if not isinstance(value, dict | list):
        return value
    if not levels:
        return "..."
    if isinstance(value, list):
        return [_shallow(entry, levels - 1) for entry in value]
    return {key: _shallow(entry, levels - 1) for key, entry in value.items()}


def _data_card(config: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The card of the data set that the configuration names, if it is on this machine."""
    data = config.get("data")
    path = data.get("path") if isinstance(data, dict) else None
    return _read_object(Path(path) / "data_card.json", notes) if isinstance(path, str) else {}


def _dicts(value: object) -> dict[str, dict[str, Any]]:
    found = value.items() if isinstance(value, dict) else ()
    return {str(key): entry for key, entry in found if isinstance(entry, dict)}
