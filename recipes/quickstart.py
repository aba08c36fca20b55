"""The whole method in minutes on two CPU cores, without a download.

    python recipes/quickstart.py
    python recipes/quickstart.py seed=2
    python recipes/quickstart.py distill.teacher_view=full exp_manager.exp_dir=runs/control

Makes a data set, warms a tiny VLM up until it reads crops better than full images (the paper's regional-to-global
gap), closes that gap by on-policy self-distillation without labels, and writes summary.json and report.html.
Training is `train_vopd` itself, on a Hugging Face directory and an Energon data set like any other run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import time
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from nemo_vopd.bounds import bounded
from nemo_vopd.cli import run_recipe
from nemo_vopd.command_line import Command
from nemo_vopd.config import Config, OptimizerConfig
from nemo_vopd.errors import OptionError
from nemo_vopd.tools.prepare.prepare import prepare
from nemo_vopd.tools.prepare.synthetic import write_digits
from nemo_vopd.tools.prepare.tiny_model import write_tiny_model
from nemo_vopd.validation import from_hydra

PARTS = ("data", "init", "base", "student")
"""Folders below exp_dir that every run of this recipe makes anew."""


@dataclasses.dataclass
class WarmupOptions:
    """The supervised phase that opens the gap."""

    steps: int = bounded(800, at_least=1)
    """Number of optimizer steps."""
    batch_size: int = bounded(32, at_least=1)
    """Number of prompts of one step."""
    num_samples: int = bounded(8192, at_least=1)
    """Number of records."""
    full_fraction: float = bounded(0.3125, at_least=0, at_most=1)
    """Share of prompts that show the full image; the others show the crop."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)


@dataclasses.dataclass
class QuickstartConfig(Config):
    """A training run and what comes before and after it."""

    warmup: WarmupOptions = dataclasses.field(default_factory=WarmupOptions)
    num_train_samples: int = bounded(9600, at_least=1)
    """Number of records that Vision-OPD trains on."""
    num_test_samples: int = bounded(1024, at_least=1)
    """Number of held-out questions."""
    close_up_fraction: float = bounded(0.15, at_least=0, at_most=1)
    """Share of training images that are close-ups already, as photographs may be; they keep the crop view alive."""


ConfigStore.instance().store(name="nemo_vopd_quickstart", node=QuickstartConfig)
COMMAND = Command(QuickstartConfig, "quickstart")


def main(cfg: DictConfig) -> None:
    """Data, warm-up, accuracy before, Vision-OPD, accuracy after, report."""
    start = time.perf_counter()
    root = Path(cfg.exp_manager.exp_dir)
    cfg.model.hf_path, cfg.data.path = str(root / "base"), str(root / "data" / "train")
    cfg.evaluation.path = str(root / "data" / "validation")
    config = from_hydra(cfg, QuickstartConfig)
    check(config)
    claim(root)
    clock = Clock()

    with clock("data", "Making images, an Energon data set and a random model"):
        make_data(config, root)

    from nemo_vopd.mcore import parallel  # Megatron takes seconds to import: mistakes are told first
    from nemo_vopd.tools import quickstart

    quickstart.quiet()
    groups = parallel.initialize(config.parallel, seed=config.seed)
    with clock("warmup", f"Warming up on answers, mostly with crops: {config.warmup.steps} steps"):
        quickstart.warm_up_base(config, groups, root)
    with clock("before", f"Accuracy on {config.num_test_samples} held-out questions"):
        before = quickstart.measure(config, groups, root / "base", root / "data" / "test")
    print(f"      full image {before.full_accuracy:.1%}, crop {before.crop_accuracy:.1%}, gap {before.gap:.1%}")

    with clock("train", f"Vision-OPD without labels: {config.trainer.max_steps} steps"):
        model = quickstart.distill(config, root)
    with clock("after", f"Accuracy on {config.num_test_samples} held-out questions"):
        after = quickstart.measure(config, groups, root / "student", root / "data" / "test")

    summary = {
        "full_accuracy_before": before.full_accuracy,
        "full_accuracy_after": after.full_accuracy,
        "crop_accuracy_before": before.crop_accuracy,
        "crop_accuracy_after": after.crop_accuracy,
        "gap_closed": (after.full_accuracy - before.full_accuracy) / max(before.gap, 1e-9),
        "num_test_samples": len(after.replies),
        "wall_seconds": time.perf_counter() - start,
        "seed": config.seed,
        "teacher_view": config.distill.teacher_view,
        "num_parameters": quickstart.num_parameters(model),
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "seconds_by_phase": clock.seconds,
    }
    quickstart.report(config, root, model, before, after, summary)
    summary["wall_seconds"] = time.perf_counter() - start
    (root / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(
        f"\nfull image {before.full_accuracy:.1%} -> {after.full_accuracy:.1%}, "
        f"crop {before.crop_accuracy:.1%} -> {after.crop_accuracy:.1%}, "
        f"gap closed {summary['gap_closed']:.0%} in {summary['wall_seconds']:.0f} s\n"
        f"{root / 'report.html'}\n{root / 'summary.json'}"
    )


def check(config: QuickstartConfig) -> None:
    """Raise OptionError for what the recipe adds to a run's options."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptionError(
            "WORLD_SIZE", os.environ["WORLD_SIZE"], "the quickstart is one process", "start it without torchrun"
        )


def claim(root: Path) -> None:
    """Mark `root` as this recipe's; refuse a folder whose data or models somebody else put there."""
    marker = root / ".quickstart"
    taken = [name for name in PARTS if (root / name).exists()]
    if taken and not marker.exists():
        rule = f"holds {taken[0]}, which this recipe did not make and would replace"
        raise OptionError("exp_manager.exp_dir", root, rule, "choose another folder")
    root.mkdir(parents=True, exist_ok=True)
    marker.touch()


def make_data(config: QuickstartConfig, root: Path) -> None:
    """Four disjoint sets of images below `root`/data, each with its own seed, and a random model in `root`/init."""
    for name in PARTS:
        shutil.rmtree(root / name, ignore_errors=True)
    for name in ("summary.json", "examples.json"):  # of an earlier run; a report may be made while this one goes on
        (root / name).unlink(missing_ok=True)
    write_tiny_model(root / "init", seed=config.seed)
    sets = {
        "warmup": (config.warmup.num_samples, 0.0),
        "train": (config.num_train_samples, config.close_up_fraction),
        "validation": (config.evaluation.num_samples, 0.0),
        "test": (config.num_test_samples, 0.0),
    }
    for number, (name, (num_samples, close_ups)) in enumerate(sets.items()):
        images = root / "data" / f"{name}_images"
        write_digits(images, num_samples=num_samples, seed=10 * config.seed + number, close_up_fraction=close_ups)
        if name == "train":
            remove_answers(images / "data.jsonl")
        prepare(images / "data.jsonl", root / "data" / name, progress=False)


def remove_answers(path: Path) -> None:
    """Take the answers out of a JSONL file: Vision-OPD is to learn without them."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        del record["answer"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


class Clock:
    """Prints the phases and keeps their seconds."""

    NUM_PHASES = 5

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._start = "", 0.0

    def __call__(self, name: str, title: str) -> Clock:
        """Start phase `name`."""
        print(f"[{len(self.seconds) + 1}/{self.NUM_PHASES}] {title}", flush=True)
        self._name, self._start = name, time.perf_counter()
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.seconds[self._name] = time.perf_counter() - self._start


if __name__ == "__main__":
    run_recipe(main, COMMAND)
