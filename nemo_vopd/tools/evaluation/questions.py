"""A question of an evaluation: what is shown, what is asked, what is right, and whether a reply is."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from nemo_vopd.config import DataConfig
from nemo_vopd.data.dataset import iterate_records
from nemo_vopd.data.encoder import cut_crop, parse_meta
from nemo_vopd.data.record_fields import check_answers, check_id, check_question
from nemo_vopd.decoding import load_image, load_with_box
from nemo_vopd.images import UnusableSample, check_box
from nemo_vopd.tools.evaluation.chosen_option import extract_option
from nemo_vopd.tools.evaluation.extraction import extract_yes_no, final_answer, same_text

OPTION, YES_NO, TEXT = "option", "yes_no", "text"
_LETTERS = "ABCDEFGH"
_ROTATION = 0x0112  # EXIF's tag
_MARKER = re.compile(r"(?:(?<=^)|(?<=[\s,;:?.]))[(\[（]?([A-Ha-h])(?:[)\]）]|[.:：](?=\s|$))\s*")


@dataclass
class Question:
    """One question about one image, and about a crop of it where there is one."""

    id: str
    prompt: str
    """As the model gets it, without the chat template."""
    answer: str
    """OPTION: a letter; YES_NO: yes or no; TEXT: any text."""
    kind: str
    """OPTION | YES_NO | TEXT"""
    full: bytes
    """The image file."""
    crop: bytes | None = None
    """The crop as a file, where the data set has it."""
    bbox: list[float] | None = None
    """The evidence in stored pixels of `full`, from which a crop is cut otherwise."""
    options: dict[str, str] = field(default_factory=dict)
    """OPTION: letter -> text, in order; texts may be empty."""
    category: str = ""
    subcategory: str = ""
    other_answers: list[str] = field(default_factory=list)
    """Answers that are right too."""

    @property
    def views(self) -> tuple[str, ...]:
        """The views it can be asked about."""
        return ("full",) if self.crop is None and self.bbox is None else ("full", "crop")

    def image(self, view: str, data: DataConfig) -> Image.Image:
        """The RGB image of `view` (full | crop); crops are cut from `bbox` by `data.crop`. Raises UnusableSample."""
        if view == "full":
            return load_image(self.full)
        return load_image(self.crop) if self.crop is not None else cut_crop(*load_with_box(self.full, self.bbox), data)

    def file(self, view: str, data: DataConfig) -> tuple[str, bytes]:
        """(media type, image file) of `view`: the stored file where every reader sees the pixels of `image` in it.

        Else, and for a crop that is cut, a PNG. Raises UnusableSample.
        """
        stored = self.full if view == "full" else self.crop
        if stored is not None and (media := _plain_media_type(stored)):
            load_image(stored)  # a damaged file is told here, not by the server
            return media, stored
        buffer = io.BytesIO()
        self.image(view, data).save(buffer, format="PNG", compress_level=1)
        return "image/png", buffer.getvalue()

    def evidence_size(self) -> float | None:
        """Area of the box, or of the crop where there is no box, over that of the full image; None if there is neither.

        None too for an image or a box that cannot be read: the other view may have been asked about.
        """
        if self.bbox is None and self.crop is None:
            return None
        with contextlib.suppress(Exception):  # Pillow raises almost anything
            width, height = _size(self.full)
            if self.bbox is None:
                crop_width, crop_height = _size(self.crop or b"")
                return min(1.0, crop_width * crop_height / (width * height))
            x1, y1, x2, y2 = check_box(self.bbox, (width, height))
            return (x2 - x1) * (y2 - y1) / (width * height)
        return None

    def cluster(self) -> str:
        """The same for questions about the same image: their errors are not independent."""
        return hashlib.sha256(self.full).hexdigest()[:16]


def _size(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        return image.size


def _plain_media_type(data: bytes) -> str | None:
    """The media type of an RGB PNG, JPEG or WebP file; readers differ on EXIF's orientation and on transparency."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:  # Pillow raises almost anything
        plain = image.mode == "RGB" and not image.has_transparency_data and image.getexif().get(_ROTATION, 1) == 1
        if plain and image.format in ("PNG", "JPEG", "WEBP"):
            return f"image/{image.format.lower()}"
    return None


