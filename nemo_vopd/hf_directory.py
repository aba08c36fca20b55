"""The directory of a Hugging Face model: which of its files count, and what they say, as transformers reads them.

Nothing is fetched, and no code of the directory is run.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

from transformers import AutoConfig

from nemo_vopd.errors import OptionError

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
        content = json.loads((Path(path) / name).read_text())
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
    if not Path(path).is_dir():
        raise refusal(path, "is not a directory", remedy)
    if not (Path(path) / "config.json").is_file():
        raise refusal(path, "has no config.json", remedy)
    content = read_json(path, "config.json")
    if not isinstance(content.get("model_type"), str):
        raise refusal(path, "config.json names no model_type", remedy)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a field of another type or length can end in almost anything
        raise refusal(path, f"config.json cannot be used ({one_line(error)})", "correct it") from None


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files that hold the weights, chosen as transformers does; without an index, all there are.

    model.safetensors comes before an index, and with an index no other file counts. Raises OptionError when there is
    no file, or the index names one that is not in the directory.
    """
    folder = Path(path)
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
    if files := sorted(folder.glob("*.safetensors")):
        return files
    raise refusal(path, "holds no *.safetensors file", "give a Hugging Face model directory with safetensors weights")
