"""Hugging Face safetensors to Megatron shards: each rank reads its own slices."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from nemo_vopd.alive import beat
from nemo_vopd.errors import OptionError
from nemo_vopd.hf_directory import DTYPES, weight_files
from nemo_vopd.mcore import parallel
from nemo_vopd.mcore.stage import Stage, WeightRule
from nemo_vopd.vlm.weights.names import canonical, interleave

_WORTH_A_PROGRESS_LINE = 100_000_000
"""Number of parameters on a rank from which reading shows its progress."""
_BELONG = "check that config.json and the weights belong together"


class HFReader:
    """Slices of the tensors of a Hugging Face directory (one or several safetensors files)."""

    def __init__(self, path: str | Path) -> None:
        """List the tensors of `path`; raises OptionError when there are none, or one is there twice."""
        self.path = Path(path)
        self.original_name: dict[str, str] = {}
        self._file: dict[str, Path] = {}
        self._open: dict[Path, safe_open] = {}  # type: ignore[valid-type]
        for file in weight_files(path):
            try:
                names = list(self._handle(file).keys())
            except SafetensorError as error:
                rule = f"holds {file.name}, which cannot be read ({error})"
                raise OptionError("model.hf_path", path, rule, "copy the model again") from None
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


@torch.no_grad()
def load_hf(stage: Stage, path: str | Path, groups: ProcessGroupCollection) -> None:
    """Fill this rank's shards of `stage` from the Hugging Face directory `path`, one parameter after the other.

    Every rank of the model must call it. Raises OptionError that names missing, unexpected and misshaped tensors, those
    that hold a number that is not finite, and a head that differs from the embedding although config.json ties them.
    """
    reader = HFReader(path)
    rules = {name: stage.weight_rule(name) for name, _ in stage.named_parameters()}
    has_spare_head = _check_names(reader, rules, groups)
    faults: list[str] = []
    size, num_groups = groups.tp.size(), stage.config.num_query_groups
    total = sum(p.numel() for p in stage.parameters())
    shown = total > _WORTH_A_PROGRESS_LINE and dist.get_rank() == 0
    with tqdm(total=total, unit="", unit_scale=True, desc=f"reading {path}", disable=not shown, mininterval=1) as bar:
        for name, parameter in stage.named_parameters():
            rule = rules[name]
            _check_shapes(reader, rule, parameter, size)
            parts = [_local_part(reader, n, parameter, rule, groups) for n in rule.names]
            for n, part in zip(rule.names, parts, strict=True):
                if not part.isfinite().all():
                    faults.append(f"{reader.original_name[n]}, which is not finite (NaN or infinite)")
                if has_spare_head and n == "embed_tokens.weight":
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
        if "lm_head" in found[0]:
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


def _check_names(reader: HFReader, rules: dict[str, WeightRule], groups: ProcessGroupCollection) -> bool:
    """Whether the files hold a head although the model's is its embedding.

    Raises OptionError, on every rank, when the files lack a tensor of the model or hold one that it does not know.
    """
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
    return "lm_head.weight" in present - needed
