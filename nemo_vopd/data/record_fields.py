"""The fields of a record; its texts are checked alike when it is prepared and when it is read back from a shard."""

from __future__ import annotations

import contextlib
import json
import re
import reprlib
from dataclasses import dataclass, field

from nemo_vopd.images import UnusableSample, check_box

MAX_QUESTION_CHARACTERS = 1_000_000
"""Longer questions are dropped whatever the model; of shorter ones `data.max_prompt_length` decides, in tokens."""
MAX_ID_CHARACTERS = 1000
"""Ids are kept in memory and written to logs; a longer one is some other field's content."""


def check_id(value: object) -> str:
    """The id as text. Raises UnusableSample (malformed_record) unless it is a short text or a whole number."""
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise UnusableSample("malformed_record", "id must be a text or a whole number")
    return _check_text("id", str(value), MAX_ID_CHARACTERS, "malformed_record")


def is_blank(value: object) -> bool:
    """Whether `value` says nothing: null, NaN, a text without visible characters, or a list of such values."""
    if isinstance(value, str):
        # half a surrogate pair is no blank either: it is refused where the text is checked
        return not any((c.isprintable() and c != " ") or "\ud800" <= c <= "\udfff" for c in value)
    if isinstance(value, list):
        return all(not isinstance(one, list) and is_blank(one) for one in value)  # JSON can nest very deep
    return value is None or value != value  # noqa: PLR0124  NaN, an empty cell of a table


def check_question(value: object) -> str:
    """The question. Raises UnusableSample: malformed_record (no text), overlong_prompt, empty_question."""
    if not isinstance(value, str):
        raise UnusableSample("malformed_record", "the question is not a text")
    if is_blank(value):
        raise UnusableSample("empty_question")
    return _check_text("question", value, MAX_QUESTION_CHARACTERS, "overlong_prompt")


def check_answers(value: object) -> list[str]:
    """The reference answers as texts, any of which is right, without those that are blank.

    Raises UnusableSample (malformed_record).
    """
    answers = []
    for one in value if isinstance(value, list) else [value]:
        if is_blank(one) and not isinstance(one, list):
            continue
        if not isinstance(one, str | int | float):
            raise UnusableSample("malformed_record", "answer must be a text, or a list of texts")
        answers.append(_check_text("answer", str(one), MAX_QUESTION_CHARACTERS, "malformed_record"))
    return answers


BOX_FORMATS = ("xyxy", "xywh", "xyxy_unit", "xyxy_1000")
"""Corners in pixels; corner, width and height in pixels; corners over the image's sides; the same in thousandths."""


def box_in_pixels(bbox: object, box_format: str, image_size: tuple[int, int]) -> object:
    """`bbox`, given in `box_format` (one of BOX_FORMATS), as (x1, y1, x2, y2) in pixels; xyxy is left as it is.

    `image_size` is (width, height). Raises UnusableSample as `check_box` does: the box must have area and part of it
    must lie in the image.
    """
    if box_format != "xyxy":
        if not isinstance(bbox, list | tuple) or len(bbox) != 4:
            raise UnusableSample(
                "malformed_record", f"bbox must be four numbers ({box_format}), got {reprlib.repr(bbox)}"
            )
        if any(isinstance(v, bool) or not isinstance(v, int | float) or not abs(v) < 1e300 for v in bbox):
            raise UnusableSample("malformed_record", f"bbox must hold four finite numbers, got {reprlib.repr(bbox)}")
        width, height = image_size
        a, b, c, d = bbox
        if box_format == "xywh":
            bbox = [a, b, a + c, b + d]
        else:
            unit = 1 if box_format == "xyxy_unit" else 1000
            bbox = [a * width / unit, b * height / unit, c * width / unit, d * height / unit]
    check_box(bbox, image_size)
    return bbox


_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_IMAGE_MARKS = ("<image>", "<|vision_start|><|image_pad|><|vision_end|>")

_JSON_TURNS = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
"""Beginning of a conversation that was turned into text."""
_UNFILLED = ("<ref-object>", "<bbox>", "<video>", "<audio>")
"""Marks in conversations that ms-swift and LLaMA-Factory replace by what other columns hold."""