def parse_options(text: str) -> dict[str, str]:
    """Letter -> text of the options that `text` lists as (A) ..., A. ... or A: ..., from A on; {} if it lists none.

    The last list counts: a question may mention a letter before.
    """
    markers = [(m.group(1).upper(), m.start(), m.end()) for m in _MARKER.finditer(text)]
    best, best_rank = [], (2, False)
    for first, (letter, start, _) in enumerate(markers):
        if letter == "A":
            run: list[tuple[str, int, int]] = []
            for marker in markers[first:]:
                if marker[0] == _LETTERS[len(run) : len(run) + 1]:
                    run.append(marker)
            # of equally long lists one that begins a line, and of those the last
            rank = (len(run), text[:start].rstrip(" ")[-1:] in ("", "\n"))
            if rank >= best_rank:
                best, best_rank = run, rank
    options = {}
    for i, (letter, _, start) in enumerate(best):
        # the last option ends with its line: what follows tells how to answer
        piece = text[start : best[i + 1][1]] if i + 1 < len(best) else text[start:].split("\n")[0]
        options[letter] = piece.strip().rstrip(",;，；").strip()
    return options


def option_letter(answer: object) -> str | None:
    """The letter in an answer key such as B, (b), B. or B: text; None for anything else."""
    if not isinstance(answer, str):
        return None
    found = re.fullmatch(r"\s*[(\[（]?([A-Ha-h])(?:[)\]）.:：](?:\s.*)?)?\s*", answer, re.DOTALL)
    return found.group(1).upper() if found else None


def told_apart(name: str, seen: dict[str, int]) -> str:
    """`name`, with a number from its second occurrence on: files number their questions anew in each part."""
    count = seen[name] = seen.get(name, 0) + 1
    return name if count == 1 else told_apart(f"{name}#{count}", seen)  # which may itself be a name of the file


def stored_questions(path: str, data: DataConfig, unusable: list[str]) -> Iterator[Question]:
    """The records of the Energon data set `path` as questions; why one cannot be used goes to `unusable`."""
    seen: dict[str, int] = {}
    for record in iterate_records(path):
        try:
            meta = parse_meta(record.meta)
            sample_id, text = check_id(meta.get("id", record.name)), check_question(meta.get("question"))
            if record.image is None:
                raise UnusableSample("missing_image")
            kind, answers, options = classify(text, check_answers(meta.get("answer")))
        except UnusableSample as reason:
            unusable.append(f"{record.name}: {reason}")
            continue
        sample_id = told_apart(sample_id, seen)
        if not answers:
            unusable.append(f"{sample_id}: has no answer to compare with")
            continue
        shown = record.image, record.crop, meta.get("bbox")
        prompt = text + data.question_hint
        yield Question(sample_id, prompt, answers[0], kind, *shown, options, other_answers=answers[1:])


def classify(question: str, answers: Sequence[str]) -> tuple[str, list[str], dict[str, str]]:
    """(kind, answers, options) by which a reply to a record of one's own is graded.

    The letter of an option that the question lists is read as one, and yes or no as such; all else, and answers of
    several kinds, are texts.
    """
    found = [_classified(question, answer) for answer in answers if answer.strip()]
    if len({kind for kind, _, _ in found}) == 1:
        return found[0][0], [answer for _, answer, _ in found], found[0][2]
    return TEXT, [_bare(answer) for answer in answers if answer.strip()], {}


def _bare(answer: str) -> str:
    if "<answer>" in answer or "boxed{" in answer:  # reasoning data sets mark the key as a reply is to mark it
        answer = final_answer(answer) or answer
    return answer.strip()


def _classified(question: str, answer: str) -> tuple[str, str, dict[str, str]]:
    answer = _bare(answer)
    options = parse_options(question)
    letter = option_letter(answer)
    if letter is not None and letter in options:
        return OPTION, letter, options
    if answer.strip(" .").lower() in ("yes", "no"):
        return YES_NO, answer.strip(" .").lower(), {}
    return TEXT, answer, {}


def exact_match(reply: str, answer: str) -> bool:
    """Whether reply and answer are the same words: spacing, case and a final full stop do not count."""
    words, wanted = (text.lower().rstrip(" .!").split() for text in (reply, answer))
    return words == wanted


def grade(reply: str, answers: Sequence[str], kind: str, options: Mapping[str, str]) -> bool | None:
    """Whether `reply` says one of `answers`; None where rules cannot tell (a judge may).

    Options and yes/no: what is chosen decides, a reply that chooses nothing is left open. Open questions: right if
    the texts are the same, else open, as other words can say the same. An empty reply is wrong.
    """
    if not reply.strip():
        return False
    if kind == TEXT:
        return True if any(exact_match(reply, answer) or same_text(reply, answer) for answer in answers) else None
    chosen = extract_option(reply, options) if kind == OPTION else extract_yes_no(reply)
    return None if chosen is None else chosen in answers
