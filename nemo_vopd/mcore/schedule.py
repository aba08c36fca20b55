"""Both passes of a step through Megatron's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_vopd.batch import MicroBatch

LossFunction = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]
"""(response hidden states [T, H], microbatch index) -> (loss sum, number of tokens int32, statistics [S])."""


def _run(model, batches: list[MicroBatch], on_last_stage: Callable, groups: ProcessGroupCollection, **options) -> list:
    def forward_step(iterator, model):
        index, batch = next(iterator)
        hidden = model(batch.token_ids, batch.position_ids, batch.pixel_values, batch.grid_thw)
        return hidden, partial(on_last_stage, index, batch)

    return get_forward_backward_func(pp_size=groups.pp.size(), vp_size=None)(
        forward_step_func=forward_step,
        data_iterator=iter(enumerate(batches)),
        model=model,
        num_microbatches=len(batches),
        # lengths vary from batch to batch (variable_seq_lengths); Megatron asks for them all the same
        seq_length=batches[0].token_ids.size(1),
        micro_batch_size=batches[0].token_ids.size(0),
        pg_collection=groups,
        p2p_communicator=_communicator(model, groups),
        **options,
    )


def _communicator(model, groups: ProcessGroupCollection):
    if groups.pp.size() == 1:
        return None
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    return P2PCommunicator(pp_group=groups.pp, config=model.config)


@torch.no_grad()
def teacher_pass(
    model: torch.nn.Module, batches: list[MicroBatch], groups: ProcessGroupCollection, offload: bool = False
) -> list[Tensor]:
    """Forward only: hidden states [T, H] of the response rows of each microbatch (empty before the last stage).

    `offload` moves them to host memory as they appear.
    """

    def keep_response_rows(index: int, batch: MicroBatch, hidden: Tensor, non_loss_data: bool = True) -> Tensor:
        rows = model.response_hidden(hidden, batch)  # type: ignore[operator]
        return rows.cpu() if offload else rows

    return _run(model, batches, keep_response_rows, groups, forward_only=True, collect_non_loss_data=True)


def student_pass(
    ddp: torch.nn.Module, batches: list[MicroBatch], loss_function: LossFunction, groups: ProcessGroupCollection
) -> list[Tensor]:
    """Forward and backward; gradients end up divided by the global number of response tokens.

    Returns the statistics of each microbatch (empty before the last stage).
    """
    model = ddp.module

    def loss(index: int, batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return loss_function(model.response_hidden(hidden, batch), index)  # type: ignore[operator,union-attr]

    return _run(ddp, batches, loss, groups, forward_only=False)
