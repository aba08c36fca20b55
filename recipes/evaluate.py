"""Accuracy of a model on the full and the crop view of a data set with answers, and the gap between them.

python recipes/evaluate.py model.hf_path=DIR data.path=DATASET output=results.json
torchrun --nproc-per-node 8 recipes/evaluate.py model.hf_path=DIR data.path=DATASET parallel.tensor=8
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from nemo_vopd.cli import run_recipe
from nemo_vopd.config import Config
from nemo_vopd.errors import OptionError
from nemo_vopd.validation import from_hydra


@dataclasses.dataclass
class EvaluateConfig(Config):
    """A run's configuration; model, data, parallel, precision and the response length are used."""

    limit: int | None = None
    """Number of samples, in stored order; null takes all."""
    output: str | None = None
    """JSON file for the accuracies and every reply."""


ConfigStore.instance().store(name="nemo_vopd_evaluate", node=EvaluateConfig)


def main(cfg: DictConfig) -> None:
    """Answer greedily from both views, print the table, write the JSON."""
    config = from_hydra(cfg, EvaluateConfig)
    if config.output is not None:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    if config.limit is not None and config.limit < 1:
        raise OptionError("limit", config.limit, "must be at least 1", "set limit=null for all samples")
    from nemo_vopd.evaluation.gap import evaluate_directory  # Megatron takes seconds to import: mistakes first
    from nemo_vopd.mcore import parallel

    groups = parallel.initialize(config.parallel, seed=config.seed)
    gap = evaluate_directory(config, groups, limit=config.limit)
    if not parallel.is_rank_zero():
        return
    result = {
        "model": config.model.hf_path,
        "data": config.data.path,
        "num_samples": len(gap.replies),
        "full_accuracy": gap.full_accuracy,
        "crop_accuracy": gap.crop_accuracy,
        "gap": gap.gap,
    }
    for name, value in result.items():
        print(f"{name:14} {value:.4f}" if isinstance(value, float) else f"{name:14} {value}")
    if config.output is not None:
        replies = [dataclasses.asdict(reply) for reply in gap.replies]
        partial = Path(config.output + ".partial")
        partial.write_text(json.dumps({**result, "replies": replies}, indent=1) + "\n")
        partial.replace(config.output)


if __name__ == "__main__":
    run_recipe(main, "evaluate")
