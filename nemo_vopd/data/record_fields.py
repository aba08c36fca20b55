"""The fields of a record; its texts are checked alike when it is prepared and when it is read back from a shard."""

from __future__ import annotations

import reprlib

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


def check_question(value: object) -> str:
    """The question. Raises UnusableSample: malformed_record (no text), overlong_prompt, empty_question."""
    if not isinstance(value, str):
        raise UnusableSample("malformed_record", "the question is not a text")
    if not value.strip():
        raise UnusableSample("empty_question")
    return _check_text("question", value, MAX_QUESTION_CHARACTERS, "overlong_prompt")


def check_answers(value: object) -> list[str]:
    """The reference answers as texts, any of which is right; none for null, NaN (an empty cell of a table) and [].

    Raises UnusableSample (malformed_record).
    """
    answers = []
    for one in value if isinstance(value, list) else [value]:
        if one is None or one != one:  # noqa: PLR0124  NaN
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


def question_text(value: object, column: str) -> object:
    """The text of a question as a layout stores it in `column`: itself, or the last user message of a conversation.

    What is no text is returned as it is, for `check_question` to refuse.
    """
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, dict) and turn.get("role") == "user"]
        value = turns[-1].get("content") if turns else None
        if isinstance(value, list):
            parts = [part.get("text") for part in value if isinstance(part, dict)]
            value = "".join(part for part in parts if isinstance(part, str))
    if isinstance(value, str) and column != "question":
        # these layouts mark the place of the image in the text; here the chat template decides it
        value = value.replace("<image>\n", "").replace("<image>", "")
    return value


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
