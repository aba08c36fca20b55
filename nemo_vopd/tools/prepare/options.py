"""What a prepared data set depends on apart from its sources, and the columns in which a record keeps its fields."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from nemo_vopd.bounds import bounded, check_bounds
from nemo_vopd.data.record_fields import BOX_FORMATS, is_blank
from nemo_vopd.decoding import MAX_IMAGE_PIXELS
from nemo_vopd.errors import OptionError

LISTS = ("images", "teacher_images", "bbox_images")
"""Columns that hold a list of one image."""
_KNOWN = {
    "image": ("images", "image"),
    "crop_image": ("teacher_images", "bbox_images", "crop_image"),
    "question": ("question", "problem", "query", "prompt", "messages", "conversations", "instruction"),
    "bbox": ("bbox", "box", "bboxes", "bboxs", "objects.bbox"),
    "answer": ("answer", "answers", "solution", "response", "reward_model.ground_truth", "extra_info.answer", "output"),
    "id": ("id", "sample_id", "uid"),
}
_CONVERSATIONS = {"prompt", "messages", "conversations"}
"""Columns of questions that may name images between their texts."""
HINT = "Only focus on the objects inside the red bounding box in the image to answer this question."
"""What questions written for images with a drawn box carry."""


@dataclass
class Columns:
    """Name of the column of each field; null takes the first of the known ones that holds something.

    `a.b` is field b of the struct (JSON object) in column a.
    """

    image: str | None = None
    crop_image: str | None = None
    question: str | None = None
    bbox: str | None = None
    answer: str | None = None
    id: str | None = None

    def find(self, field: str, row: dict) -> tuple[str, object]:
        """(column, value) of `field` in `row`: the first that is not blank, else the first; ("", None) for none."""
        first: tuple[str, object] = ("", None)
        names = self._names(field)
        if field == "question" and self.question is None and "images" in row:
            # Vision-OPD-6K's layout, whose question is `problem`
            names = ("problem", *names)
        for name in names:
            place: object = row
            for part in name.split("."):
                if not isinstance(place, dict) or part not in place:
                    break
                place = place[part]
            else:
                if not is_blank(place):
                    return name, place
                first = first if first[0] else (name, place)
        return first

    def given(self) -> dict[str, str]:
        """Field -> name, of those that the user names."""
        return {field: name for field, name in vars(self).items() if name is not None}

    def check(self, source: object, present: Collection[str], found: Collection[str]) -> None:
        """Raise OptionError unless `present`, the columns of `source`, have the fields that a record needs.

        `found` are the fields whose given name, with its dots, some record has.
        """
        there = ", ".join(sorted(present)[:40])
        for wanted, given in self.given().items():
            if wanted not in found:
                rule = f"is no column of {source}, which has {there}"
                raise OptionError(f"columns.{wanted}", given, rule, "name one of those, or null for the known names")
        for needed in (("image",), ("question",), ("bbox", "crop_image")):
            wanted = self.top_level(*needed) | (_CONVERSATIONS if needed == ("image",) else set())
            if not wanted & set(present):
                names = ", ".join(name for field in needed for name in _KNOWN[field])
                rule = f"{source} has none of the columns {names}; it has {there}"
                remedy = f"say which one it is: {' or '.join(f'columns.{field}=NAME' for field in needed)}"
                raise OptionError(f"columns.{needed[0]}", "null", rule, remedy)

    def top_level(self, *wanted: str) -> set[str]:
        """The columns that can hold the fields `wanted` (default: all, and the `input` of an instruction)."""
        names = {name.split(".")[0] for field in wanted or _KNOWN for name in self._names(field)}
        return names if wanted else names | {"input"}

    def _names(self, field: str) -> tuple[str, ...]:
        given = getattr(self, field)
        return _KNOWN[field] if given is None else (given,)


@dataclass
class PrepareOptions:
    """Everything that a prepared data set depends on, apart from its sources."""

    weights: list[float] | None = None
    """How often each source is drawn, of several; null: by their sizes."""
    shard_size: int = bounded(1000, at_least=1)
    """Number of records of the source in one tar file."""
    split: str | None = None
    """Part of a source that has several (train, test, ...)."""
    image_root: str | None = None
    """Folder that image paths start from and must not leave; null: the folder of the source."""
    columns: Columns = field(default_factory=Columns)
    """Names of the columns (JSON keys) of a record; null takes those that are known (docs/data.md)."""
    bbox_format: str = bounded("xyxy", one_of=BOX_FORMATS)
    """xyxy | xywh | xyxy_unit | xyxy_1000: pixels, corner and size in pixels, fractions of the sides, thousandths."""
    bbox_frame: str = bounded("upright", one_of=("upright", "stored"))
    """upright | stored: boxes refer to the image as EXIF turns it, or to its stored pixels."""
    max_image_pixels: int = bounded(MAX_IMAGE_PIXELS, at_least=1)
    """Larger images are dropped; at most 100 million, the bound of the training run."""
    hint: str = bounded("keep", one_of=("keep", "remove"))
    """keep | remove: `hint_text` in questions."""
    hint_text: str = HINT
    """Sentence that `hint` is about."""
    validation_fraction: float = bounded(0.0, at_least=0, below=1, suggest=0.02)
    """Share of the records that goes to `output`/validation instead of `output`/train, by a hash."""
    split_by: str = bounded("id", one_of=("id", "image"))
    """id | image: what is hashed; with image, one photograph is never on both sides."""

    def check(self, num_sources: int) -> None:
        """Raise OptionError for an option that is out of bounds or does not go with the number of sources."""
        check_bounds(self)
        if self.max_image_pixels > MAX_IMAGE_PIXELS:
            rule = f"must be at most {MAX_IMAGE_PIXELS}: larger images are dropped when they are loaded"
            raise OptionError("max_image_pixels", self.max_image_pixels, rule, "lower it and scale the images down")
        if not self.hint_text:
            raise OptionError("hint_text", "''", "is empty", "give the sentence, or hint=keep")
        if self.weights is None:
            return
        if len(self.weights) != num_sources:
            rule = f"must be one number for each of the {num_sources} sources"
            raise OptionError("weights", self.weights, rule, "give as many, or null for the sizes of the sources")
        if num_sources == 1 or not all(0 < weight < float("inf") for weight in self.weights):
            rule = "must be positive numbers, of several sources"
            raise OptionError("weights", self.weights, rule, "leave out what is not wanted, or set weights=null")

    def splits(self) -> dict[str, str]:
        """Split -> folder of its data set within that of the source."""
        return {"train": "train", "validation": "validation"} if self.validation_fraction else {"train": ""}
