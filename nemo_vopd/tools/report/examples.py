"""examples.json of a run: what the model says to a few held-out questions, and a few responses token by token."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from nemo_vopd.batch import Rollout, Sample
from nemo_vopd.config import DataConfig
from nemo_vopd.data.dataset import iterate_records
from nemo_vopd.data.encoder import SampleEncoder, cut_crop, parse_meta
from nemo_vopd.data.processor import Processor
from nemo_vopd.decoding import load_image, load_with_box
from nemo_vopd.mcore import parallel
from nemo_vopd.mcore.stage import Stage
from nemo_vopd.model import VisionOPDModel
from nemo_vopd.rollout.native.engine import Decoder
from nemo_vopd.tools.evaluation.gap import Reply, measure_gap
from nemo_vopd.tools.evaluation.traces import MAX_TOKENS, ResponseTrace, trace
from nemo_vopd.tools.report.examples_file import Answer, Example, Examples, TokenTrace, picture, write_examples

NUM_EXAMPLES = 9
_FILE, _FIRST_REPLIES = "examples.json", "first_replies.json"


@dataclass
class ShownSample:
    """A usable record of a data set: its prompts, and its images as a person sees them."""

    sample: Sample
    image: Image.Image
    crop: Image.Image
    bbox: tuple[float, float, float, float] | None
    text: str


def read_questions(path: str | Path, data: DataConfig, processor: Processor, num_records: int) -> list[ShownSample]:
    """The usable ones among the first `num_records` records of the Energon data set `path`, crop beside full image."""
    encode, questions = SampleEncoder(data, "crop", processor), []
    for record in iterate_records(path, num_records):
        sample = encode(record)
        if isinstance(sample, Sample):  # so its parts are in order
            meta = parse_meta(record.meta)
            assert record.image is not None
            image, bbox = load_with_box(record.image, meta.get("bbox"))
            crop = load_image(record.crop) if record.crop is not None else cut_crop(image, bbox, data)
            questions.append(
                ShownSample(sample, image, crop, tuple(bbox) if isinstance(bbox, list) else None, str(meta["question"]))
            )
    return questions


def make_examples(questions: list[ShownSample], before: list[Reply], after: list[Reply]) -> list[Example]:
    """A card for each question; replies find their question by its id, and may be missing."""
    first, last = ({reply.id: reply for reply in replies} for replies in (before, after))
    examples = []
    for question in questions:
        name = question.sample.id
        pictures = picture(question.image), question.bbox, picture(question.crop)
        answers = *_said(first.get(name)), *_said(last.get(name))
        full_before, crop_before, full_after, crop_after = answers
        shown = full_before, full_after, crop_before, crop_after
        examples.append(Example(*pictures, question.text, " or ".join(question.sample.answers) or None, *shown))
    return examples


def _said(reply: Reply | None) -> tuple[Answer | None, Answer | None]:
    if reply is None:
        return None, None
    return Answer(reply.full, reply.full_correct), Answer(reply.crop, reply.crop_correct)


def make_traces(
    model: VisionOPDModel, questions: list[ShownSample], student: Stage, teacher: Stage
) -> list[TokenTrace]:
    """A response of `student` to the full image of each question, sampled as in training, scored by both.

    Every rank of a model-parallel group takes part.
    """
    if not questions:
        return []
    config, samples = model.config, [question.sample for question in questions]
    length = min(config.rollout.max_response_length, MAX_TOKENS)
    params = dataclasses.replace(model.sampling_params, n=1, max_response_length=length)
    decoder = Decoder(student, model.groups, config.rollout.max_batch_tokens, model.processor.decode)
    answers = decoder([s.student for s in samples], [s.id for s in samples], params)
    rollouts = [Rollout(sample, *answer[0]) for sample, answer in zip(samples, answers, strict=True)]
    temperature = config.rollout.temperature
    traced = trace(rollouts, student, teacher, model.processor, config.distill, temperature, model.groups)
    return [_token_trace(question, one) for question, one in zip(questions, traced, strict=True)]


def _token_trace(question: ShownSample, one: ResponseTrace) -> TokenTrace:
    numbers = one.student.log_probs, one.teacher.log_probs, one.divergence, one.student.top, one.teacher.top
    return TokenTrace(picture(question.image), picture(question.crop), question.text, one.tokens, *numbers)


def keep_replies(folder: Path, replies: list[Reply]) -> None:
    """Remember the first of `replies`, those of the model that the run starts from."""
    kept = [dataclasses.asdict(reply) for reply in replies[:NUM_EXAMPLES]]
    partial = folder / f"{_FIRST_REPLIES}.partial"
    partial.write_text(json.dumps(kept) + "\n", encoding="utf-8")
    partial.replace(folder / _FIRST_REPLIES)


def _first_replies(folder: Path) -> list[Reply]:
    """What `keep_replies` kept, if it did, in this version's form."""
    file, names = folder / _FIRST_REPLIES, {field.name for field in dataclasses.fields(Reply)}
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return [Reply(**row) for row in rows if set(row) == names]


def forget_examples(folder: Path) -> None:
    """Remove what an earlier run left: it must not be taken for this one."""
    for name in (_FILE, _FIRST_REPLIES):
        (folder / name).unlink(missing_ok=True)


def write_run_examples(model: VisionOPDModel) -> None:
    """examples.json of a finished run with `evaluation.path`; every rank takes part."""
    config, folder = model.config, Path(model.config.exp_manager["exp_dir"])
    if config.evaluation.path is None or model.control.finished(model.trainer.global_step) is None:
        return
    path, num_traces = config.evaluation.path, config.evaluation.num_traces
    num_records = max(NUM_EXAMPLES, num_traces)
    questions = read_questions(path, config.data, model.processor, num_records)
    after: list[Reply] = []
    # what `measure_gap` asks for: a run that is finished must not end on it
    if any(question.sample.answers for question in questions):
        decoder = Decoder(model.student, model.groups, config.rollout.max_batch_tokens)
        length = config.rollout.max_response_length
        arguments = decoder, model.processor, path, config.data, model.groups
        gap = measure_gap(*arguments, max_response_length=length, limit=num_records, option="evaluation.path")
        after = gap.replies
    traces = make_traces(model, questions[:num_traces], model.student, model.teacher_model)
    if parallel.is_rank_zero():
        note = "Responses of the student at the end of the run, scored by it and by its teacher."
        shown = make_examples(questions[:NUM_EXAMPLES], _first_replies(folder), after)
        write_examples(folder / _FILE, Examples(shown, traces, note))
