"""Hugging Face safetensors to Megatron shards and back, each rank its own slices.

A family file names, for every Megatron parameter, the Hugging Face tensors it is made of and how they are split
(`WeightRule`). Tensor names are canonical here: `visual.*`, `embed_tokens.*`, `layers.N.*`, `norm.*`, `lm_head.*`;
the prefixes `model.`, `model.language_model.` and `model.visual.` of older and newer files are taken off.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from nemo_vopd.config import FreezeConfig
from nemo_vopd.errors import OptionError

_FILE_BYTES = 4 * 2**30
"""Of weights that are written: what the writing rank holds in memory."""
Split = Literal["replicated", "rows", "columns", "gated", "qkv"]


@dataclass(frozen=True)
class WeightRule:
    """How one Megatron parameter is made of Hugging Face tensors under tensor parallelism."""

    names: tuple[str, ...]
    """Canonical Hugging Face names: one, or gate and up, or query, key and value."""
    split: Split
    """rows and columns divide dimension 0 and 1; gated stacks two row-split tensors; qkv interleaves by group."""
    num_rows: int | None = None
    """Rows of the whole tensor where the shards have more together (a vocabulary that does not divide)."""
    export: bool = True
    """False for a second copy of a tensor that another stage writes."""


def is_frozen(name: str, options: FreezeConfig) -> bool:
    """Whether `options` keep the tensor `name` (canonical) as it is."""
    if not name.startswith("visual."):
        return options.language
    return options.projector if "merger" in name else options.vision


def canonical(name: str) -> str:
    """The name of a tensor without the prefixes that differ between files of one architecture."""
    for prefix, replacement in (("model.language_model.", ""), ("model.visual.", "visual."), ("model.", "")):
        if name.startswith(prefix):
            return replacement + name[len(prefix) :]
    return name


class HFReader:
    """Slices of the tensors of a Hugging Face directory (one or several safetensors files)."""

    def __init__(self, path: str | Path) -> None:
        """Index the files of `path`; raises OptionError when there are none."""
        self.path = Path(path)
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise OptionError(
                "model.hf_path", path, "holds no *.safetensors file", "give a Hugging Face model directory"
            )
        self.original_name: dict[str, str] = {}
        self._file: dict[str, Path] = {}
        self._open: dict[Path, safe_open] = {}  # type: ignore[valid-type]
        for file in files:
            try:
                names = list(self._handle(file).keys())
            except SafetensorError as error:
                rule = f"holds {file.name}, which cannot be read ({error})"
                raise OptionError("model.hf_path", path, rule, "copy the model again") from None
            for name in names:
                self.original_name[canonical(name)] = name
                self._file[canonical(name)] = file

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
        return _DTYPES[self._handle(self._file[name]).get_slice(self.original_name[name]).get_dtype()]

    def read(self, name: str, *, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Tensor `name` (canonical), or its part [start, stop) along `dim` (0 or 1); only that part is read."""
        lazy = self._handle(self._file[name]).get_slice(self.original_name[name])
        if start == 0 and stop is None:
            return lazy[:]
        return lazy[start:stop] if dim == 0 else lazy[:, start:stop]


