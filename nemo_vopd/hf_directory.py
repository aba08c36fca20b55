"""The directory of a Hugging Face model: which of its files count, and what they say, as transformers reads them.

Nothing is fetched, and no code of the directory is run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import reprlib
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from nemo_vopd.errors import OptionError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Number formats of weights that are read, by their names in safetensors files."""
_COPY = "copy the model again"
_MAX_REASON = 200
_MAX_REFUSAL = 500
_MAX_LAYERS = 1000
"""Layers of the language model or the tower; transformers lists them all before anybody can look at their number."""


def refusal(path: str | Path, what: str, remedy: str) -> OptionError:
    """The error for a directory `path` that cannot be served: `what` begins with the file and names the rule."""
    return OptionError("model.hf_path", path, _shortened(" ".join(what.split()), _MAX_REFUSAL), remedy)


def one_line(error: BaseException) -> str:
    """What `error` says, in one short line: libraries explain over many lines, the reason last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = lines[-1] if lines[0].endswith(":") or "validation error" in lines[0].lower() else lines[0]
    return _shortened(reason, _MAX_REASON)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]} ..."


def read_json(path: str | Path, name: str) -> dict[str, Any]:
    """The JSON object in the file `name` of the directory `path`. Raises OptionError when it holds none."""
    try:
        content = json.loads((Path(path) / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise refusal(path, f"{name} cannot be read as JSON ({one_line(error)})", _COPY) from None
    if not isinstance(content, dict):
        raise refusal(path, f"{name} holds no JSON object", _COPY)
    return content


def read_config(path: str | Path) -> Any:
    """The configuration of the model in `path`, as transformers fills in and converts what config.json says.

    Raises OptionError when there is none, or transformers cannot make one of it.
    """
    remedy = "give the directory of a Hugging Face vision-language model"
    if not os.path.isfile(Path(path) / "config.json"):  # unlike Path.is_file, this takes a name of any length
        raise refusal(path, *_what_it_is(Path(path), remedy))
    content = read_json(path, "config.json")
    if not isinstance(content.get("model_type"), str):
        raise refusal(path, "config.json names no model_type", remedy)
    for part in (content, content.get("text_config"), content.get("vision_config")):
        for field in ("num_hidden_layers", "depth"):
            number = part.get(field) if isinstance(part, dict) else None
            if isinstance(number, int) and number > _MAX_LAYERS:
                what = f"config.json: {field}={reprlib.repr(number)} must be {_MAX_LAYERS} or less"
                raise refusal(path, what, "correct config.json, or copy the model again")
    try:
        # no attention of the file's choosing: with the package `kernels`, transformers would fetch one from the Hub
        config = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, attn_implementation="sdpa"
        )
    except Exception as error:  # a field of another type or length can end in almost anything
        raise refusal(path, f"config.json cannot be used ({one_line(error)})", "correct it") from None
    config._attn_implementation = "sdpa"  # a field of this name in the file goes before the argument
    if config.dtype is None:
        config.dtype = _stored_dtype(path)
    return config


def _what_it_is(path: Path, remedy: str) -> tuple[str, str]:
    """What `path`, which holds no config.json, is instead, and what to do about it."""
    if not os.path.isdir(path):
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not os.path.exists(path.parent):
            return (
                "is no directory, and nothing is downloaded",
                f"hf download {path} --local-dir DIRECTORY, and give that",
            )
        return "is not a directory" if os.path.exists(path) else "does not exist", remedy
    export = "python recipes/convert_checkpoint.py export checkpoint={} output=DIRECTORY makes a model directory of it"
    if (path / ".nv-meta").is_dir():
        return "is a data set", remedy
    if (path / "manifest.json").is_file():
        return "is a checkpoint of a run", export.format(path)
    if (path / "checkpoints").is_dir() or (path / "status.json").is_file():
        return "is the folder of a run", export.format(path / "checkpoints" / "last")
    return "has no config.json", remedy


def _stored_dtype(path: str | Path) -> torch.dtype | None:
    """Number format of the first weight, which counts where config.json names none; None without readable weights."""
    with (
        contextlib.suppress(OptionError, OSError, SafetensorError, StopIteration),
        safe_open(weight_files(path)[0], "pt") as file,
    ):
        return DTYPES.get(file.get_slice(next(iter(file.keys()))).get_dtype())
    return None


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files that hold the weights, chosen as transformers does; without an index, all there are.

    model.safetensors comes before an index, and with an index no other file counts. Raises OptionError when there is
    no file, when one of them is a folder or a link that leads nowhere, when the index names one that is not in the
    directory, and where transformers would read another format.
    """
    folder = Path(path)
    if shards := sorted(folder.glob("shard-*-model-*.safetensors")):
        what = f"holds a checkpoint of another format ({shards[0].name}), which transformers reads before other files"
        raise refusal(path, what, "take it out, or save the model with save_pretrained")
    single, index = folder / "model.safetensors", "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if (folder / index).is_file():
        weight_map = read_json(path, index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise refusal(path, f"{index} has no weight_map", _COPY)
        files = {name if isinstance(name, str) else repr(name) for name in weight_map.values()}
        for name in sorted(files):
            if PurePath(name).name != name:
                raise refusal(path, f"{index} names {name}, which is not in the directory itself", _COPY)
            if not os.path.isfile(folder / name):  # unlike Path.is_file, this takes a name of any length
                raise refusal(path, f"{index} names {_shortened(name, _MAX_REASON)}, which is not there", _COPY)
        return [folder / name for name in sorted(files)]
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if (folder / name).is_file():
            raise refusal(path, f"holds its weights in {name}, which is not read", "save the model as safetensors")
    if files := sorted(folder.glob("*.safetensors")):
        for file in files:
            if not file.is_file():
                what = f"holds {file.name}, which is a folder or a link that leads nowhere"
                raise refusal(path, what, "copy the model again, or take it out")
        return files
    raise refusal(path, "holds no *.safetensors file", "give a Hugging Face model directory with safetensors weights")
