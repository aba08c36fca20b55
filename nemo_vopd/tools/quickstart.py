"""The phases of recipes/quickstart.py that need Megatron."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

from megatron.core.process_groups_config import ProcessGroupCollection
from nemo.utils import logging as nemo_logging

from nemo_vopd.config import Config, DataConfig
from nemo_vopd.data.processor import Processor
from nemo_vopd.model import VisionOPDModel
from nemo_vopd.rollout.native.engine import Decoder
from nemo_vopd.tools.during_training import GapDuringTraining
from nemo_vopd.tools.evaluation.gap import Gap, measure_gap
from nemo_vopd.tools.report.examples import NUM_EXAMPLES, make_examples, make_traces, read_questions
from nemo_vopd.tools.report.examples_file import Examples, write_examples
from nemo_vopd.tools.report.header import gap_figure_svg
from nemo_vopd.tools.report.page import write_report
from nemo_vopd.tools.report.run_files import read_run
from nemo_vopd.tools.warmup import warm_up
from nemo_vopd.training.run import train
from nemo_vopd.vlm.build import build_vlm
from nemo_vopd.vlm.weights.export import save_hf

NUM_TRACES = 4


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
    save_hf(model, groups, root / "init", root / "base")


def measure(config: Config, groups: ProcessGroupCollection, hf_path: Path, data_path: Path) -> Gap:
    """Greedy accuracy of the model in `hf_path` on both views of `data_path`."""
    run = _pointed_at(config, hf_path, data_path)
    decoder = Decoder(build_vlm(run, groups), groups, run.rollout.max_batch_tokens)
    processor, length = Processor.from_pretrained(run.model.hf_path), run.rollout.max_response_length
    return measure_gap(decoder, processor, run.data.path, run.data, groups, length)


def distill(config: Config, root: Path) -> VisionOPDModel:
    """`train_vopd` on `root`/base; writes the student to `root`/student."""
    evaluation = dataclasses.replace(config.evaluation, num_traces=0)  # the report has its own
    folder = {**config.exp_manager, "exp_dir": str(root / "train")}
    run = dataclasses.replace(config, exp_manager=folder, evaluation=evaluation)
    model = train(run, evaluation=GapDuringTraining(run))
    save_hf(model.student, model.groups, root / "base", root / "student")
    return model


def num_parameters(model: VisionOPDModel) -> int:
    """Parameters of the student on this rank."""
    return sum(p.numel() for p in model.student.parameters())


def report(config: Config, root: Path, model: VisionOPDModel, before: Gap, after: Gap, summary: dict) -> None:
    """Write summary.json, examples.json, report.html and gap.svg to `root`."""
    run = _pointed_at(config, root / "base", root / "data" / "test")
    questions = read_questions(run.data.path, run.data, model.processor, NUM_EXAMPLES)
    # the student that started the run: where its answers were wrong, the divergence shows what the teacher corrects
    start = build_vlm(run, model.groups)
    traces = make_traces(model, questions[:NUM_TRACES], start, start)
    note = "Responses of the student before training, from the full image; the teacher is the same model with the crop."
    write_examples(
        root / "examples.json", Examples(make_examples(questions, before.replies, after.replies), traces, note)
    )
    (root / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    write_report(root / "report.html", read_run(root))
    (root / "gap.svg").write_text(gap_figure_svg(summary))
