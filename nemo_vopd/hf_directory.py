"""The directory of a Hugging Face model: which of its files count, and what they say, as transformers reads them.

Nothing is fetched, and no code of the directory is run.
"""

from __future__ import annotations

import contextlib
import json
import re
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


def refusal(path: str | Path, what: str, remedy: str) -> OptionError:
    """The error for a directory `path` that cannot be served: `what` begins with the file and names the rule."""
    return OptionError("model.hf_path", path, " ".join(what.split()), remedy)


def one_line(error: BaseException) -> str:
    """What `error` says, in one short line: libraries explain over many lines, the reason last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = lines[-1] if lines[0].endswith(":") or "validation error" in lines[0].lower() else lines[0]
    return reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]} ..."


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
    if not (Path(path) / "config.json").is_file():
        raise refusal(path, *_what_it_is(Path(path), remedy))
    content = read_json(path, "config.json")
    if not isinstance(content.get("model_type"), str):
        raise refusal(path, "config.json names no model_type", remedy)
    try:
        # no attention of the file's choosing: with the package `kernels`, transformers would fetch one from the Hub
        config = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, attn_implementation="sdpa"
        )
    except Exception as error:  # a field of another type or length can end in almost anything
        raise refusal(path, f"config.json cannot be used ({one_line(error)})", "correct it") from None
    if config.dtype is None:
        config.dtype = _stored_dtype(path)
    return config


def _what_it_is(path: Path, remedy: str) -> tuple[str, str]:
    """What `path`, which holds no config.json, is instead, and what to do about it."""
    export = "python recipes/convert_checkpoint.py export checkpoint={} output=DIRECTORY makes a model directory of it"
    if (path / ".nv-meta").is_dir():
        return "is a data set", remedy
    if (path / "manifest.json").is_file():
        return "is a checkpoint of a run", export.format(path)
    if (path / "checkpoints").is_dir() or (path / "status.json").is_file():
        return "is the folder of a run", export.format(path / "checkpoints" / "last")
    if path.is_dir():
        return "has no config.json", remedy
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists():
        return "is no directory, and nothing is downloaded", f"hf download {path} --local-dir DIRECTORY, and give that"
    return "does not exist" if not path.exists() else "is not a directory", remedy


def _stored_dtype(path: str | Path) -> torch.dtype | None:
    """Number format of the first weight, which counts where config.json names none; None without readable weights."""
    with (
        contextlib.suppress(OptionError, SafetensorError, StopIteration),
        safe_open(weight_files(path)[0], "pt") as file,
    ):
        return DTYPES.get(file.get_slice(next(iter(file.keys()))).get_dtype())
    return None


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files that hold the weights, chosen as transformers does; without an index, all there are.

    model.safetensors comes before an index, and with an index no other file counts. Raises OptionError when there is
    no file, when the index names one that is not in the directory, and where transformers would read another format.
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
            if not (folder / name).is_file():
                raise refusal(path, f"{index} names {name}, which is not there", _COPY)
        return [folder / name for name in sorted(files)]
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if (folder / name).is_file():
            raise refusal(path, f"holds its weights in {name}, which is not read", "save the model as safetensors")
    if files := sorted(folder.glob("*.safetensors")):
        return files
    raise refusal(path, "holds no *.safetensors file", "give a Hugging Face model directory with safetensors weights")
