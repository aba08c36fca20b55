r"""What a reply commits to: its final answer, yes or no, or a short text (options: chosen_option.py).

Each step narrows the reply or decides; what stays undecided is None (or False), never a guess.

1. The committed part (`final_answer`): what follows `</think>`, in the last `<answer>`, in the last `\boxed{}`, and
   after the last "the answer is".
2. Yes or no (`extract_yes_no`): what follows "wait, no"; the first word or the last line; "there is", "there is no".
3. Free text (`same_text`): equality after normalisation, with or without a frame such as "It is ...".
"""

from __future__ import annotations

import re
import unicodedata

_LONGEST = 10_000  # characters read, from the end: bounds the time a runaway reply takes
_ENTITIES = {"&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&apos;": "'", "&nbsp;": " ", "&amp;": "&"}
_SIGNS = {ord(c): "'" for c in "‘’‛`´"} | {ord(c): '"' for c in "“”„«»「」『』"} | {ord(c): "-" for c in "‐‑‒–—―−"}
_SIGNS |= dict.fromkeys([*range(0x200B, 0x2010), 0x2060, 0xFE0F, 0xFEFF])
_TOKENS = re.compile(r"<\|[^|<>\n]{1,40}\|>|</?s>|<(?:eos|bos|pad|end_of_turn)>|</?(?:b|i|em|strong|u|code)>", re.I)
_NEW_LINE = re.compile(r"\r\n?|</?(?:br|p)\s?/?>", re.I)
_EMPHASIS = re.compile(r"(\*{1,3}|__|`{1,3})(?=\S)([^*`\n]+)(?<=\S)\1|(?<!\w)_(?=\S)([^_\n]+)(?<=\S)_(?!\w)")
_HEADING = re.compile(r"(?m)^[ \t]{0,3}(?:#{1,6}|>)[ \t]+")
_LATEX_TEXT = re.compile(r"\\(?:text|math|mbox)[a-z]{0,6}\s?\{([^{}]*)\}")
_LATEX_FRAME = re.compile(r"\$([^$]+)\$\.?|\\\((.+)\\\)\.?|\\\[(.+)\\\]", re.S)
_IS = r"(?:\s*[:=]|\s-\s|\s+(?:is|should\s+be|would\s+be|must\s+be|will\s+be)\b\s?:?)"
_LEAD = re.compile(
    r"(?:\b(?:the|my|so|final|correct|best|right|most|appropriate)\s+){0,4}"
    rf"\banswer\b[\"']?(?:\s+to\s[^.:\n]{{1,60}}?)?{_IS}|\b(?:the\s+)?final\s+answer\s?\n"
    rf"|\b(?:the\s+)?(?:correct|best|right|final)\s+(?:option|choice){_IS}"
    r"|(?:最佳|正确|最终)?答案(?:应该|应当|应)?[是为选:]:?|(?:正确|最佳)选项[是为:]:?",
    re.I,
)