@dataclass
class Conversation:
    """What a record asks: a text, or the first question of a conversation and its answer."""

    question: object
    """A text; what is none stays as it is, for `check_question` to refuse."""
    answer: object = None
    images: list = field(default_factory=list)
    """What messages name as images between their texts (`{"type": "image", "image": ...}`)."""
    num_questions: int = 1


def read_conversation(value: object, column: str) -> Conversation:
    """The question in `column`: a text, or turns (`role` and `content`, or `from` and `value`), also as JSON text.

    Of several questions the first is taken, which needs no earlier turn. Marks of the image's place are taken out, as
    the chat template decides it: at the ends of a `question`, which may ask about such a mark, else everywhere. Raises
    UnusableSample (malformed_record) for marks of other things in a conversation, and one in text that is no JSON.
    """
    if isinstance(value, str) and _JSON_TURNS.match(value):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
        if isinstance(value, str):
            raise UnusableSample("malformed_record", f"the conversation is a text that is no JSON: {value}")
    everywhere = column.rsplit(".", 1)[-1] != "question"
    if not isinstance(value, list):
        return Conversation(_without_marks(value, everywhere))
    told: dict[str, list] = {"user": [], "assistant": []}
    for turn in value:
        if not isinstance(turn, dict):
            continue
        # tables can hold all four, with null in those that are not used
        role = _ROLES.get(str(turn.get("role") or turn.get("from")))
        if role == "user" or (role and len(told["user"]) == 1):
            told[role].append(turn.get("value") if turn.get("content") is None else turn["content"])
    if not told["user"]:
        return Conversation(None)
    question, images = _parts(told["user"][0])
    answer = _parts(told["assistant"][0])[0] if told["assistant"] else None
    for mark in _UNFILLED:
        if isinstance(question, str) and mark in question:
            raise UnusableSample("malformed_record", f"the question holds {mark}, whose content is not filled in here")
    return Conversation(_without_marks(question, everywhere), answer, images, len(told["user"]))


def _parts(content: object) -> tuple[object, list]:
    """(text, images) of the content of one turn: a text, or a list of typed parts."""
    if not isinstance(content, list):
        return content, []
    parts = [part for part in content if isinstance(part, dict)]
    text = "".join(part["text"] for part in parts if isinstance(part.get("text"), str))
    named = ([part[name] for name in ("image", "image_url", "url", "path") if part.get(name)] for part in parts)
    return text, [names[0] for names in named if names]


def _without_marks(text: object, everywhere: bool) -> object:
    if not isinstance(text, str):
        return text
    if everywhere:
        for mark in _IMAGE_MARKS:
            text = text.replace(f"{mark}\n", "").replace(f"\n{mark}", "").replace(mark, "")
        return text
    while (bare := text.strip()).startswith(_IMAGE_MARKS) or bare.endswith(_IMAGE_MARKS):
        for mark in _IMAGE_MARKS:
            bare = bare.removeprefix(mark).removesuffix(mark)
        text = bare.strip()
    return text


def evidence_box(value: object, box_format: str, image_size: tuple[int, int]) -> tuple[object, int]:
    """(box in pixels, number of boxes): of a list of boxes the smallest one around them all.

    Raises UnusableSample as `box_in_pixels` does.
    """
    several = isinstance(value, list | tuple) and value and all(isinstance(one, list | tuple) for one in value)
    boxes = [box_in_pixels(one, box_format, image_size) for one in (value if several else [value])]  # type: ignore[union-attr]
    if len(boxes) == 1:
        return boxes[0], 1
    x1, y1, x2, y2 = zip(*boxes, strict=True)  # type: ignore[misc]
    return [min(x1), min(y1), max(x2), max(y2)], len(boxes)


def without_hint(question: str, hint: str) -> str:
    """`question` without `hint` and the white space beside it."""
    parts = [part.strip() for part in question.split(hint)]
    return " ".join(part for part in parts if part)


def _check_text(field: str, text: str, max_characters: int, too_long: str) -> str:
    if len(text) > max_characters:
        raise UnusableSample(too_long, f"{field} has {len(text)} characters, more than {max_characters}")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which neither files nor tokenizers take
        raise UnusableSample("malformed_record", f"{field} is not valid Unicode") from None
    return text
