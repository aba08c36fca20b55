"""Turn records with images into an Energon data set, look at them first, or check a data set that was made.

python recipes/prepare_data.py source=data.jsonl output=datasets/mine
python recipes/prepare_data.py source=data.jsonl output=datasets/mine --preview
python recipes/prepare_data.py verify=datasets/mine
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from nemo_vopd.cli import run_recipe
from nemo_vopd.config import CropConfig, PixelConfig
from nemo_vopd.errors import OptionError
from nemo_vopd.options import bounded
from nemo_vopd.tools.prepare.columns import Columns
from nemo_vopd.tools.prepare.intake import HINT
from nemo_vopd.tools.prepare.prepare import interruptible, prepare
from nemo_vopd.validation import check_crop, typed
from nemo_vopd.views import MAX_IMAGE_PIXELS


@dataclass
class PrepareConfig:
    """Options of this recipe."""

    source: Any = None
    """JSONL file, folder (Vision-OPD-6K, parquet files, a data set of `save_to_disk`), parquet file, or a list."""
    output: str | None = None
    """New directory of the Energon data set."""
    columns: Columns = field(default_factory=Columns)
    """Names of the columns (JSON keys) of a record; null takes those that are known (docs/data.md)."""
    bbox_format: str = "xyxy"
    """xyxy | xywh | xyxy_unit | xyxy_1000: pixels, corner and size in pixels, fractions of the sides, thousandths."""
    bbox_frame: str = "upright"
    """upright | stored: boxes refer to the image as EXIF turns it, or to its stored pixels."""
    split: str | None = None
    """Part of a source that has several (train, test, ...)."""
    image_root: str | None = None
    """Folder that image paths start from and must not leave; null: the folder of the source."""
    validation_fraction: float = 0.0
    """Share of the records that goes to `output`/validation instead of `output`/train, by a hash."""
    split_by: str = "id"
    """id | image: what is hashed; with image, one photograph is never on both sides."""
    weights: list[float] | None = None
    """How often each source is drawn, of several; null: by their sizes."""
    hint: str = "keep"
    """keep | remove: `hint_text` in questions."""
    hint_text: str = HINT
    shard_size: int = 1000
    """Records of the source in one tar file."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Larger images are dropped; at most 100 million, the bound of the training run."""
    workers: int = 4
    """Processes that read, check and write."""
    overwrite: bool = False
    """Replace `output` when it is a prepared data set."""
    preview: bool = False
    """Write a picture of some records to OUTPUT.preview.png and stop."""
    preview_samples: int = bounded(12, at_least=1)
    """Number of records in the preview."""
    crop: CropConfig = field(default_factory=CropConfig)
    """Crop policy of the preview and the data card; training has its own, data.crop."""
    crop_pixels: PixelConfig = field(default_factory=PixelConfig)
    """Resizing of crops in the preview, as data.crop_pixels in training."""
    verify: str | None = None
    """Check this prepared data set against what was written, and stop."""


ConfigStore.instance().store(name="prepare_data_schema", node=PrepareConfig)


def main(cfg: DictConfig, preview: bool) -> None:
    """Prepare `cfg.source` as `cfg.output`, or preview, or verify."""
    config = typed(cfg, PrepareConfig)
    if config.verify is not None:
        _verify(config.verify, config.workers)
        return
    for option, value in (("source", config.source), ("output", config.output)):
        if value is None:
            raise OptionError(option, "???", "has no default", f"give it on the command line: {option}=...")
    check_crop(config.crop, "crop")
    _check_preview(config)
    sources = [Path(path) for path in ([config.source] if isinstance(config.source, str) else config.source)]
    image_root = None if config.image_root is None else Path(config.image_root)
    output = Path(str(config.output))
    record_options = {
        "columns": config.columns,
        "bbox_format": config.bbox_format,
        "bbox_frame": config.bbox_frame,
        "max_image_pixels": config.max_image_pixels,
        "hint": config.hint,
        "hint_text": config.hint_text,
        "validation_fraction": config.validation_fraction,
        "split_by": config.split_by,
    }
    if preview or config.preview:
        from nemo_vopd.tools.prepare.preview import write_preview

        write_preview(
            sources,
            output.with_name(f"{output.name}.preview.png"),
            crop=vars(config.crop),
            crop_pixels=(config.crop_pixels.min_pixels, config.crop_pixels.max_pixels),
            num_samples=config.preview_samples,
            split=config.split,
            image_root=image_root,
            **record_options,
        )
        return
    with interruptible():
        prepare(
            sources,
            output,
            shard_size=config.shard_size,
            workers=config.workers,
            overwrite=config.overwrite,
            split=config.split,
            image_root=image_root,
            weights=config.weights,
            crop={**vars(config.crop), "min_pixels": config.crop_pixels.min_pixels},
            **record_options,
        )


def _check_preview(config: PrepareConfig) -> None:
    """Check what only the preview and the data card use: a mistake is told at once, not in the next command."""
    least, most = config.crop_pixels.min_pixels, config.crop_pixels.max_pixels
    if not 1 <= least <= most:
        rule = f"must lie between 1 and crop_pixels.max_pixels={most}"
        raise OptionError("crop_pixels.min_pixels", least, rule, "lower it or raise crop_pixels.max_pixels")


def _verify(path: str, workers: int) -> None:
    from nemo_vopd.tools.prepare.index import verify

    found = verify(Path(path), workers=workers)
    print(
        f"{path} is whole: {found['records']} records in {found['shards']} shards, "
        f"{found['bytes'] / 1e6:.1f} MB, {found['data_sets']} data set{'s' * (found['data_sets'] > 1)}"
    )


if __name__ == "__main__":
    preview = "--preview" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--preview"]
    run_recipe(lambda cfg: main(cfg, preview), "prepare_data")
