"""Train with Vision-OPD.

python recipes/train_vopd.py --config-name tiny
torchrun --nproc-per-node 2 recipes/train_vopd.py --config-name tiny parallel.tensor=2
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from nemo_vopd.cli import run_recipe
from nemo_vopd.command_line import Command
from nemo_vopd.config import Config
from nemo_vopd.training.signals import StopSignals
from nemo_vopd.validation import from_hydra

COMMAND = Command(Config, None)


def main(cfg: DictConfig) -> None:
    """Check the configuration, then train."""
    signals = StopSignals()
    signals.listen()
    config = from_hydra(cfg)
    from nemo_vopd.tools.prepare.tiny_model import ensure_tiny_assets

    ensure_tiny_assets(Path(config.model.hf_path), Path(config.data.path))
    from nemo_vopd.tools.during_training import GapDuringTraining
    from nemo_vopd.training.run import train  # Megatron takes seconds to import: mistakes are told first

    train(config, signals, GapDuringTraining(config))


if __name__ == "__main__":
    run_recipe(main, COMMAND)
