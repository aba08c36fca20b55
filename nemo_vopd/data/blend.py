"""Several data sets as one: Energon's metadataset, a YAML file of paths and weights. Nothing is copied."""

from __future__ import annotations

import math
from pathlib import Path

import yaml

from nemo_vopd.errors import OptionError

_REMEDY = "prepare several sources with python recipes/prepare_data.py 'source=[A,B]' 'weights=[2,1]' output=DIRECTORY"


def is_blend(path: str | Path) -> bool:
    """Whether `path` names a blend rather than the directory of one data set."""
    return Path(path).suffix in (".yaml", ".yml")


def write_blend(path: Path, parts: list[tuple[str, float]]) -> None:
    """Write the blend of `parts` (path relative to the file, weight) for training."""
    blend = [{"weight": weight, "path": part} for part, weight in parts]
    content = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {"train": {"blend": blend}}}
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def read_blend(path: str | Path, option: str = "data.path") -> list[tuple[Path, float]]:
    """(data set, weight) of each part. Raises OptionError, about `option`, unless it is what `write_blend` writes."""
    try:
        content = yaml.safe_load(Path(path).read_text())
        if content["__class__"] != "MetadatasetV2":
            raise ValueError(f"a {content['__class__']}")
        entries = content["splits"]["train"]["blend"]
        parts = [(Path(path).parent / entry["path"], float(entry["weight"])) for entry in entries]
    except OSError as error:
        raise OptionError(option, path, f"cannot be read ({error.strerror})", _REMEDY) from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError, UnicodeDecodeError):
        raise OptionError(option, path, "is no blend of data sets (splits: train: blend: [...])", _REMEDY) from None
    wrong = [weight for _, weight in parts if not (math.isfinite(weight) and weight > 0)]
    if wrong or not parts:
        rule = f"has the weight {wrong[0]}" if wrong else "blends nothing"
        raise OptionError(option, path, f"{rule}; weights must be positive", _REMEDY)
    return parts
