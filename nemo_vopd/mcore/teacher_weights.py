"""A second set of model weights laid out like the student's, fed from float32 shards (the teacher's weights)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_vopd.mcore.optimizer import Optimizer


class ShardedWeights:
    """Weights of `model` in flat buffers with the layout of the student's DDP buffers.

    Every data-parallel rank owns the same slice of each bucket as the distributed optimizer does, so float32 shards
    of the optimizer can be cast into place and gathered: one all-gather a bucket, no other copy of the model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        student: torch.nn.Module,
        optimizer: Optimizer,
        groups: ProcessGroupCollection,
    ) -> None:
        """Rebind the parameters of `model`, built like the student, to flat buffers with the student's weights."""
        self.group = groups.dp_cp
        shards = optimizer.main_shards()
        self.main = {name: shards[p] for name, p in student.named_parameters() if p in shards}
        twin = dict(model.named_parameters())
        self._targets: dict[str, Tensor] = {}
        self._buckets: list[tuple[Tensor, Tensor]] = []
        names = {parameter: name for name, parameter in student.named_parameters()}
        assert twin.keys() == set(names.values()), "nothing else fills the others in"
        constants = dict(student.named_buffers())  # computed anew on another device they could differ in the last bit
        for name, constant in model.named_buffers():
            constant.copy_(constants[name])
        for parameter, name in names.items():
            if not parameter.requires_grad:  # frozen: the same numbers for ever, so the same memory
                twin[name].data = parameter.data
                twin[name].requires_grad_(False)
        # Megatron's flat buffers, not Module.buffers()
        buffers: list[Any] = [buffer for chunk in optimizer.ddp for buffer in chunk.buffers]  # type: ignore[union-attr]
        for buffer in buffers:
            flat = buffer.param_data.clone()
            for parameter, (start, end, _) in buffer.param_index_map.items():
                target = twin[names[parameter]]
                target.data = flat[start:end].view(target.shape)
                target.requires_grad_(False)
            for bucket in buffer.buckets:
                part = flat[bucket.offset : bucket.offset + bucket.param_data.numel()]
                self._buckets.append((part, part.chunk(self.group.size())[self.group.rank()]))
        for name, (main, start) in self.main.items():
            self._targets[name] = twin[name].data.view(-1)[start : start + main.numel()]

    @torch.no_grad()
    def publish(self, shards: dict[str, Tensor]) -> None:
        """Cast float32 `shards` (by parameter name, this rank's elements) into the weights and gather the others'."""
        if shards:
            torch._foreach_copy_([self._targets[name] for name in shards], list(shards.values()))
        if self.group.size() > 1:
            for bucket, own in self._buckets:
                dist.all_gather_into_tensor(bucket, own.clone(), group=self.group)
