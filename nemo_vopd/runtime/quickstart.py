"""The phases of recipes/quickstart.py that need Megatron."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path

from megatron.core.process_groups_config import ProcessGroupCollection
from nemo.utils import logging as nemo_logging
from PIL import Image

from nemo_vopd.batch import Rollout, Sample
from nemo_vopd.config import Config, DataConfig
from nemo_vopd.data.processor import Processor
from nemo_vopd.data.task_encoder import iterate_samples
from nemo_vopd.data.views import crop_box
from nemo_vopd.evaluation.gap import Gap, evaluate_directory
from nemo_vopd.evaluation.report import Example, TokenTrace, gap_figure_svg, write_report
from nemo_vopd.evaluation.traces import trace
from nemo_vopd.model import VisionOPDModel
from nemo_vopd.rollout.megatron import Decoder
from nemo_vopd.runtime.environment import implementations, versions
from nemo_vopd.runtime.metrics import read_metrics
from nemo_vopd.runtime.training import train
from nemo_vopd.runtime.warmup import warm_up
from nemo_vopd.vlm import build_vlm
from nemo_vopd.vlm.hf_weights import save_hf

NUM_EXAMPLES, NUM_TRACES = 9, 4


def quiet() -> None:
    """Leave the console to the phases: libraries report errors only."""
    nemo_logging.setLevel(nemo_logging.ERROR)
    for name in ("lightning.pytorch", "megatron"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _pointed_at(config: Config, hf_path: Path, data_path: Path, **data: object) -> Config:
    changed: DataConfig = dataclasses.replace(config.data, path=str(data_path), **data)  # type: ignore[arg-type]
    return dataclasses.replace(config, model=dataclasses.replace(config.model, hf_path=str(hf_path)), data=changed)


def warm_up_base(config, groups: ProcessGroupCollection, root: Path) -> None:
    """Train the random model of `root`/init on answers; writes `root`/base and `root`/warmup.jsonl."""
    run = _pointed_at(config, root / "init", root / "data" / "warmup", batch_size=config.warmup.batch_size)
    warmup = config.warmup
    log = root / "warmup.jsonl"
    model = warm_up(run, groups, log, steps=warmup.steps, full_fraction=warmup.full_fraction, options=warmup.optimizer)
    save_hf(model, model.weight_rule, groups, root / "init", root / "base")


def measure(config: Config, groups: ProcessGroupCollection, hf_path: Path, data_path: Path) -> Gap:
    """Greedy accuracy of the model in `hf_path` on both views of `data_path`."""
    return evaluate_directory(_pointed_at(config, hf_path, data_path), groups)


def _samples(config: Config, processor: Processor, limit: int | None = None) -> Iterator[Sample]:
    for item in iterate_samples(config.data.path, config.data, "crop", processor, limit):
        if isinstance(item, Sample):
            yield item


def distill(config: Config, root: Path) -> VisionOPDModel:
    """`train_vopd` on `root`/base; writes the student to `root`/student."""
    run = dataclasses.replace(config, exp_manager={**config.exp_manager, "exp_dir": str(root / "train")})
    model = train(run)
    save_hf(model.student, model.student.weight_rule, model.groups, root / "base", root / "student")
    return model


def num_parameters(model: VisionOPDModel) -> int:
    """Parameters of the student on this rank."""
    return sum(p.numel() for p in model.student.parameters())


def report(config: Config, root: Path, model: VisionOPDModel, before: Gap, after: Gap, summary: dict) -> None:
    """Write report.html and gap.svg to `root`."""
    processor, records = model.processor, dict(_stored(root / "data" / "test"))
    examples = []
    for first, last in list(zip(before.replies, after.replies, strict=True))[:NUM_EXAMPLES]:
        image, meta = records[first.id]
        crop = image.crop(_crop(config, meta, image))
        answers = (first.full, last.full, first.crop, last.crop)
        examples.append(Example(image, tuple(meta["bbox"]), crop, meta["question"], meta["answer"], *answers))

    run = _pointed_at(config, root / "base", root / "data" / "test")
    samples = list(_samples(run, processor, limit=NUM_TRACES))
    # the student that started the run: where its answers were wrong, the divergence shows what the teacher corrects
    student = build_vlm(run, model.groups)
    params = dataclasses.replace(model.sampling_params(), n=1)
    decoder = Decoder(student, model.groups, config.rollout.max_batch_tokens, processor.decode)
    answers = decoder([s.student for s in samples], [s.id for s in samples], params)
    rollouts = [Rollout(s, *answer[0]) for s, answer in zip(samples, answers, strict=True)]
    traces = []
    traced = trace(rollouts, student, student, processor, config.distill, model.groups)
    for rollout, (tokens, policy, teacher, divergence) in zip(rollouts, traced, strict=True):
        image, meta = records[rollout.sample.id]
        crop = image.crop(_crop(config, meta, image))
        lists = (policy.log_probs, teacher.log_probs, divergence, policy.top, teacher.top)
        traces.append(TokenTrace(image, crop, meta["question"], tokens, *lists))

    facts = {**summary, "implementations": implementations(config), "versions": versions()}
    write_report(
        root / "report.html",
        title="Vision-OPD quickstart",
        summary=facts,
        metrics=read_metrics(root / "train" / "metrics.jsonl"),
        warmup=read_metrics(root / "warmup.jsonl"),
        evaluations=read_metrics(root / "train" / "evaluations.jsonl"),
        examples=examples,
        traces=traces,
    )
    (root / "gap.svg").write_text(gap_figure_svg(summary))


def _crop(config: Config, meta: dict, image: Image.Image) -> tuple[int, int, int, int]:
    crop = config.data.crop
    return crop_box(meta["bbox"], image.size, scale=crop.scale, min_side=crop.min_side, square=crop.square)


def _stored(path: Path) -> Iterator[tuple[str, tuple[Image.Image, dict]]]:
    """(id, (image, record)) of every sample of the Energon data set `path`."""
    for shard in sorted(path.glob("*.tar")):
        parts: dict[str, dict[str, bytes]] = {}
        with tarfile.open(shard) as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                file = tar.extractfile(member)
                assert file is not None
                parts.setdefault(key, {})[extension] = file.read()
        for part in parts.values():
            meta = json.loads(part["json"])
            yield meta["id"], (Image.open(io.BytesIO(part["image"])).convert("RGB"), meta)
