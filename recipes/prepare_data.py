"""Turn records with images into an Energon data set, look at them first, or check a data set that was made.

python recipes/prepare_data.py source=data.jsonl output=datasets/mine
python recipes/prepare_data.py source=data.jsonl output=datasets/mine --preview
python recipes/prepare_data.py verify=datasets/mine
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from nemo_vopd.bounds import bounded
from nemo_vopd.cli import run_recipe
from nemo_vopd.command_line import Command
from nemo_vopd.config import CropConfig, PixelConfig
from nemo_vopd.errors import OptionError
from nemo_vopd.tools.prepare.options import PrepareOptions
from nemo_vopd.tools.prepare.prepare import prepare
from nemo_vopd.validation import check_crop, typed


@dataclass
class PrepareConfig(PrepareOptions):
    """Options of this recipe; how records are stored is in nemo_vopd/tools/prepare/options.py."""

    source: Any = None
    """JSONL file, folder (Vision-OPD-6K, parquet files, a data set of `save_to_disk`), parquet file, or a list."""
    output: str | None = None
    """New directory of the Energon data set."""
    workers: int = bounded(4, at_least=1)
    """Number of processes that read, check and write."""
    overwrite: bool = False
    """Whether to replace `output` when it is a prepared data set."""
    preview: bool = False
    """Whether to write a picture of some records to OUTPUT.preview.png and stop."""
    preview_samples: int = bounded(12, at_least=1)
    """Number of records in the preview."""
    crop: CropConfig = field(default_factory=CropConfig)
    """Crop policy of the preview and the data card; training has its own, data.crop."""
    crop_pixels: PixelConfig = field(default_factory=PixelConfig)
    """Resizing of crops in the preview, as data.crop_pixels in training."""
    verify: str | None = None
    """Prepared data set to check against what was written; nothing else is done."""


ConfigStore.instance().store(name="prepare_data_schema", node=PrepareConfig)
COMMAND = Command(PrepareConfig, "prepare_data")


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
    # only the preview and the data card use them: a mistake is told at once, not in the next command
    least, most = config.crop_pixels.min_pixels, config.crop_pixels.max_pixels
    if not 1 <= least <= most:
        rule = f"must lie between 1 and crop_pixels.max_pixels={most}"
        raise OptionError("crop_pixels.min_pixels", least, rule, "lower it or raise crop_pixels.max_pixels")
    sources = [Path(path) for path in ([config.source] if isinstance(config.source, str) else config.source)]
    output, crop = Path(str(config.output)), vars(config.crop)
    options = {one.name: getattr(config, one.name) for one in fields(PrepareOptions)}
    if preview or config.preview:
        from nemo_vopd.tools.prepare.preview import write_preview

        target, num = output.with_name(f"{output.name}.preview.png"), config.preview_samples
        write_preview(sources, target, crop=crop, crop_pixels=(least, most), num_samples=num, **options)
        return
    crop = {**crop, "min_pixels": least}
    try:
        prepare(sources, output, workers=config.workers, overwrite=config.overwrite, crop=crop, **options)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; give the same command again to continue") from None


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
    run_recipe(lambda cfg: main(cfg, preview), COMMAND)
