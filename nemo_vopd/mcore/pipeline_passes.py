"""Both passes of a step through Megatron's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_vopd.batch import MicroBatch
from nemo_vopd.mcore import parallel
from nemo_vopd.mcore.fp8 import roll_history
from nemo_vopd.mcore.stage import Stage
from nemo_vopd.watchdog import beat

LossFunction = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]
"""(response hidden states [T, H], microbatch index) -> (loss sum, number of tokens int32, statistics [S])."""


def _run(
    chunks: Sequence, batches: list[MicroBatch], on_last_stage: Callable, groups: ProcessGroupCollection, **options
) -> list:
    interleaved = len(chunks) > 1

    def forward_step(iterator, model):
        beat()
        index, batch = next(iterator)
        patches = None
        if model is chunks[0] and parallel.is_first_stage(groups):  # the only chunk that reads them
            patches = batch.pixel_values.to(batch.token_ids.device, non_blocking=True)
        hidden = model(batch.token_ids, batch.position_ids, batch.packing, patches, batch.grid_thw)
        roll_history(chunks[0].config)
        return hidden, partial(on_last_stage, index, batch)

    iterators: Any = [iter(enumerate(batches)) for _ in chunks]
    return get_forward_backward_func(pp_size=groups.pp.size(), vp_size=len(chunks) if interleaved else None)(
        forward_step_func=forward_step,
        data_iterator=iterators if interleaved else iterators[0],
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=len(batches),
        # lengths vary from batch to batch (variable_seq_lengths); Megatron asks for them all the same
        seq_length=batches[0].token_ids.numel(),
        micro_batch_size=1,
        pg_collection=groups,
        p2p_communicator=_communicator(chunks[0].config, groups),
        **options,
    )


def _communicator(config, groups: ProcessGroupCollection):
    if groups.pp.size() == 1:
        return None
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    return P2PCommunicator(pp_group=groups.pp, config=config)


@torch.no_grad()
def teacher_pass(
    model: Stage, batches: list[MicroBatch], groups: ProcessGroupCollection, offload: bool = False
) -> list[Tensor]:
    """Forward only: hidden states [T, H] of the response rows of each microbatch (empty before the last stage).

    `offload` moves them to host memory as they appear.
    """

    def keep_response_rows(index: int, batch: MicroBatch, hidden: Tensor, non_loss_data: bool = True) -> Tensor:
        rows = model.response_hidden(hidden, batch)
        return rows.cpu() if offload else rows

    # `model` may be the student (kind=current). In training mode, what is to be computed again in a backward pass is
    # noted for it: Transformer Engine would keep the scales of each pass for ever, and give them to the student's.
    training = model.training
    model.eval()
    try:
        return _run(model.chunks, batches, keep_response_rows, groups, forward_only=True, collect_non_loss_data=True)
    finally:
        model.train(training)


def student_pass(
    model: Stage,
    ddp: list[DistributedDataParallel],
    batches: list[MicroBatch],
    loss_function: LossFunction,
    groups: ProcessGroupCollection,
) -> list[Tensor]:
    """Forward and backward of `ddp`, the chunks of `model`; gradients are divided by the global number of tokens.

    Returns the statistics of each microbatch (empty before the last stage).
    """

    def loss(index: int, batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return loss_function(model.response_hidden(hidden, batch), index)

    return _run(ddp, batches, loss, groups, forward_only=False)
