"""Accuracy on the public benchmarks, or on a data set with boxes or crops: both views and the gap between them.

python recipes/evaluate.py model.hf_path=DIR data.path=DATASET output=gap.json
python recipes/evaluate.py model.hf_path=DIR benchmark=[vstar,hrbench-4k] data.path=BENCHMARKS output=results.json
python recipes/evaluate.py engine=server server.url=http://HOST:8000/v1 server.model=NAME benchmark=pope data.path=POPE
torchrun --nproc-per-node 8 recipes/evaluate.py model.hf_path=DIR benchmark=vstar data.path=V parallel.tensor=8
"""

from __future__ import annotations

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from nemo_vopd.cli import run_recipe
from nemo_vopd.command_line import Command
from nemo_vopd.tools.evaluation.evaluate_options import EvaluateConfig, check
from nemo_vopd.validation import from_hydra

ConfigStore.instance().store(name="nemo_vopd_evaluate", node=EvaluateConfig)
COMMAND = Command(EvaluateConfig, "evaluate")


def main(cfg: DictConfig) -> None:
    """Ask, grade, print the tables, write the JSON."""
    if cfg.engine == "server":
        cfg.model.hf_path = cfg.server.model or "none"  # the server has the model
    config = from_hydra(cfg, EvaluateConfig)
    check(config)
    from nemo_vopd.tools.evaluation.evaluate import (
        evaluate,  # Megatron takes seconds to import: mistakes are told first
    )

    evaluate(config)


def help_text() -> str:
    """What --help says about the benchmarks."""
    from nemo_vopd.tools.evaluation.benchmarks import help_text

    return f"Benchmarks, where they are published and the columns they need:\n{help_text()}"


if __name__ == "__main__":
    run_recipe(main, COMMAND, help_text)
