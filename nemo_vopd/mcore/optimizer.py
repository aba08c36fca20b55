"""Megatron's DDP and distributed optimizer, the learning rate as a function of the step, Lightning's facade."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from nemo_vopd.config import OptimizerConfig
from nemo_vopd.mcore.sharded_state import Shards


def wrap_ddp(chunks: Iterable[torch.nn.Module], groups: ProcessGroupCollection) -> list[DistributedDataParallel]:
    """Megatron's data parallelism around the chunks of a stage: float32 gradients, optimizer state over ranks."""
    # no overlap: the head's gradient is added to main_grad by the loss and never passes DDP's autograd hooks
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=True
    )
    ddp: list[Any] = [DistributedDataParallel(c.config, ddp_config, c, pg_collection=groups) for c in chunks]  # type: ignore[arg-type]
    config = ddp[0].config  # one object for all chunks
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = [chunk.no_sync for chunk in ddp] if len(ddp) > 1 else ddp[0].no_sync
    return ddp


class Optimizer:
    """AdamW on float32 main weights, sharded over data-parallel ranks (Megatron's DistributedOptimizer)."""

    def __init__(
        self,
        ddp: list[DistributedDataParallel],
        options: OptimizerConfig,
        groups: ProcessGroupCollection,
        *,
        bf16: bool,
    ) -> None:
        """Take over the parameters of `ddp`. Weight decay applies to all of them, as in the published run."""
        self.ddp, self.options, self.num_updates = ddp, options, 0
        config = MegatronOptimizerConfig(
            optimizer="adam",
            lr=options.lr,
            weight_decay=options.weight_decay,
            adam_beta1=options.beta1,
            adam_beta2=options.beta2,
            adam_eps=options.eps,
            clip_grad=options.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=True,
        )
        self.megatron: MegatronOptimizer = get_megatron_optimizer(
            config,
            list[MegatronModule](ddp),
            config_overrides={},  # Megatron's own, without them, leave vectors out of weight decay
            use_gloo_process_groups=False,
            pg_collection=groups,
        )

    def zero_grad(self) -> None:
        """Clear the gradient buffers before a step."""
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def step(self, lr: float) -> tuple[bool, float]:
        """Clip and update with learning rate `lr`; returns (updated, global gradient norm before clipping).

        A non-finite norm, which every rank sees alike, leaves weights and optimizer state untouched.
        """
        for group in self.megatron.param_groups:
            group["lr"] = lr
        self.megatron.prepare_grads()
        grad_norm = float(self.megatron.get_grad_norm())
        if not math.isfinite(grad_norm):
            return False, grad_norm
        if self.options.clip_grad > 0:
            for part in self._parts():
                clip_grad_by_total_norm_fp32(list(part.get_parameters()), self.options.clip_grad, grad_norm)
        self.megatron.step_with_ready_grads()
        self.num_updates += 1
        return True, grad_norm

    def _parts(self) -> list[DistributedOptimizer]:
        return self.megatron.chained_optimizers  # type: ignore[attr-defined]

    def state_shards(self, model: torch.nn.Module) -> dict[str, Shards]:
        """All float32 state by kind and by parameter name in `model`: weights and both moments."""
        main = self.main_shards()
        states: dict[torch.nn.Parameter, dict[str, Any]] = {}
        for part in self._parts():
            inner: Any = part.optimizer
            for parameter, (shard, _) in main.items():
                if parameter in part.model_param_group_index_map:
                    group, order = part.model_param_group_index_map[parameter]
                    own = inner.param_groups[group]["params"][order]
                    state = states[parameter] = inner.state[own]
                    if "exp_avg" not in state:
                        state.update(exp_avg=torch.zeros_like(shard), exp_avg_sq=torch.zeros_like(shard))
                        if isinstance(inner, torch.optim.Adam):  # Transformer Engine and apex count in the group
                            state["step"] = torch.tensor(0.0)
        named = {name: p for name, p in model.named_parameters() if p in main}
        kinds = {"student": {name: main[p] for name, p in named.items()}}
        for kind in ("exp_avg", "exp_avg_sq"):
            kinds[kind] = {name: (states[p][kind], main[p][1]) for name, p in named.items()}
        return kinds

    @torch.no_grad()
    def restored(self, num_updates: int) -> None:
        """After the tensors of `state_shards` were filled in place: count on from `num_updates`, publish weights."""
        self.num_updates = num_updates
        for part in self._parts():
            inner: Any = part.optimizer
            for state in inner.state.values():
                if "step" in state:
                    state["step"].fill_(num_updates)
            if not isinstance(inner, torch.optim.Adam):
                for group in inner.param_groups:
                    group["step"] = num_updates
            part._copy_main_params_to_model_params()
        for chunk in self.ddp:
            chunk.start_param_sync(force_sync=True)

    def main_shards(self) -> dict[torch.nn.Parameter, tuple[Tensor, int]]:
        """This rank's part of the float32 main weights: parameter -> (flat shard, its start within the parameter).

        Parameters whose elements all live on other data-parallel ranks are absent.
        """
        shards: dict[torch.nn.Parameter, tuple[Tensor, int]] = {}
        for part in self._parts():
            pairs = [
                (part.model_float16_groups, part.shard_fp32_from_float16_groups),
                (part.model_fp32_groups, part.shard_fp32_groups),
            ]
            for parameters, mains in pairs:
                for parameter_group, main_group in zip(parameters, mains, strict=True):
                    for parameter, main in zip(parameter_group, main_group, strict=True):
                        start = part._get_model_param_range_map(parameter)["param"].start
                        shards[parameter] = (main, start)
        return shards


def learning_rate(step: int, options: OptimizerConfig, max_steps: int) -> float:
    """Learning rate of update `step` (0-based): linear warm-up, then constant or cosine to `min_lr`."""
    if step < options.warmup_steps:
        # the published schedule starts at 0, an update without effect; ours starts one notch higher
        return options.lr * (step + 1) / options.warmup_steps
    if options.schedule == "constant":
        return options.lr
    progress = (step - options.warmup_steps) / max(1, max_steps - options.warmup_steps)
    return options.min_lr + (options.lr - options.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class OptimizerFacade(torch.optim.Optimizer):
    """What Lightning sees: a step that counts. Megatron's optimizer has updated by then (manual optimization)."""

    def __init__(self) -> None:
        """One placeholder parameter; all state lives in `Optimizer`."""
        super().__init__([torch.nn.Parameter(torch.zeros(()))], {})

    def step(self, closure=None):  # type: ignore[override]
        """Nothing to do: Lightning's counter moves because it was called."""
        return None
