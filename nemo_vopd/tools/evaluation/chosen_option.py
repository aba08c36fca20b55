r"""The option that a reply to a multiple-choice question chooses.

The first of these that names any decides; naming two is a contradiction, hence None: the whole text is a letter, an
option's text, or both; what follows the last "wait, no"; an option called correct; the text less a repeated list of
all options; a first or last line that answers; what follows the last "so"; every option named and not denied. A bare
letter counts only behind a mark or a word such as "option" or "is".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from os.path import commonprefix
from typing import NamedTuple

from nemo_vopd.tools.evaluation.extraction import (
    FRAME,
    NUMBERS,
    canonical,
    corrections,
    final_answer,
    marked,
    same,
    tidy,
)

_LETTER = re.compile(r"(?<![A-Za-z0-9_$/-])(?<!\w')(?<!\b[A-Za-z]\.)([A-Za-z])(?![A-Za-z0-9_+/]|-\w|'\w|\.[A-Za-z]\.)")
_CUE = re.compile(
    r"(?:[^\w\s]|\n|[选项是为案择即应故或和与非以]|'s|\b(?:option|choice|letter|answer|select|choose|pick|is|be|are|with"
    r"|say|guess|like|likely|probably|clearly|so|thus|hence|therefore|then|otherwise|or|and|both|not|but|nor|than|of"
    r"|only|either|out))\s*$",
    re.I,
)
_BARE = re.compile(r"(?:(?:option|choice|选项?)\s?)?([A-Za-z])", re.I)
_NOUN_CUE = re.compile(r"(?:\b(?:option|choice|letter)|选项?)\s*$", re.I)
_SUBJECT = re.compile(r"\s+(?:is|are|was|has|and|or|to|vs|shows?|looks|seems|depicts|must|fits|matches|cannot|can't)\b")
_NOT_ARTICLE = re.compile(rf"{_SUBJECT.pattern}|\s+(?:because|since|as|but|rather)\b|\s+(?:The|This|It|There|In)\b")
_GLUE = re.compile(r"[ .):\]\"'-]{0,6}(?:(?:the|an?)\s)?", re.I)
_JOIN = re.compile(r"[\s,/&+、()\[\]\"']{0,4}(?:or|and|and/or|vs|或|和|与)?[\s(\[\"']{0,3}(?:option\s)?[(\[]?", re.I)
_AND = re.compile(r"[)\]\"']?,?(?:\s+(?:and|or|nor)\s+|[/&、和或与])(?:option\s)?[(\[\"']?", re.I)
_NOT = re.compile(
    r"\b(?:not|no(?! doubt)|never|neither|nor|without|cannot|unable|unsure|uncertain|rather than|instead of|other than"
    r"|unlike|exclud\w{1,5}|rul(?:e|es|ed|ing) out|eliminat\w{1,5})\b|n't\b|不(?!过)|没|非(?!常)|排除|无法",
    re.I,
)
_BREAK = re.compile(
    r"[,.;:!?\n。]|\b(?:but|so|then|therefore|thus|hence|because|since|although|however)\b|而|但|所以", re.I
)
_WRONG = re.compile(
    r"[\s:)\]-]{0,4}(?:(?:(?:is|are|was|seems|can be)\s+)?(?:both\s+|also\s+|clearly\s+)?(?:wrong|incorrect|false|ruled"
    r" out|excluded|eliminated)|(?:is|are|was|does|do|can|could)(?:\s*not\b|n't)|can't|[❌✗✘×]|错误|不)",
    re.I,
)
_RIGHT = re.compile(
    r"[\s:)\]-]{0,4}(?:(?:is|are|must be|should be)\s+)?(?:both\s+|clearly\s+|therefore\s+)?(?:the\s+)?(?:only\s+)?"
    r"(?:correct|true|best|right(?!\s+(?:of|next|side|hand|in|on|at))|answer|[✅✓✔]|正确)(?!\s+(?:if|only))",
    re.I,
)
_SO = re.compile(
    r"\b(?:so(?! is| are| does)|therefore|thus|hence|consequently|in conclusion|overall)\b|所以|因此|综上", re.I
)


def extract_option(reply: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option (letter -> text, texts may be "") the reply chooses; None if it names none or several.

    A letter with another option's text beside it ("B) red" where A is red) contradicts itself: None. Denying one of
    two options chooses neither. Of two answers the later counts only behind a word of correction ("wait", "no,").
    A letter that is also an option's text is read as a letter.
    """
    known = {letter.upper(): tidy(text).strip(" .\n") for letter, text in options.items()}
    for text in (final_answer(reply), marked(reply)):  # "B. The answer is based on ..." names nothing behind the phrase
        if found := _chosen(text, known):
            return {letter.upper(): letter for letter in options}[found.pop()] if len(found) == 1 else None
    return None


