"""FP8 matrix products of the language layers, by Transformer Engine: what a run asks for, and its scaling state.

Weights stay in bf16, for the optimizer, the teacher's average, sampling and export alike, and are cast for each pass;
embedding, attention, vision tower, head and loss stay in bf16 and float32. Only `delayed` scaling has a state: the
largest values of earlier passes. It is kept alike on all data-parallel ranks from step to step, so that a checkpoint
holds it once and another layout can read it.

It has run on one H100 (docs/benchmarks.md), never on several GPUs; `tests/test_simulated_te.py` runs it with
Transformer Engine 2.18 and replaced kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_vopd.config import Config, FP8Config
from nemo_vopd.errors import OptionError
from nemo_vopd.mcore.layers import uses_transformer_engine


def megatron_options(options: FP8Config) -> dict[str, Any]:
    """What Megatron's `TransformerConfig` is told; nothing without a recipe."""
    if options.recipe is None:
        return {}
    first, last = options.first_layers_bf16, options.last_layers_bf16
    return {
        "fp8": options.format,
        "fp8_recipe": options.recipe,
        "fp8_amax_history_len": options.amax_history,
        "fp8_amax_compute_algo": options.amax_algorithm,
        "first_last_layers_bf16": bool(first or last),
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
        # Data-parallel ranks have different numbers of microbatches: a reduction over them in each would never end.
        "tp_only_amax_red": True,
    }


_MULTIPLE, _BLOCK = 16, 128
"""Sizes of FP8 matrices must be multiples of the first. Blocks of the second share one scale, and ranks gather whole
blocks only."""


def token_multiple(megatron: TransformerConfig) -> int:
    """The number of tokens of a microbatch is a multiple of this; sequence parallelism divides them over ranks."""
    parts = megatron.tensor_model_parallel_size if megatron.sequence_parallel else 1
    if not megatron.fp8:
        return parts
    return parts * (_BLOCK if megatron.fp8_recipe == "blockwise" and parts > 1 else _MULTIPLE)


