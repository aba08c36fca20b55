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
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_vopd.errors import OptionError

Split = Literal["replicated", "rows", "columns", "gated", "qkv"]


@dataclass(frozen=True)
class WeightRule:
    """How one Megatron parameter is made of Hugging Face tensors under tensor parallelism."""

    names: tuple[str, ...]
    """Canonical Hugging Face names: one, or gate and up, or query, key and value."""
    split: Split
    """rows and columns divide dimension 0 and 1; gated stacks two row-split tensors; qkv interleaves by group."""
    export: bool = True
    """False for a second copy of a tensor that another stage writes."""


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
            for name in self._handle(file).keys():
                self.original_name[canonical(name)] = name
                self._file[canonical(name)] = file

    def _handle(self, file: Path):
        if file not in self._open:
            self._open[file] = safe_open(str(file), framework="pt").__enter__()
        return self._open[file]

    def read(self, name: str, *, dim: int | None = None, rank: int = 0, size: int = 1) -> Tensor:
        """Tensor `name` (canonical), or its part `rank` of `size` along `dim`."""
        if name not in self._file:
            raise OptionError(
                "model.hf_path",
                self.path,
                f"has no tensor {name}",
                "check that config.json and the weights belong together",
            )
        lazy = self._handle(self._file[name]).get_slice(self.original_name[name])
        if dim is None or size == 1:
            return lazy[:]
        width = lazy.get_shape()[dim] // size
        part = slice(rank * width, (rank + 1) * width)
        return lazy[part] if dim == 0 else lazy[:, part]


def _interleave(q: Tensor, k: Tensor, v: Tensor, num_groups: int) -> Tensor:
    """Megatron's linear_qkv: for each query group its queries, then its key, then its value."""
    parts = [x.view(num_groups, -1, *x.shape[1:]) for x in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _deinterleave(qkv: Tensor, num_groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    grouped = qkv.view(num_groups, -1, *qkv.shape[1:])
    q, k, v = grouped.split([grouped.size(1) - 2 * head_dim, head_dim, head_dim], dim=1)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


@torch.no_grad()
def load_hf(
    model: torch.nn.Module,
    rule_of: Callable[[str], WeightRule],
    path: str | Path,
    groups: ProcessGroupCollection,
) -> None:
    """Fill this rank's shard of `model` from the Hugging Face directory `path`.

    `rule_of` maps a parameter name of `model` to its rule. Missing or misshaped tensors raise OptionError by name.
    """
    reader = HFReader(path)
    rank, size = groups.tp.rank(), groups.tp.size()
    num_groups = model.config.num_query_groups  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        rule = rule_of(name)
        if rule.split == "replicated":
            value = reader.read(rule.names[0])
        elif rule.split in ("rows", "columns"):
            value = reader.read(rule.names[0], dim=int(rule.split == "columns"), rank=rank, size=size)
        else:
            parts = [reader.read(n, dim=0, rank=rank, size=size) for n in rule.names]
            value = torch.cat(parts) if rule.split == "gated" else _interleave(*parts, num_groups=num_groups // size)  # type: ignore[misc,operator]
        if value.shape != parameter.shape:
            raise OptionError(
                "model.hf_path",
                path,
                f"tensor {rule.names[0]} gives shape {tuple(value.shape)} where {tuple(parameter.shape)} is needed",
                "check that config.json and the weights belong together",
            )
        parameter.copy_(value)


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
            full = (torch.cat(shards, dim=int(rule.split == "columns")),)
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

    Every rank calls it; each pipeline stage writes one safetensors file. The directory appears under its name only
    when it is complete.
    """
    source, output = Path(source), Path(output)
    original = HFReader(source).original_name
    partial = output.with_name(output.name + ".partial")
    stage, num_stages = groups.pp.rank(), groups.pp.size()
    writes = groups.tp.rank() == 0 and groups.dp_cp.rank() == 0
    if writes:
        partial.mkdir(parents=True, exist_ok=True)
    tensors = {original.get(n, n): t.contiguous().clone() for n, t in iterate_hf(model, rule_of, groups)}
    file = "model.safetensors" if num_stages == 1 else f"model-{stage + 1:05d}-of-{num_stages:05d}.safetensors"
    if writes:
        save_file(tensors, str(partial / file), metadata={"format": "pt"})
    entry = ({name: file for name in tensors}, sum(t.numel() * t.element_size() for t in tensors.values()))
    entries: list = [None] * num_stages
    dist.all_gather_object(entries, entry, group=groups.pp)
    dist.barrier()
    if dist.get_rank() == 0:
        if num_stages > 1:
            weight_map = {name: f for names, _ in entries for name, f in names.items()}
            index = {"metadata": {"total_size": sum(n for _, n in entries)}, "weight_map": weight_map}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        for extra in source.iterdir():
            if extra.is_file() and extra.suffix in (".json", ".txt", ".jinja", ".model") and "index" not in extra.name:
                shutil.copy2(extra, partial / extra.name)
        if output.exists():
            shutil.rmtree(output)
        os.replace(partial, output)
    dist.barrier()
