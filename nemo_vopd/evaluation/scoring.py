"""Is a reply right."""

from __future__ import annotations


def exact_match(reply: str, answer: str) -> bool:
    """Whether reply and answer are the same words: spacing, case and a final full stop do not count."""
    return _normalised(reply) == _normalised(answer)


def _normalised(text: str) -> str:
    return " ".join(text.lower().rstrip(" .!").split())