def check_sizes(options: FP8Config, megatron: TransformerConfig) -> None:
    """Raise OptionError where FP8 cannot compute the layers of this model in this layout."""
    if options.recipe is None:
        return
    if not megatron.bf16:
        rule, remedy = "needs bf16 weights, and the model's are float32", "set precision.dtype=bf16"
        raise OptionError("precision.fp8.recipe", options.recipe, rule, remedy)
    t = megatron.tensor_model_parallel_size
    assert megatron.kv_channels is not None and megatron.ffn_hidden_size is not None
    assert megatron.num_query_groups is not None
    heads, groups = megatron.num_attention_heads, megatron.num_query_groups
    gathers_blocks = options.recipe == "blockwise" and megatron.sequence_parallel
    sizes = {
        "the hidden size": (megatron.hidden_size, _BLOCK if gathers_blocks else _MULTIPLE),
        "a rank's share of the feed-forward size": (megatron.ffn_hidden_size // t, _MULTIPLE),
        "a rank's share of the heads' width": (heads * megatron.kv_channels // t, _MULTIPLE),
        "a rank's share of queries, keys and values": ((heads + 2 * groups) * megatron.kv_channels // t, _MULTIPLE),
    }
    for name, (size, multiple) in sizes.items():
        if size % multiple:
            rule = f"computes multiples of {multiple}, and {name} is {size}"
            smaller = "a smaller parallel.tensor or " if t > 1 else ""
            raise OptionError("precision.fp8.recipe", options.recipe, rule, f"choose {smaller}precision=bf16")


def check_machine(config: Config) -> None:
    """Raise OptionError where this machine has no FP8."""
    options = config.precision.fp8
    if options.recipe is None:
        return
    if not torch.cuda.is_available():
        rule, remedy = "needs an NVIDIA GPU (H100, or later), and this machine has none", "set precision=bf16"
        raise OptionError("precision.fp8.recipe", options.recipe, rule, remedy)
    if not uses_transformer_engine(config.model.layer_spec, torch.bfloat16):
        remedy = "run in an NGC image or pip install nemo_vopd[gpu], or set precision=bf16"
        raise OptionError("precision.fp8.recipe", options.recipe, "needs Transformer Engine", remedy)
    import transformer_engine.pytorch as te  # type: ignore[import-not-found]

    blockwise = options.recipe == "blockwise"
    works, reason = (te.is_fp8_block_scaling_available if blockwise else te.is_fp8_available)(return_reason=True)
    if not works:
        remedy = "set precision=fp8_tensorwise or precision=bf16" if blockwise else "set precision=bf16"
        raise OptionError("precision.fp8.recipe", options.recipe, f"does not run here ({reason})", remedy)


def roll_history(megatron: TransformerConfig) -> None:
    """After a forward pass without gradient: take its largest values into the scales of the next.

    Transformer Engine does so only when gradients are enabled; the teacher's scales would stay 1 for ever.
    """
    if megatron.fp8 and megatron.fp8_recipe == "delayed" and not torch.is_grad_enabled():
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager  # type: ignore[import-not-found]

        FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=True)


@torch.no_grad()  # with gradients enabled, leaving an FP8 context rolls all histories
def scaling_state(stages: dict[str, Any]) -> dict[str, Tensor]:
    """Scales and histories of largest values, live: `<stage>.layers.<number of the layer>.<module>.<tensor>`.

    Empty unless scaling is delayed. Modules that have not run yet get their initial state.
    """
    state: dict[str, Tensor] = {}
    for who, stage in stages.items():
        if stage.config.fp8 and stage.config.fp8_recipe == "delayed":
            state |= {f"{who}.{name}": tensor for name, tensor in _scaling_state(stage).items()}
    return state


def _scaling_state(stage: Any) -> dict[str, Tensor]:
    from megatron.core.fp8_utils import get_fp8_context

    megatron, state = stage.config, {}
    for name, module in _scaled_modules(stage):
        if "scaling_fwd" not in module.fp8_meta:
            with get_fp8_context(megatron):
                module.init_fp8_metadata(num_gemms=1)
        for direction in ("fwd", "bwd"):
            scaling = module.fp8_meta[f"scaling_{direction}"]
            state[f"{name}.scale_{direction}"] = scaling.scale
            state[f"{name}.amax_history_{direction}"] = scaling.amax_history
    return state


def _scaled_modules(stage: Any) -> Iterator[tuple[str, Any]]:
    for chunk in stage.chunks:
        for layer in chunk.language.decoder.layers:
            for name, module in layer.named_modules():
                if hasattr(module, "init_fp8_metadata") and getattr(module, "weight", None) is not None:
                    yield f"layers.{layer.layer_number - 1}.{name}", module


@torch.no_grad()
def synchronize_scaling(state: dict[str, Tensor], groups: ProcessGroupCollection) -> None:
    """Between two steps: give all data-parallel ranks the largest values that any of them has seen."""
    if not state or groups.dp_cp.size() == 1:
        return
    for kind, operation in (("scale", dist.ReduceOp.MIN), ("amax_history", dist.ReduceOp.MAX)):
        tensors = [tensor for name, tensor in state.items() if name.rpartition(".")[2].startswith(kind)]
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, op=operation, group=groups.dp_cp)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])


def gather(state: dict[str, Tensor], groups: ProcessGroupCollection) -> dict[str, Tensor]:
    """`scaling_state` of all pipeline stages, in host memory; every rank calls it."""
    parts: list = [None] * groups.pp.size()
    dist.all_gather_object(parts, {name: tensor.cpu() for name, tensor in state.items()}, group=groups.pp)
    return {name: tensor for part in parts for name, tensor in part.items()}


@torch.no_grad()
def restore(state: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Fill `state`, live, from what `gather` gave; modules that were not saved start anew.

    A history of another length takes over the newest values, which are its last rows.
    """
    for name, tensor in state.items():
        if name in saved:
            old = saved[name]
            if old.dim() == 2 and len(old) != len(tensor):
                old = torch.nn.functional.pad(old[-len(tensor) :], (0, 0, max(0, len(tensor) - len(old)), 0))
            tensor.copy_(old)
