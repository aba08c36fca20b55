"""Megatron shards to Hugging Face tensors: gathered one by one, written as a directory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors.torch import save_file
from torch import Tensor

from nemo_vopd.mcore.stage import Stage
from nemo_vopd.vlm.weights.names import deinterleave
from nemo_vopd.vlm.weights.reading import HFReader

_FILE_BYTES = 4 * 2**30
"""Size at which a new file is begun: the writing rank holds one in memory."""


def iterate_hf(
    stage: Stage, groups: ProcessGroupCollection, named: Iterable[tuple[str, Tensor]] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (canonical name, full CPU tensor) of this pipeline stage, gathered over tensor parallelism one by one.

    `named` are other tensors with the names and shapes of parameters, such as gradients; the default is the parameters.

    All ranks of the tensor group take part; every one of them gets the tensors.
    """
    size, config = groups.tp.size(), stage.config
    for name, parameter in named or stage.named_parameters():
        rule = stage.weight_rule(name)
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
            pieces = [deinterleave(s, local_groups, head_dim) for s in shards]  # type: ignore[arg-type]
            full = tuple(torch.cat(x) for x in zip(*pieces, strict=True))
        for hf_name, tensor in zip(rule.names, full, strict=True):
            yield hf_name, tensor.cpu()


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write the file `path`, with the mode that the umask gives: safetensors itself shuts out all but the owner."""
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, str(path), metadata={"format": "pt"})
    path.chmod(mode)


def save_hf(stage: Stage, groups: ProcessGroupCollection, source: str | Path, output: str | Path) -> None:
    """Write the whole model as a Hugging Face directory; all files but weights are copied from `source`.

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
    for name, tensor in iterate_hf(stage, groups):
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
        _finish_directory([file for part in entries for file in part], source, partial)
        if output.exists():
            shutil.rmtree(output)
        os.replace(partial, output)
    dist.barrier()


def _write_part(tensors: dict[str, Tensor], folder: Path, stage: int, number: int) -> tuple[str, list[str], int]:
    """(name of the file, names in it, bytes)."""
    file = f"model-{stage:03d}-{number:05d}.safetensors"
    save_tensors(tensors, folder / file)
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
            shutil.copyfile(extra, folder / extra.name)