_CORRECTION = re.compile(
    r"[.!?,;\n-]\s{0,3}(?:no,|no wait|(?:hmm,? )?(?:but )?wait\b|actually,?|correction\b|on second thought|scratch that"
    r"|sorry\b|i mean\b|my mistake)|等等|不对|更正",
    re.I,
)
_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
NUMBERS = {word: str(i) for i, word in enumerate(f"{_UNITS} seventeen eighteen nineteen".split())}
_TENS = {w: str(i) for i, w in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_COMPOUND = re.compile(rf"\b({'|'.join(_TENS)})(?:[- ]({'|'.join(list(NUMBERS)[1:10])}))?\b")
FRAME = re.compile(
    r"\W{0,3}(?:(?:so|thus|therefore|hence),?\s)?(?:(?:it|this|that|they|there|the\s(?:final |correct |total )?"
    r"(?:answer|colou?r|number|text|word|sign|label|name|price|time|count|date|brand|title|letter|total)"
    r"(?:\s(?:of|on|in|above|at)\s[^,.;\n]{1,60}?)?)(?:'s|\s(?:is|are|was|were|says|reads))\s:?|(?:它|这|颜色|数量)是)",
    re.I,
)

_YES = re.compile(
    r"\W{0,5}(?:(?:yes|yeah|yep|yup|i think so)\b|(?:certainly|definitely|absolutely|of course|indeed)(?=[,.!]|$)"
    r"|[是有对](?![没不否])|存在)"
)
_NO = re.compile(
    r"\W{0,5}(?:no(?! idea| problem| clear| way)\b|nope\b|nah\b|not (?:that|really|visible|present|in|at all)\b"
    r"|i (?:don't|do not) think so\b|it (?:doesn't|does not) (?:look|seem|appear)\b|"
    r"(?:certainly|definitely|absolutely|of course) not\b|[不没否无])"
)
_ENDING = re.compile(r"[,:.\n]\W{0,5}(yes|no)\W{0,5}\Z")
_BOTH = re.compile(r"\byes\b\W{0,3}(?:and|or)?\W{0,3}\bno\b(?! ?\w)|\bno\b\W{0,3}(?:and|or)?\W{0,3}\byes\b")
_UNSURE = re.compile(
    r"(?:cannot|can't|can not|unable to|(?:hard|difficult|impossible) to) (?:\w+ )?(?:tell|determine|say|know|see (?:if"
    r"|images?|the image)|answer|assist|help|verify|confirm)|\b(?:not (?:sure|certain|clear)|unclear|unsure|uncertain"
    r"|maybe|perhaps|might|sorry)\b|无法|不确定|不清|难以|可能"
)
_DENIES = re.compile(
    r"\bthere(?:'s| is| are| was| were)(?: no\b| not\b|n't)|(?:\b(?:do|does|did|can)(?:n't|not| not)|\bcan't) (?:\w+ )?"
    r"(?:see|contain|show|appear|seem|look|have|include|find)\b|\b(?:see|shows?|contains?) no\b"
    r"|^(?:the|it|this|that|they)\b[^.,;\n]{0,60}?(?:\b(?:is|are|was|does|do) not\b|n't\b)|没|不存在|不是"
)
_AFFIRMS = re.compile(
    r"\bthere(?:'s| is| are| (?:appears?|seems?) to be) (?!no\b|not\b)|^i (?:can )?see (?!no\b)"
    r"|^(?:it|they|there) (?:is|are|does|do)\W*$|[中里上]有|存在"
)


def tidy(text: str) -> str:
    """The text in plain characters: NFKC, simple quotes and dashes, no special tokens, markdown or HTML emphasis."""
    text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
    text = _NEW_LINE.sub("\n", _TOKENS.sub("", text))
    return _HEADING.sub("", _EMPHASIS.sub(lambda m: m[2] or m[3], text)).strip()


def marked(reply: str) -> str:
    """The reply less its reasoning, narrowed to the last <answer> and the last box."""
    for entity, sign in _ENTITIES.items():
        reply = reply.replace(entity, sign)
    reply = re.split(r"(?i)</think>", reply)[-1]
    parts = re.split(r"(?i)<think>", reply, maxsplit=1)
    # Reasoning that never closes commits to nothing, unless the reply ends in an answer: the mark was forgotten.
    if len(parts) == 2 and not re.search(r"(?i)</answer>\s{0,9}(?:<\|\w+\|>)?\Z", reply):
        return ""
    text = tidy(reply[-_LONGEST:])
    pieces = re.split(r"(?i)</answer>", text)
    if len(pieces) > 1:
        text = re.split(r"(?i)<answer>", pieces[-2])[-1]
    elif len(opened := re.split(r"(?i)<answer>", text)) > 1:
        text = opened[-1]  # a stop string cut the closing mark
    if (start := text.rfind("boxed{")) >= 0:
        text, depth, end = text[start + 6 :], 1, 0
        while end < len(text) and (depth := depth + {"{": 1, "}": -1}.get(text[end], 0)):
            end += 1
        text = _LATEX_TEXT.sub(r"\1", _LATEX_TEXT.sub(r"\1", text[:end]))
        text = re.sub(r"\\([%$&#_{} ])", r"\1", text)
    if frame := _LATEX_FRAME.fullmatch(text.strip()):
        text = next(group for group in frame.groups() if group)
    return text.strip()


def final_answer(reply: str) -> str:
    """What the reply commits to, in plain characters (NFKC) and without emphasis; "" where it never gets there.

    Narrowed in this order: after the last `</think>`, the last `<answer>`, the last box, after the last answer phrase
    that is followed by anything. A reply without any of them is returned whole.
    """
    text = marked(reply)
    end = len(text)
    leads = list(_LEAD.finditer(text))
    for lead in reversed(leads):
        if re.search(r"\w", rest := text[lead.end() : end]):
            return rest.strip()
        end = lead.start()
    return "" if leads else text


def extract_yes_no(reply: str) -> str | None:
    """ "yes", "no", or None where the reply says neither, both, or that it cannot tell.

    The first word wins over what follows it ("Yes, there is no one"). Without one, "there is (not)", "I (do not) see"
    and a negated first sentence decide; "The image shows ..." describes and decides nothing.
    """
    asked, _, rest = final_answer(reply).lower().replace("no doubt", "").rpartition("?")
    text = rest if re.search(r"\w", rest) else asked
    return next(filter(None, map(_verdict, [*corrections(text), text])), None)


def same_text(reply: str, answer: str) -> bool:
    """Whether the reply's final answer and the answer are the same short text.

    Case, articles, punctuation, number words to ninety-nine, thousands separators and a frame such as "It is ..." do
    not count; a currency or percent sign counts where both have one. Anything longer is not the same.
    """
    return same(final_answer(reply), tidy(answer))


def corrections(text: str) -> list[str]:
    """What follows the last three words of correction, the last first; a reply does not begin with one."""
    return [text[fix.end() :] for fix in [*_CORRECTION.finditer(text)][:-4:-1] if fix.start()]


def _verdict(text: str) -> str | None:
    text = text.strip()
    if _BOTH.search(text):
        return None
    ending = _ENDING.search(text)
    words = {"no"} if _NO.match(text) and not _UNSURE.match(text) else {"yes"} if _YES.match(text) else set()
    if words := words | ({ending[1]} if ending else set()):
        return words.pop() if len(words) == 1 else None
    if _UNSURE.search(text):
        return None
    denied, affirmed = _DENIES.search(text), _AFFIRMS.search(text)
    if affirmed:
        return None if denied or re.search(r"\b(?:no|not|nor)\b|n't\b", text) else "yes"
    return "no" if denied else None


def same(text: str, answer: str) -> bool:
    """Whether two tidy texts are the same, signs and a frame around the first aside."""
    wanted, wanted_signs = canonical(answer)
    candidates = [canonical(text), canonical(FRAME.sub("", text, count=1) if FRAME.match(text) else text)]
    return any(
        words and words == wanted and (s == wanted_signs or not s or not wanted_signs) for words, s in candidates
    )


def canonical(text: str) -> tuple[str, str]:
    """The words of a tidy text, and its currency and percent signs."""
    text = re.sub(r"\A\W{0,3}(?:an?|the)\s+(?=[^\W\d])|\bthe\s+(?=\w)", "", text, flags=re.I).casefold()
    text = re.sub(r"\bper\s?cent\b", "%", text)
    text = _COMPOUND.sub(lambda m: _TENS[m[1]] + (NUMBERS[m[2]] if m[2] else "0"), text)
    text = re.sub(r"\b[a-z]+\b", lambda m: NUMBERS.get(m[0], m[0]), text)
    text = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)", lambda m: m[0].replace(",", ""), text)
    signs = "".join(sorted({c for c in text if c == "%" or unicodedata.category(c) == "Sc"}))
    kept = (
        c if c in "-/:#@&.'" or unicodedata.category(c)[0] in "LNM" or unicodedata.category(c) == "Sm" else " "
        for c in text
    )
    text = "".join(kept).replace("'", "")
    text = re.sub(r"(?<=[^\W\d])-(?=[^\W\d])|-(?!\d|\.\d)|:(?!\d)|(?<!\d):|\.(?!\d)", " ", text)
    text = re.sub(r"(?<!\w)\.(?=\d)", "0.", text)
    text = re.sub(r"(?<![\w.])(\d+)\.(\d+)(?![\w.])", lambda m: f"{m[1]}.{m[2]}".rstrip("0").rstrip("."), text)
    return " ".join(text.split()), signs