class _Name(NamedTuple):
    start: int
    end: int
    letter: str
    label: bool  # named by its letter
    text: bool  # named by its text
    verdict: int  # -1 denied, 1 called correct

    @property
    def denied(self) -> bool:
        return self.verdict < 0


def _chosen(text: str, options: dict[str, str]) -> set[str]:
    """The letters the text settles on: none, one, or several where it contradicts itself; in the module's order."""
    if found := _plain(text, options):
        return found
    for corrected in corrections(text):
        if found := _chosen(corrected, options):
            return found
    names = _names(text, options)
    live = [name for name in names if not name.denied]
    if found := {name.letter for name in live if name.verdict == 1}:
        return found
    listed = {name.letter: name for name in reversed(names) if name.label and name.text}
    if len(listed) == len(options) > 1:
        for name in sorted(listed.values(), reverse=True):
            text = text[: name.start] + text[name.end :]
        return _chosen(text, options)
    lines = text.strip().splitlines() or [""]
    if found := _opening(text, names) | _plain(lines[0], options) | _plain(lines[-1], options):
        return found
    after_so = max((m.end() for m in _SO.finditer(text)), default=0)
    for start in (after_so, 0):
        named = [name for name in live if name.start >= start]
        if not start and len(text.split()) > 40:  # a long description mentions texts without choosing them
            named = [name for name in named if name.label]
        if named:
            return {name.letter for name in named if name.label} or {name.letter for name in named}
    return set()


def _plain(text: str, options: dict[str, str]) -> set[str]:
    """The letters of a text that is nothing but a letter, an option's text, or a letter and an option's text."""
    if len(text) > 400:
        return set()
    if (bare := _BARE.fullmatch(" ".join(re.findall(r"\w+", text)))) and bare[1].upper() in options:
        return {bare[1].upper()}
    if found := {letter for letter, option in options.items() if same(text, option)} or _same_part(text, options):
        return found
    label = re.match(r"\W{0,4}([A-Za-z])\W{1,4}(\w.*)", text, re.S)
    if label and label[1].upper() in options and (found := _plain(label[2], options)):
        return found | {label[1].upper()}
    return set()


def _same_part(text: str, options: dict[str, str]) -> set[str]:
    """Letters of the options whose text contains the reply, if that tells them from the others.

    Of two sentences that differ in one word, "left" chooses the one that has it.
    """
    words = {letter: canonical(option)[0].split() for letter, option in options.items()}
    first = len(commonprefix(list(words.values())))
    last = len(commonprefix([w[first:][::-1] for w in words.values()]))
    apart = {letter: " ".join(w[first : len(w) - last]) for letter, w in words.items()}
    reply = f" {canonical(FRAME.sub('', text, count=1))[0]} "
    if not all(apart.values()):
        return set()
    return {letter for letter, w in words.items() if f" {apart[letter]} " in reply and reply in f" {' '.join(w)} "}


