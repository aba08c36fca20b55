"""The texts of a record, checked alike when records are prepared and when they are read back from shards."""

from __future__ import annotations

from nemo_vopd.data.views import UnusableSample

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


def check_answer(value: object) -> str | None:
    """The reference answer as text, if there is one. Raises UnusableSample (malformed_record)."""
    if value is None:
        return None
    if not isinstance(value, str | int | float):
        raise UnusableSample("malformed_record", "answer must be a text")
    return _check_text("answer", str(value), MAX_QUESTION_CHARACTERS, "malformed_record")


def _check_text(field: str, text: str, max_characters: int, too_long: str) -> str:
    if len(text) > max_characters:
        raise UnusableSample(too_long, f"{field} has {len(text)} characters, more than {max_characters}")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which neither files nor tokenizers take
        raise UnusableSample("malformed_record", f"{field} is not valid Unicode") from None
    return text
