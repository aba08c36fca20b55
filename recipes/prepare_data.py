"""Turn a JSONL file with images into an Energon data set.

python recipes/prepare_data.py source=data.jsonl output=datasets/mine
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from nemo_vopd.cli import run_recipe
from nemo_vopd.data.prepare import prepare
from nemo_vopd.data.views import MAX_IMAGE_PIXELS
from nemo_vopd.validation import typed


@dataclass
class PrepareConfig:
    """Options of this recipe."""

    source: str = "???"
    """JSONL file; image paths in it are relative to its folder."""
    output: str = "???"
    """New directory of the Energon data set."""
    shard_size: int = 1000
    """Records in one tar file."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Larger images are dropped; at most 100 million, the bound of the training run."""
    workers: int = 4
    """Threads that read and check images."""
    overwrite: bool = False
    """Replace `output` when it is a prepared data set."""


ConfigStore.instance().store(name="prepare_data_schema", node=PrepareConfig)


def main(cfg: DictConfig) -> None:
    """Prepare `cfg.source` as `cfg.output`."""
    config = typed(cfg, PrepareConfig)
    prepare(
        Path(config.source),
        Path(config.output),
        shard_size=config.shard_size,
        max_image_pixels=config.max_image_pixels,
        workers=config.workers,
        overwrite=config.overwrite,
    )


if __name__ == "__main__":
    run_recipe(main, "prepare_data")
