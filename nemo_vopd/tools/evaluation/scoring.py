"""Is a reply right."""

from __future__ import annotations

from collections.abc import Mapping

from nemo_vopd.tools.evaluation.choosing import extract_option
from nemo_vopd.tools.evaluation.extraction import extract_yes_no, same_text
from nemo_vopd.tools.evaluation.questions import OPTION, YES_NO


def exact_match(reply: str, answer: str) -> bool:
    """Whether reply and answer are the same words: spacing, case and a final full stop do not count."""
    return _normalised(reply) == _normalised(answer)


def _normalised(text: str) -> str:
    return " ".join(text.lower().rstrip(" .!").split())


def read_reply(reply: str, kind: str, options: Mapping[str, str]) -> str | None:
    """What the reply chooses: a letter, yes or no; of open questions the reply itself. None: it chooses nothing."""
    if kind == OPTION:
        return extract_option(reply, options)
    return extract_yes_no(reply) if kind == YES_NO else reply


def grade(reply: str, answer: str, kind: str, options: Mapping[str, str]) -> bool | None:
    """Whether `reply` is right; None where rules cannot tell (a judge may: nemo_vopd/tools/evaluation/judge.py).

    Options and yes/no: what is chosen decides, a reply that chooses nothing is left open. Open questions: right if
    the texts are the same, else open, as other words can say the same. An empty reply is wrong.
    """
    if not reply.strip():
        return False
    chosen = read_reply(reply, kind, options)
    if kind in (OPTION, YES_NO):
        return None if chosen is None else chosen == answer
    return True if exact_match(reply, answer) or same_text(reply, answer) else None