def _opening(text: str, names: list[_Name]) -> set[str]:
    """The option a text opens with, and the one joined to it ("A or B", "B) red")."""
    if not names or names[0].denied or re.search(r"\w", _NOUN_CUE.sub("", text[: names[0].start])):
        return set()
    head = names[0]
    if _SUBJECT.match(text, head.end) or not (
        head.label or re.match(r"\s*(?:[.,!;:\n]|$|because\b)", text[head.end :])
    ):
        return set()
    for name in names[1:2]:
        gap = text[head.end : name.start]
        if not name.denied and (_JOIN.fullmatch(gap) or (not name.label and _GLUE.fullmatch(gap))):
            return {head.letter, name.letter}
    return {head.letter}


def _names(text: str, options: dict[str, str]) -> list[_Name]:
    """Where the text names options, in order: by their text (the longest that fits), their letter, or both."""
    owners: dict[str, str] = {}
    for letter, option in options.items():
        core = " ".join(re.sub(r"\A(?:an?|the)\s", "", option.lower()).split())
        if len(core) > 1 or not core.isascii() or core.isdigit():
            owners |= dict.fromkeys([core, *(word for word, number in NUMBERS.items() if number == core)], letter)
    forms = "|".join(
        (r"(?<![\w-])(?<!\d[.,])" if form[0].isascii() and form[0].isalnum() else "")
        + re.escape(form).replace(r"\ ", r"\s+")
        + (r"(?![\w-]|[.,]\d)" if form[-1].isascii() and form[-1].isalnum() else "")
        for form in sorted(owners, key=len, reverse=True)
    )
    texts: dict[int, tuple[int, str]] = {}  # start: end, letter
    for m in re.finditer(forms, text, re.I) if forms else ():
        if owner := owners.get(" ".join(m[0].lower().split())):  # re.I folds letters that lower() keeps apart
            texts[m.start()] = (m.end(), owner)
    masked = text
    for start, (end, _) in texts.items():
        masked = masked[:start] + "_" * (end - start) + masked[end:]
    denied, end = set(), 0
    for no in _NOT.finditer(masked):
        if no.start() >= end:  # a clause is walked once
            stop = _BREAK.search(masked, no.end())
            end = stop.start() if stop else len(text)
            denied |= {*range(no.start(), end)}
    names = []
    for label in _LETTER.finditer(masked):
        letter, stop = label[1].upper(), label.end()
        if letter in options and _is_label(label[1], masked[max(0, stop - 25) : stop - 1], masked[stop : stop + 25]):
            glue = _GLUE.match(text, stop)
            beside = glue.end() if glue else stop
            if texts.get(beside, (0, ""))[1] == letter:
                stop = texts.pop(beside)[0]
            names.append((label.start(), stop, letter, True, stop > label.end()))
    names += [(start, stop, letter, False, True) for start, (stop, letter) in texts.items()]
    found: list[_Name] = []
    for start, stop, letter, by_label, by_text in sorted(names, reverse=True):
        if found and _AND.fullmatch(text, stop, found[-1].start):  # "A and B are wrong" judges both
            verdict = found[-1].verdict
        else:
            verdict = -1 if _WRONG.match(masked, stop) else 1 if _RIGHT.match(masked, stop) else 0
        found.append(_Name(start, stop, letter, by_label, by_text, -1 if start in denied else verdict))
    return found[::-1]


def _is_label(letter: str, before: str, after: str) -> bool:
    """Whether a lone letter stands for an option: not an article, a pronoun, or part of a name ("platform B")."""
    if re.search(r"[(\[{【\"'<]\s?$", before) and re.match(r"\s?[)\]}】\"'>]", after):
        return True
    if letter in "AaI" and re.match(r"[^\S\n]+\w", after) and not _NOT_ARTICLE.match(after):
        return False
    if letter.islower():
        return bool(_NOUN_CUE.search(before) or (not before.strip() and re.match(r"\s*(?:[.):,]|$)", after)))
    return not before.strip() or bool(_CUE.search(before))
