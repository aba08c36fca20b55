"""README.md of an export: where the weights come from, in words and as front matter for the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load

from nemo_vopd import __version__
from nemo_vopd.data.dataset import Records, fingerprint
from nemo_vopd.errors import OptionError
from nemo_vopd.tools.report.facts import flat_options
from nemo_vopd.tools.report.numbers import format_area

_LICENCE = ("license", "license_name", "license_link")
_OPTIONS = (
    "distill.teacher_view", "distill.teacher.kind", "distill.alpha", "distill.top_k", "distill.add_tail",
    "distill.importance.max_weight", "rollout.n", "rollout.temperature", "rollout.max_response_length",
    "data.batch_size", "optimizer.lr", "precision.dtype", "seed",
)  # fmt: skip
_OF_TEACHER = {"ema": "rate", "periodic": "every", "trust_region": "mix"}
"""The option of each kind of teacher."""
_VIEWS = {
    "crop": "a crop around the evidence",
    "full": "the same full image",
    "full_and_crop": "the full image and a crop around the evidence",
    "boxed": "the full image with a box around the evidence",
}
_WEIGHTS = {
    "student": "These are the weights of the student, the model that was trained.",
    "teacher": "These are the weights of the teacher; `distill.teacher.kind` below tells how it followed the student.",
}


def model_card(manifest: dict[str, Any], kind: str, source: Path) -> str:
    """The card of the `kind` (student or teacher) in a checkpoint of a run with `manifest`, trained from `source`.

    Of paths it holds the last parts only. What is not at hand is said to be unknown.
    """
    options, step = dict(flat_options(manifest["config"])), manifest["step"]
    chosen = "\n".join(_options(options))
    metadata = _front_matter(source / "README.md")
    name, licence = _name_of_itself(metadata) or _identifier(source), {}
    if metadata.get("license"):
        licence = {key: metadata[key] for key in _LICENCE if metadata.get(key)}
    front = {
        "base_model": _identifier(source),
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["vision-opd", "self-distillation", "arxiv:2605.18740"],
        **licence,
    }
    folder, view = _last_parts(source), str(options.get("distill.teacher_view"))
    whose = name if folder == name else f"{name}, in the directory {folder}"
    versions = ", ".join(f"{name} {one}" for name, one in manifest["versions"].items() if one != "absent")
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}
---

# {name} after {step} steps of Vision-OPD

{_WEIGHTS[kind]}
Vision-OPD (arXiv 2605.18740) is on-policy self-distillation: the student samples responses from the full image, and its
teacher, which sees {_VIEWS.get(view, view)}, scores them token by token. Training uses no answers and no other model,
and inference needs the full image alone. The files have the format of the base model and load like it.

This card was written from the run's checkpoint and says nothing about accuracy.

- Base model: {whose}
- Weights: {kind}, step {step} of {options.get("trainer.max_steps")}
- Data set: {_data_set(str(options["data.path"]), manifest.get("data"))}
- Licence: {_licence(licence)}
- Versions: trained with {versions}; exported with nemo_vopd {__version__}

Options of the run that matter most:

```
{chosen}
```
"""


def _front_matter(file: Path) -> dict[str, Any]:
    """What a README.md says at its top; nothing if there is none, or none that can be read."""
    try:
        return (metadata_load(str(file)) if file.is_file() else None) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}


def _name_of_itself(metadata: dict[str, Any]) -> str | None:
    """The name in the base model's front matter."""
    index = metadata.get("model-index")
    first = index[0] if isinstance(index, list) and index and isinstance(index[0], dict) else {}
    names = (metadata.get("model_name"), first.get("name"))
    return next((" ".join(name.split()) for name in names if isinstance(name, str) and name.strip()), None)


def _identifier(source: Path) -> str:
    """The name of the directory, or of its repository in the Hub's cache, in letters that the Hub takes."""
    repository = source.absolute().parent.parent.name  # models--ORGANISATION--NAME/snapshots/COMMIT
    is_cached = repository.startswith("models--")
    name = repository[len("models--") :].replace("--", "/") if is_cached else _last_parts(source)
    return re.sub(r"[^\w./-]+", "-", name)


def _last_parts(path: str | Path, generic: tuple[str, ...] = ()) -> str:
    """The last part of `path`, after the one before it where it is one of the `generic` names."""
    *_, parent, name = ("", *Path(os.path.abspath(path)).parts)
    return " ".join((f"{parent}/{name}" if name in generic else name).split())


def _licence(found: dict[str, Any]) -> str:
    if not found:
        return "unknown; it is that of the base model, whose directory does not tell it"
    return f"{', '.join(' '.join(str(value).split()) for value in found.values())}, as that of the base model"


def _options(options: dict[str, Any]) -> list[str]:
    """Options as they are typed."""
    frozen = [name for name, value in options.items() if name.startswith("model.freeze.") and value == "true"]
    rule = f"distill.teacher.{_OF_TEACHER.get(str(options.get('distill.teacher.kind')))}"
    return [f"{name}={options[name]}" for name in sorted({*_OPTIONS, rule, *frozen}) if name in options]


def _data_set(path: str, trained_on: str | None) -> str:
    """Name and facts of the data set, if it is where it was and the same as then."""
    name = _last_parts(path, ("train", "validation", "blend.yaml"))
    try:
        if fingerprint(path) != trained_on:
            return f"{name}, which has changed since"
        facts = [f"{sum(Records(path).sizes):,} records"]
    except (OptionError, OSError, ValueError, KeyError, TypeError):
        return f"{name}, of an unknown number of records: it was not at hand when this was written"
    return ", ".join([name, *facts, *_of_card(Path(path) if Path(path).is_dir() else Path(path).parent)])


def _of_card(folder: Path) -> list[str]:
    """What data_card.json tells about the preparation, if it is there and whole."""
    try:
        card = json.loads((folder / "data_card.json").read_text(encoding="utf-8"))
        sources = ", ".join(_last_parts(one["path"]) for one in card["sources"])
        dropped = sum(card["dropped"].values())
        counts = f"{card['kept']:,} kept, {dropped:,} dropped, {card['with_box']:,} with a box"
        facts = [f"prepared from {sources} ({counts})"]
        if (median := card["relative_box_area"]["median"]) is not None:
            facts.append(f"the median box covers {format_area(median)} of its image")
        if (median := card["image_megapixels"]["median"]) is not None:
            facts.append(f"the median image has {median:g} megapixels")
        return facts
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