_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def _interleave(q: Tensor, k: Tensor, v: Tensor, num_groups: int) -> Tensor:
    """Megatron's linear_qkv: for each query group its queries, then its key, then its value."""
    parts = [x.view(num_groups, -1, *x.shape[1:]) for x in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _deinterleave(qkv: Tensor, num_groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    grouped = qkv.view(num_groups, -1, *qkv.shape[1:])
    q, k, v = grouped.split([grouped.size(1) - 2 * head_dim, head_dim, head_dim], dim=1)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def split_fused(matrix: Tensor, split: Split, num_groups: int, place: int, num_rows: int) -> Tensor:
    """Number `place` of the tensors that one whole matrix is made of; `num_rows` is the size of that tensor."""
    if split == "gated":
        return matrix.chunk(2)[place]
    if split == "qkv":
        head_dim = (num_rows if place else (matrix.size(0) - num_rows) // 2) // num_groups
        return _deinterleave(matrix, num_groups, head_dim)[place]
    return matrix


@torch.no_grad()
def load_hf(
    model: torch.nn.Module,
    rule_of: Callable[[str], WeightRule],
    path: str | Path,
    groups: ProcessGroupCollection,
) -> None:
    """Fill this rank's shard of `model` from the Hugging Face directory `path`, one parameter after the other.

    `rule_of` maps a parameter name of `model` to its rule. Raises OptionError that names missing, unexpected and
    misshaped tensors; every rank of the model must call it.
    """
    reader = HFReader(path)
    rules = {name: rule_of(name) for name, _ in model.named_parameters()}
    _check_names(reader, rules, groups)
    size, num_groups = groups.tp.size(), model.config.num_query_groups  # type: ignore[union-attr]
    total = sum(p.numel() for p in model.parameters())
    shown = total > _WORTH_A_PROGRESS_LINE and dist.get_rank() == 0
    with tqdm(total=total, unit="", unit_scale=True, desc=f"reading {path}", disable=not shown, mininterval=1) as bar:
        for name, parameter in model.named_parameters():
            rule = rules[name]
            _check_shapes(reader, rule, parameter, size)
            parts = [_local_part(reader, n, parameter, rule, groups) for n in rule.names]
            if rule.split == "qkv":
                value = _interleave(*parts, num_groups=num_groups // size)  # type: ignore[misc,operator]
            else:
                value = torch.cat(parts) if rule.split == "gated" else parts[0]
            parameter[: value.shape[0]].copy_(value)
            parameter[value.shape[0] :] = 0  # rows of no token
            bar.update(parameter.numel())


_WORTH_A_PROGRESS_LINE = 100_000_000
"""Parameters on a rank."""


def _local_part(reader: HFReader, name: str, parameter: Tensor, rule: WeightRule, groups: ProcessGroupCollection):
    """This rank's part of the Hugging Face tensor `name`, of which `parameter` is made."""
    if rule.split == "replicated":
        return reader.read(name)
    rank, size, shape = groups.tp.rank(), groups.tp.size(), reader.shape(name)
    dim = int(rule.split == "columns")
    width = parameter.shape[dim] if rule.num_rows else shape[dim] // size
    end = min((rank + 1) * width, shape[dim])
    return reader.read(name, dim=dim, start=min(rank * width, end), stop=end)


def _check_shapes(reader: HFReader, rule: WeightRule, parameter: Tensor, size: int) -> None:
    """Raise OptionError unless the tensors of `rule` make up the whole of which `parameter` is one of `size` parts."""
    shapes = [reader.shape(name) for name in rule.names]
    whole = list(parameter.shape)
    if rule.split == "columns":
        whole[1] *= size
    elif rule.split != "replicated":
        whole[0] = rule.num_rows or whole[0] * size
    if sum(shape[0] for shape in shapes) != whole[0] or any(list(shape[1:]) != whole[1:] for shape in shapes):
        found = ", ".join(f"{reader.original_name[n]} {s}" for n, s in zip(rule.names, shapes, strict=True))
        rule_text = f"holds {found} where config.json asks for {tuple(whole)} in all"
        raise OptionError("model.hf_path", reader.path, rule_text, _BELONG)


_BELONG = "check that config.json and the weights belong together"


def _check_names(reader: HFReader, rules: dict[str, WeightRule], groups: ProcessGroupCollection) -> None:
    """Raise OptionError, on every rank, when the files lack a tensor of the model or hold one that it does not know."""
    gathered: list = [None] * groups.pp.size()
    dist.all_gather_object(gathered, [name for rule in rules.values() for name in rule.names], group=groups.pp)
    needed = {name for names in gathered for name in names}
    present = set(reader.original_name)
    missing = sorted(needed - present)
    # a tied head is stored by some; older files hold rotary tables, which are computed
    unknown = sorted(n for n in present - needed if n != "lm_head.weight" and not n.endswith("inv_freq"))
    for names, what in ((missing, "lacks"), (unknown, "holds unknown")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise OptionError("model.hf_path", reader.path, f"{what} {', '.join(names[:3])}{more}", _BELONG)


def iterate_hf(
    model: torch.nn.Module,
    rule_of: Callable[[str], WeightRule],
    groups: ProcessGroupCollection,
    named_tensors: Iterator[tuple[str, Tensor]] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (canonical name, full CPU tensor) of this pipeline stage, gathered over tensor parallelism one by one.

    All ranks of the tensor group take part; every one of them gets the tensors.
    """
    size, config = groups.tp.size(), model.config
    for name, parameter in named_tensors or model.named_parameters():
        rule = rule_of(name)
        if not rule.export:
            continue
        shard = parameter.detach()
        shards = [shard]
        if size > 1 and rule.split != "replicated":
            shards = [torch.empty_like(shard) for _ in range(size)]
            dist.all_gather(shards, shard.contiguous(), group=groups.tp)
        if rule.split == "replicated":
            full = (shard,)
        elif rule.split in ("rows", "columns"):
            full = (torch.cat(shards, dim=int(rule.split == "columns"))[: rule.num_rows],)
        elif rule.split == "gated":
            gates, ups = zip(*(s.chunk(2) for s in shards), strict=True)
            full = (torch.cat(gates), torch.cat(ups))
        else:
            head_dim, local_groups = config.kv_channels, config.num_query_groups // size  # type: ignore[union-attr,operator]
            pieces = [_deinterleave(s, local_groups, head_dim) for s in shards]  # type: ignore[arg-type]
            full = tuple(torch.cat(x) for x in zip(*pieces, strict=True))
        for hf_name, tensor in zip(rule.names, full, strict=True):
            yield hf_name, tensor.cpu()


def save_hf(
    model: torch.nn.Module,
    rule_of: Callable[[str], WeightRule],
    groups: ProcessGroupCollection,
    source: str | Path,
    output: str | Path,
) -> None:
    """Write `model` as a Hugging Face directory; config, tokenizer and preprocessor are copied from `source`.

    Every rank calls it; one rank of each pipeline stage writes, and holds one file of 4 GiB in memory. The directory
    appears under its name only when it is complete.
    """
    source, output = Path(source), Path(output)
    original = HFReader(source).original_name
    partial = output.with_name(output.name + ".partial")
    writes = groups.tp.rank() == 0 and groups.dp_cp.rank() == 0
    if writes:
        partial.mkdir(parents=True, exist_ok=True)
    files, part, size = [], {}, 0
    for name, tensor in iterate_hf(model, rule_of, groups):
        if not writes:
            continue
        if part and size + tensor.nbytes > _FILE_BYTES:
            files.append(_write_part(part, partial, groups.pp.rank(), len(files)))
            part, size = {}, 0
        part[original.get(name, name)] = tensor.contiguous().clone()  # in a file of its own, not a view of its shard
        size += tensor.nbytes
    if part:
        files.append(_write_part(part, partial, groups.pp.rank(), len(files)))
    entries: list = [None] * groups.pp.size()
    dist.all_gather_object(entries, files, group=groups.pp)
    dist.barrier()
    if dist.get_rank() == 0:
        _finish_directory([file for stage in entries for file in stage], source, partial)
        if output.exists():
            shutil.rmtree(output)
        os.replace(partial, output)
    dist.barrier()


def _write_part(tensors: dict[str, Tensor], folder: Path, stage: int, number: int) -> tuple[str, list[str], int]:
    """(name of the file, names in it, bytes)."""
    file = f"model-{stage:03d}-{number:05d}.safetensors"
    save_file(tensors, str(folder / file), metadata={"format": "pt"})
    return file, list(tensors), sum(tensor.nbytes for tensor in tensors.values())


def _finish_directory(files: list[tuple[str, list[str], int]], source: Path, folder: Path) -> None:
    """One file gets the usual name, several an index; what is not weights comes from `source`."""
    if len(files) == 1:
        os.replace(folder / files[0][0], folder / "model.safetensors")
    else:
        weight_map = {name: file for file, names, _ in files for name in names}
        index = {"metadata": {"total_size": sum(size for _, _, size in files)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for extra in source.iterdir():
        if extra.is_file() and extra.suffix in (".json", ".txt", ".jinja", ".model") and "index" not in extra.name:
            shutil.copy2(extra, folder / extra.name)
