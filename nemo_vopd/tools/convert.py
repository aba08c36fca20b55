"""recipes/convert_checkpoint.py: between a run's checkpoint and a Hugging Face directory.

Tensors are converted one by one: no process ever holds the whole model.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from torch import Tensor
from tqdm import tqdm

from nemo_vopd.config import Config, FreezeConfig
from nemo_vopd.errors import OptionError
from nemo_vopd.mcore import parallel, sharded_state
from nemo_vopd.mcore.stage import WeightRule
from nemo_vopd.tools.model_card import model_card
from nemo_vopd.training.manifest import check_digests, own_digests, read_manifest, write_manifest
from nemo_vopd.vlm.build import build_vlm, check_model, hf_config, shape_of
from nemo_vopd.vlm.language import LAYER_RULES
from nemo_vopd.vlm.weights.export import save_tensors
from nemo_vopd.vlm.weights.names import is_frozen, split_fused
from nemo_vopd.vlm.weights.reading import HFReader

_MARK = ".export.json"


def export_checkpoint(config: Config, checkpoint: Path, kind: str, output: Path) -> None:
    """Write the `kind` of `checkpoint` as the Hugging Face directory `output`.

    Names, dtypes and all other files come from the directory that training started from; `model.hf_path` says where
    it is now if it has moved. The export of a run gets a README.md of its own.
    """
    manifest = read_manifest(checkpoint)
    source = Path(config.model.hf_path or manifest["config"]["model"]["hf_path"])
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, hf_path=str(source)))
    hf = hf_config(config)
    shape = dataclasses.asdict(shape_of(config))
    if shape != manifest["model"]:
        rule = "is another model than the checkpoint's"
        raise OptionError("model.hf_path", source, rule, "give the directory that training started from")
    if parallel.world_size() > 1:
        parallel.initialize(config.parallel, seed=config.seed)
    check_digests(checkpoint, manifest)
    is_of_run = "versions" in manifest  # else import_model wrote it
    card = model_card(manifest, kind, source) if is_of_run and parallel.is_rank_zero() else None
    freeze = FreezeConfig(**manifest["config"]["model"]["freeze"])
    try:
        export(checkpoint.resolve(), kind, source, output, hf, freeze, card)
    except (pickle.UnpicklingError, OSError) as error:
        reason = str(error).splitlines()[-1]
        raise OptionError("checkpoint", checkpoint, f"cannot be read ({reason})", "give another one") from None
    if parallel.is_rank_zero():
        print(f"wrote the {kind} after step {manifest['step']} to {output}", flush=True)


def import_model(config: Config, output: Path) -> None:
    """Write the model of `model.hf_path` as a checkpoint of weights, student and teacher alike, to `output`."""
    check_model(config)
    groups = parallel.initialize(config.parallel, seed=config.seed)
    if groups.dp_cp.size() > 1:
        size = config.parallel.tensor * config.parallel.pipeline
        raise OptionError("parallel.tensor", config.parallel.tensor, "leaves ranks over", f"start {size} processes")
    stage = build_vlm(config, groups)
    partial = output.with_name(f"{output.name}.partial")
    if parallel.is_rank_zero():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    # student and teacher of the checkpoint are alike, in float32
    shards = {name: (p.detach().float().cpu().reshape(-1), 0) for name, p in stage.named_parameters()}
    sharded_state.save_request({"student": shards, "teacher": shards}, stage, groups, partial).execute_sync()
    digests = parallel.gather_all(own_digests(partial), dist.group.WORLD)  # type: ignore[arg-type]
    if parallel.is_rank_zero():
        shape, content = dataclasses.asdict(shape_of(config)), dataclasses.asdict(config)
        write_manifest(partial, {"step": 0, "model": shape, "config": content}, dict(digests))
        partial.rename(output)
        print(f"wrote the weights of {config.model.hf_path} to {output}", flush=True)
    dist.barrier()


class CheckpointReader:
    """Whole float32 matrices of a checkpoint, one at a time; no process group is needed."""

    def __init__(self, path: Path) -> None:
        """Open `path`, a complete checkpoint. Raises pickle.UnpicklingError when its metadata is not metadata."""
        sharded_state.check_metadata(path)
        self._reader = CachedMetadataFileSystemReader(str(path))
        self._tensors: dict[str, Any] = dict(self._reader.read_metadata().state_dict_metadata)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def holds(self, kind: str) -> bool:
        """Whether there is any tensor of `kind` (student, teacher)."""
        return any(key.startswith(f"{kind}.") for key in self._tensors)

    def read(self, key: str) -> Tensor:
        """The matrix `key` = `<kind>.<canonical name>`, [first dimension, all others] float32."""
        target = torch.empty(self._tensors[key].size)
        dcp.load({key: target}, storage_reader=self._reader, no_dist=True)
        return target


def export(
    checkpoint: Path, kind: str, source: Path, output: Path, hf: Any, freeze: FreezeConfig, card: str | None
) -> None:
    """Write the `kind` (student or teacher) of `checkpoint` as `output`, in the format and the files of `source`.

    `card` is its README.md, instead of that of `source`.

    Every tensor keeps the name, shape and dtype it has in `source`, the directory that training started from and `hf`
    describes; tensors that were frozen (`freeze`) are copied from it. Ranks of torch.distributed, if there are several,
    share the files out. An interrupted export goes on where it stopped. Raises OptionError when a tensor is missing.
    """
    tensors, original = CheckpointReader(checkpoint), HFReader(source)
    if not tensors.holds(kind):
        remedy = "export weights=student"
        raise OptionError("weights", kind, f"is not in {checkpoint}: the run's teacher had no weights", remedy)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    partial = output.with_name(f"{output.name}.partial")
    if rank == 0:
        _begin(partial, {"checkpoint": str(checkpoint.resolve()), "weights": kind})
    _barrier()
    read_fused = functools.lru_cache(maxsize=2)(tensors.read)  # query, key and value come out of one matrix

    def convert(name: str) -> Tensor:
        if is_frozen(name, freeze):
            return original.read(name)
        # some directories store a tied head although it is the embedding
        rule, place = _rule("embed_tokens.weight" if hf.tie_word_embeddings and name == "lm_head.weight" else name)
        key, shape = f"{kind}.{rule.names[0]}", original.shape(name)
        if key not in tensors:
            raise OptionError("checkpoint", checkpoint, f"has no tensor {key}", "give one of a run of this model")
        if len(rule.names) == 1:
            return tensors.read(key).reshape(shape).to(original.dtype(name))
        part = split_fused(read_fused(key), rule.split, hf.text_config.num_key_value_heads, place, shape[0])
        return part.reshape(shape).to(original.dtype(name))

    files = original.files()
    mine = [file for i, file in enumerate(sorted(files)) if i % world == rank and not (partial / file).exists()]
    for file in tqdm(mine, desc=f"writing {output}", unit="file", disable=rank > 0 or len(files) == 1):
        content = {original.original_name[name]: convert(name).contiguous() for name in files[file]}
        save_tensors(content, partial / f".{file}")
        os.replace(partial / f".{file}", partial / file)
    _barrier()
    if rank == 0:
        for extra in source.iterdir():
            if extra.is_file() and extra.suffix != ".safetensors" and not extra.name.startswith("."):
                shutil.copyfile(extra, partial / extra.name)  # not its mode, which may be for its owner alone
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8", errors="replace")
        (partial / _MARK).unlink()
        os.rename(partial, output)
    _barrier()


def _begin(partial: Path, mark: dict[str, str]) -> None:
    """Make `partial`, or keep it where an interrupted export of the same thing left it."""
    file = partial / _MARK
    if file.is_file() and json.loads(file.read_text()) == mark:
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    file.write_text(json.dumps(mark))


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _rule(name: str) -> tuple[WeightRule, int]:
    """The rule of the parameter that the tensor `name` (canonical) belongs to, and its place in it."""
    if not name.startswith("layers."):
        return WeightRule((name,), "replicated"), 0
    _, layer, suffix = name.split(".", 2)
    hf_names, split = _LAYER_TENSORS[suffix]
    return WeightRule(tuple(f"layers.{layer}.{n}" for n in hf_names), split), hf_names.index(suffix)


_LAYER_TENSORS = {hf_name: rule for rule in LAYER_RULES.values() for hf_name in rule[0]}
