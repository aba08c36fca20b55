"""Hugging Face safetensors to Megatron shards: each rank reads its own slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForImageTextToText
from transformers.initialization import no_init_weights

from nemo_vopd.errors import OptionError
from nemo_vopd.hf_directory import DTYPES, one_line, refusal, weight_files
from nemo_vopd.mcore import parallel
from nemo_vopd.mcore.stage import Stage, WeightRule
from nemo_vopd.vlm.weights.names import canonical, interleave
from nemo_vopd.watchdog import beat

_WORTH_A_PROGRESS_LINE = 100_000_000
"""Number of parameters on a rank from which reading shows its progress."""
_BELONG = "check that config.json and the weights belong together"


class HFReader:
    """Slices of the tensors of a Hugging Face directory (one or several safetensors files)."""

    def __init__(self, path: str | Path) -> None:
        """List the tensors of `path`; raises OptionError when there are none, or one is there twice."""
        self.path = Path(path)
        self.original_name: dict[str, str] = {}
        self.has_spare_head = False  # a head is stored although config.json ties it to the embedding
        self._file: dict[str, Path] = {}
        self._open: dict[Path, safe_open] = {}  # type: ignore[valid-type]
        for file in weight_files(path):
            try:
                names = list(self._handle(file).keys())
            except (SafetensorError, OSError) as error:
                what = f"holds {file.name}, which cannot be read ({one_line(error)})"
                raise refusal(path, what, "copy the model again") from None
            for name in names:
                self._add(name, file)

    def _add(self, name: str, file: Path) -> None:
        """Enter the tensor `name` of `file`. Raises OptionError for one that is there already, or is quantized."""
        key, dtype = canonical(name), self._handle(file).get_slice(name).get_dtype()
        if key in self._file:
            first = f"{self.original_name[key]} in {self._file[key].name}"
            rule = f"holds one tensor twice, {first} and {name} in {file.name}"
            raise OptionError("model.hf_path", self.path, rule, "remove the file that does not belong to the model")
        if dtype not in DTYPES:
            rule = f"holds {name} as {dtype}, and weights must be {', '.join(DTYPES)}"
            raise OptionError("model.hf_path", self.path, rule, "give the model that is not quantized")
        self.original_name[key], self._file[key] = name, file

    def _handle(self, file: Path):
        if file not in self._open:
            self._open[file] = safe_open(str(file), framework="pt").__enter__()
        return self._open[file]

    def files(self) -> dict[str, list[str]]:
        """Canonical names of the tensors in each file."""
        result: dict[str, list[str]] = {}
        for name, file in self._file.items():
            result.setdefault(file.name, []).append(name)
        return result

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor `name` (canonical), which must be there."""
        return tuple(self._handle(self._file[name]).get_slice(self.original_name[name]).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Number format of tensor `name` (canonical), which must be there."""
        return DTYPES[self._handle(self._file[name]).get_slice(self.original_name[name]).get_dtype()]

    def read(self, name: str, *, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Tensor `name` (canonical), or its part [start, stop) along `dim` (0 or 1); only that part is read."""
        beat()
        lazy = self._handle(self._file[name]).get_slice(self.original_name[name])
        if start == 0 and stop is None:
            return lazy[:]
        return lazy[start:stop] if dim == 0 else lazy[:, start:stop]


def open_weights(path: str | Path, hf: Any) -> HFReader:
    """The weights of the directory `path`, which are those of transformers' model of its configuration `hf`.

    No weight is read, and no memory allocated. Raises OptionError that names missing, unexpected and misshaped tensors.
    """
    reader, shapes = HFReader(path), _shapes(path, hf)
    names = reader.original_name
    if "lm_head.weight" in names and "lm_head.weight" not in shapes:
        reader.has_spare_head, shapes["lm_head.weight"] = True, shapes["embed_tokens.weight"]
    missing = sorted(shapes.keys() - names.keys())
    # older files hold rotary tables, which are computed
    unknown = sorted(n or "a tensor without a name" for n in names.keys() - shapes.keys() if not n.endswith("inv_freq"))
    for found, what in ((missing, "lacks"), (unknown, "holds unknown")):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise refusal(path, f"{what} {', '.join(found[:3])}{more}", _BELONG)
    for name, shape in shapes.items():
        if reader.shape(name) != shape:
            raise refusal(path, f"holds {names[name]} {reader.shape(name)} where config.json asks for {shape}", _BELONG)
    return reader


def _shapes(path: str | Path, hf: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of transformers' model by canonical name, without a tied head."""
    try:
        with torch.device("meta"), no_init_weights():
            model = AutoModelForImageTextToText.from_config(hf, trust_remote_code=False)
            model.tie_weights()
    except Exception as error:  # a field that nobody thought of can end in almost anything
        raise refusal(path, f"config.json makes no model in transformers ({one_line(error)})", "correct it") from None
    return {canonical(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}


@torch.no_grad()
def load_hf(stage: Stage, reader: HFReader, groups: ProcessGroupCollection) -> None:
    """Fill this rank's shards of `stage` from the weights that `open_weights` gave, one parameter after the other.

    Every rank of the model must call it. Raises OptionError that names tensors with a number that is not finite, and a
    head that differs from the embedding although config.json ties them.
    """
    faults: list[str] = []
    size, num_groups = groups.tp.size(), stage.config.num_query_groups
    total = sum(p.numel() for p in stage.parameters())
    shown = total > _WORTH_A_PROGRESS_LINE and dist.get_rank() == 0
    title = f"reading {reader.path}"
    with tqdm(total=total, unit="", unit_scale=True, desc=title, disable=not shown, mininterval=1) as bar:
        for name, parameter in stage.named_parameters():
            rule = stage.weight_rule(name)
            parts = [_local_part(reader, n, parameter, rule, groups) for n in rule.names]
            for n, part in zip(rule.names, parts, strict=True):
                if not part.isfinite().all():
                    faults.append(f"{reader.original_name[n]}, which is not finite (NaN or infinite)")
                if reader.has_spare_head and n == "embed_tokens.weight":
                    head = _local_part(reader, "lm_head.weight", parameter, rule, groups)
                    if not torch.equal(head, part):
                        faults.append(f"{reader.original_name['lm_head.weight']}, which differs from the embedding")
            if rule.split == "qkv":
                value = interleave(*parts, num_groups=num_groups // size)  # type: ignore[misc,operator]
            else:
                value = torch.cat(parts) if rule.split == "gated" else parts[0]
            parameter[: value.shape[0]].copy_(value)
            parameter[value.shape[0] :] = 0  # vocabulary padding
            bar.update(parameter.numel())
    _raise_on_all(reader, faults, groups)


def _raise_on_all(reader: HFReader, faults: list[str], groups: ProcessGroupCollection) -> None:
    """Raise OptionError on every rank of the model when one has found `faults`."""
    found = parallel.gather_all(parallel.gather_all(faults, groups.tp), groups.pp)
    if found:
        more = f", and {len(set(found)) - 1} more" if len(set(found)) > 1 else ""
        remedy = "copy the model again, or export it from an earlier checkpoint"
        if found[0].endswith("the embedding"):
            remedy = "set tie_word_embeddings=false in config.json to use that head, or take it out of the file"
        raise OptionError("model.hf_path", reader.path, f"holds {found[0]}{more}", remedy)


def _local_part(reader: HFReader, name: str, parameter: Tensor, rule: WeightRule, groups: ProcessGroupCollection):
    """This rank's part of the Hugging Face tensor `name`, which is all or a part of `parameter`."""
    if rule.split == "replicated":
        return reader.read(name)
    rank, size, shape = groups.tp.rank(), groups.tp.size(), reader.shape(name)
    dim = int(rule.split == "columns")
    width = parameter.shape[dim] if rule.num_rows else shape[dim] // size
    end = min((rank + 1) * width, shape[dim])
    return reader.read(name, dim=dim, start=min(rank * width, end), stop=end)
