"""Configurations and runs that several tests share."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from nemo_vopd.batch import Rollout
from nemo_vopd.command_line import CONF
from nemo_vopd.config import Config
from nemo_vopd.data.loader import build_train_loader
from nemo_vopd.data.processor import Processor
from nemo_vopd.validation import from_hydra


def tiny_config(assets: Path, exp_dir: Path, *overrides: str) -> Config:
    """`--config-name tiny` on the shared assets, quiet."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(
            "tiny",
            overrides=[
                f"model.hf_path={assets}/tiny-vlm",
                f"data.path={assets}/tiny-digits",
                f"exp_manager.exp_dir={exp_dir}",
                "exp_manager.create_tensorboard_logger=false",
                "trainer.enable_progress_bar=false",
                *overrides,
            ],
        )
    return from_hydra(cfg)


def made_up_rollouts(config: Config, num_steps: int, seed: int = 3) -> list[list[Rollout]]:
    """Random responses of different lengths to the prompts that `config` trains on, and made-up engine log-probs."""
    processor = Processor.from_pretrained(config.model.hf_path)
    view = config.distill.teacher_view
    loader = build_train_loader(config.data, view, processor, seed=config.seed, dp_rank=0, dp_size=1)
    generator = torch.Generator().manual_seed(seed)
    allowed = [i for i in range(60) if i not in processor.forbidden_token_ids]
    steps = []
    for _, batch in zip(range(num_steps), loader, strict=False):
        rollouts = []
        for sample in batch.samples:
            for index in range(config.rollout.n):
                length = int(torch.randint(1, config.rollout.max_response_length + 1, (), generator=generator))
                tokens = torch.tensor(allowed)[torch.randint(0, len(allowed), (length,), generator=generator)]
                log_probs = -6 * torch.rand(length, generator=generator)
                rollouts.append(Rollout(sample, tokens, log_probs, index))
        steps.append(rollouts)
    return steps


def write_rollouts(path: Path, steps: list[list[Rollout]]) -> None:
    """The file that `rollout=replay rollout.path=...` reads."""
    from nemo_vopd.rollout.replay import dump, to_record

    for step, rollouts in enumerate(steps):
        dump(path, [to_record(rollout) for rollout in rollouts], step)


def read_lines(path: Path) -> list[dict]:
    """Objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
