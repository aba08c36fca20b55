"""Between a run's checkpoint and a Hugging Face directory.

python recipes/convert_checkpoint.py export checkpoint=runs/train/checkpoints/last output=my/student
python recipes/convert_checkpoint.py export checkpoint=runs/train/checkpoints/last output=my/teacher weights=teacher
python recipes/convert_checkpoint.py import model.hf_path=my/student output=my/checkpoint

Under torchrun, the ranks of an export share the files out; those of an import hold the model together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from nemo_vopd.cli import run_recipe
from nemo_vopd.command_line import Command
from nemo_vopd.config import Config, ModelConfig, ParallelConfig, PrecisionConfig
from nemo_vopd.errors import OptionError
from nemo_vopd.validation import typed, validate


@dataclass
class ConvertConfig:
    """What to convert; `parallel` and `precision` are those of an import."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=lambda: PrecisionConfig("auto"))
    action: str = "???"
    """export | import: the first word on the command line."""
    checkpoint: str | None = None
    """export: a folder checkpoints/step-* or checkpoints/last."""
    output: str = "???"
    """New directory."""
    weights: str = "student"
    """export: student | teacher"""


ConfigStore.instance().store(name="nemo_vopd_convert", node=ConvertConfig)
COMMAND = Command(ConvertConfig, "convert_checkpoint", word="action")


def main(cfg: DictConfig) -> None:
    """Check the request, then convert."""
    options = typed(cfg, ConvertConfig)
    config = Config(model=options.model, parallel=options.parallel, precision=options.precision)
    config.data.path = "unused"
    validate(config)
    output = Path(options.output)
    if options.action not in ("export", "import"):
        raise OptionError("action", options.action, "must be export or import", "say convert_checkpoint.py export ...")
    if options.weights not in ("student", "teacher"):
        raise OptionError("weights", options.weights, "must be student or teacher", "set weights=student")
    if output.exists():
        raise OptionError("output", output, "exists", "choose another directory")
    if options.action == "export":
        _require_checkpoint(options.checkpoint)
    if options.action == "import" and not config.model.hf_path:
        raise OptionError("model.hf_path", config.model.hf_path, "names no directory", "give the model to import")
    from nemo_vopd.tools.convert import export_checkpoint, import_model  # Megatron takes seconds to import

    if options.action == "export":
        export_checkpoint(config, Path(options.checkpoint or ""), options.weights, output)
    else:
        import_model(config, output)


def _require_checkpoint(checkpoint: str | None) -> None:
    """Raise OptionError, with the folder that may have been meant, for what is no checkpoint at first sight."""
    folder, remedy = Path(checkpoint or ""), "give a folder of <exp_dir>/checkpoints"
    if checkpoint is None or not folder.is_dir():
        raise OptionError("checkpoint", checkpoint, "is not a directory", remedy)
    for inside in ("checkpoints/last", "last"):
        if (folder / inside).is_dir():
            rule = "is the folder of a run" if "/" in inside else "is the folder of all checkpoints"
            raise OptionError("checkpoint", checkpoint, rule, f"give checkpoint={folder / inside}")
    if (folder / "config.json").is_file() and not (folder / "manifest.json").exists():
        raise OptionError("checkpoint", checkpoint, "is a model directory, which needs no export", remedy)


if __name__ == "__main__":
    run_recipe(main, COMMAND)
