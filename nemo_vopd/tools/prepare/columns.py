"""Where a record keeps its fields: names that are known from public data sets, or those that the user gives."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields

from nemo_vopd.errors import OptionError

LISTS = ("images", "teacher_images", "bbox_images")
"""Columns that hold a list of one image."""
_KNOWN = {
    "image": ("images", "image"),
    "crop_image": ("teacher_images", "bbox_images", "crop_image"),
    "question": ("question", "problem", "query", "prompt"),
    "bbox": ("bbox", "box"),
    "answer": ("answer", "solution", "response", "reward_model.ground_truth", "extra_info.answer"),
    "id": ("id", "sample_id", "uid"),
}


@dataclass
class Columns:
    """Name of the column of each field; null takes the first that is there of the known ones.

    `a.b` is field b of the struct (JSON object) in column a.
    """

    image: str | None = None
    crop_image: str | None = None
    question: str | None = None
    bbox: str | None = None
    answer: str | None = None
    id: str | None = None

    def find(self, field: str, row: dict) -> tuple[str, object]:
        """(column, value) of `field` in `row`; ("", None) when there is no such column."""
        given = getattr(self, field)
        names = (given,) if given is not None else _KNOWN[field]
        if given is None and field == "question" and "images" in row:
            # Vision-OPD-6K's layout, whose question is `problem`
            names = ("problem", *names)
        for name in names:
            place: object = row
            for part in name.split("."):
                if not isinstance(place, dict) or part not in place:
                    break
                place = place[part]
            else:
                return name, place
        return "", None

    def given(self) -> dict[str, str]:
        """Field -> name, of those that the user names."""
        names = {field.name: getattr(self, field.name) for field in fields(self)}
        return {field: name for field, name in names.items() if name is not None}

    def check(self, source: object, present: Collection[str], found: Collection[str]) -> None:
        """Raise OptionError unless `present`, the columns of `source`, have the fields that a record needs.

        `found` are those of the given names, with their dots, that some record has.
        """
        there = ", ".join(sorted(present)[:40])
        for field, given in self.given().items():
            if given not in found:
                rule = f"is no column of {source}, which has {there}"
                raise OptionError(f"columns.{field}", given, rule, "name one of those, or null for the known names")
        for needed in (("image",), ("question",), ("bbox", "crop_image")):
            if not any(self.top_level(field) & set(present) for field in needed):
                names = ", ".join(name for field in needed for name in _KNOWN[field])
                rule = f"{source} has none of the columns {names}; it has {there}"
                remedy = f"say which one it is: {' or '.join(f'columns.{field}=NAME' for field in needed)}"
                raise OptionError(f"columns.{needed[0]}", "null", rule, remedy)

    def top_level(self, *wanted: str) -> set[str]:
        """The columns that can hold the fields `wanted` (default: all)."""
        names: set[str] = set()
        for field in wanted or tuple(_KNOWN):
            given = getattr(self, field)
            names |= {name.split(".")[0] for name in ((given,) if given is not None else _KNOWN[field])}
        return names
