"""Supervised warm-up: gives a randomly initialised model something to distil, mostly on close views.

Only the quickstart needs it. The same microbatches, pipeline schedule and optimizer as Vision-OPD, with cross
entropy on the answers as the loss; most prompts show the crop, so the model reads crops better than full images.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, vocab_parallel_cross_entropy
from torch import Tensor
from tqdm import tqdm

from nemo_vopd.batch import MicroBatch, PromptBatch, Rollout, collate
from nemo_vopd.config import Config, OptimizerConfig
from nemo_vopd.data.loader import build_train_loader
from nemo_vopd.data.processor import Processor
from nemo_vopd.mcore import cpu, parallel
from nemo_vopd.mcore.fp8 import token_multiple
from nemo_vopd.mcore.optimizer import Optimizer, learning_rate, wrap_ddp
from nemo_vopd.mcore.pipeline_passes import student_pass
from nemo_vopd.mcore.stage import Stage
from nemo_vopd.vlm.build import build_vlm, check_model


def warm_up(
    config: Config,
    groups: ProcessGroupCollection,
    log_path: Path,
    *,
    steps: int,
    full_fraction: float,
    options: OptimizerConfig,
) -> Stage:
    """Train the model of `config.model.hf_path` on the answers of `config.data.path`; returns this rank's stage.

    `full_fraction` of the prompts show the full image; `log_path` gets one JSON object a step.
    """
    check_model(config)
    processor = Processor.from_pretrained(config.model.hf_path)
    model = build_vlm(config, groups)
    ddp = wrap_ddp(model.chunks, groups)
    optimizer = Optimizer(ddp, options, groups, bf16=model.config.bf16)
    dp = groups.dp_cp
    loader: Iterable[PromptBatch] = build_train_loader(
        config.data, "crop", processor, seed=config.seed, dp_rank=dp.rank(), dp_size=dp.size()
    )
    rank_zero = parallel.is_rank_zero()
    log = log_path.open("w") if rank_zero else None
    bar = tqdm(
        zip(range(steps), loader, strict=False), total=steps, desc="warm-up", disable=not rank_zero, mininterval=1
    )
    for step, prompts in bar:
        start = time.perf_counter()
        batch = _answers(prompts, processor, full_fraction, token_multiple(model.config)).to(cpu.device())

        def cross_entropy(hidden: Tensor, index: int, batch=batch) -> tuple[Tensor, Tensor, Tensor]:
            # each rank projects onto its rows of the head: gradients of the hidden states are summed over ranks
            hidden = copy_to_tensor_model_parallel_region(hidden, group=groups.tp)
            logits = (hidden @ model.output_weight().t()).float()
            losses = vocab_parallel_cross_entropy(logits[:, None], batch.response_tokens[:, None])
            num_tokens = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
            return losses.sum(), num_tokens, losses.detach().mean()

        optimizer.zero_grad()
        losses = student_pass(model, ddp, [batch], cross_entropy, groups)
        lr = learning_rate(step, options, steps)
        _, grad_norm = optimizer.step(lr)
        if log is not None and losses:
            record = {"step": step, "loss": losses[0].item(), "lr": lr, "grad_norm": grad_norm}
            log.write(json.dumps({**record, "seconds_step": time.perf_counter() - start}) + "\n")
            bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
    if log is not None:
        log.close()
    return model


def _answers(prompts: PromptBatch, processor: Processor, full_fraction: float, pad_multiple: int) -> MicroBatch:
    """One microbatch of answers as responses: the first prompts by their full view, the others by their crop."""
    rollouts, views = [], []
    num_full = round(len(prompts.samples) * full_fraction)
    for i, sample in enumerate(prompts.samples):
        assert sample.answers, f"sample {sample.id} has no answer"
        tokens = torch.tensor(processor.encode_answer(sample.answers[0]))
        rollouts.append(Rollout(sample, tokens, torch.zeros(len(tokens))))
        views.append(sample.student if i < num_full else sample.teacher)
    return collate(rollouts, views, processor.pad_token_id, pad_multiple)
