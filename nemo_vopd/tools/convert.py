"""Export and import as runs: which model, which files, and the manifest."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from pathlib import Path

import torch.distributed as dist

from nemo_vopd.config import Config, FreezeConfig
from nemo_vopd.errors import OptionError
from nemo_vopd.mcore import parallel
from nemo_vopd.training.checkpoint_folder import read_manifest, write_manifest
from nemo_vopd.vlm.build import build_vlm, check_model, hf_config, shape_of
from nemo_vopd.vlm.weights.export import export, write_weights


def export_checkpoint(config: Config, checkpoint: Path, kind: str, output: Path) -> None:
    """Write the `kind` of `checkpoint` as the Hugging Face directory `output`.

    Names, dtypes and all other files come from the directory that training started from; `model.hf_path` says where
    it is now if it has moved.
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
    try:
        export(checkpoint.resolve(), kind, source, output, hf, FreezeConfig(**manifest["config"]["model"]["freeze"]))
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
    write_weights(stage, groups, partial)
    if parallel.is_rank_zero():
        shape, content = dataclasses.asdict(shape_of(config)), dataclasses.asdict(config)
        write_manifest(partial, {"step": 0, "model": shape, "config": content})
        partial.rename(output)
        print(f"wrote the weights of {config.model.hf_path} to {output}", flush=True)
    dist.barrier()
