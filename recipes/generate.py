"""Answer one question about one image: one JSON object with the text, its tokens and their log-probs.

python recipes/generate.py model.hf_path=Qwen2.5-VL-7B-Instruct image=photo.jpg prompt="What does the sign say?"
torchrun --nproc-per-node 4 recipes/generate.py model.hf_path=... image=... prompt=... parallel.tensor=4
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from nemo_vopd.bounds import bounded
from nemo_vopd.cli import run_recipe
from nemo_vopd.command_line import Command
from nemo_vopd.config import Config
from nemo_vopd.errors import OptionError
from nemo_vopd.validation import from_hydra


@dataclass
class GenerateConfig(Config):
    """A run's configuration and one request."""

    image: str = "???"
    """Image file."""
    prompt: str = "???"
    """The question, without any template."""
    max_new_tokens: int = bounded(128, at_least=1)
    """Largest number of tokens of the reply."""
    temperature: float = bounded(0.0, at_least=0)
    """Sampling temperature; 0 takes the most likely token."""


ConfigStore.instance().store(name="nemo_vopd_generate", node=GenerateConfig)
COMMAND = Command(GenerateConfig, "generate", texts=("prompt", "image"))


def main(cfg: DictConfig) -> None:
    """Check the request, then answer it."""
    config = from_hydra(cfg, GenerateConfig)
    if not Path(config.image).is_file():
        raise OptionError("image", config.image, "is not a file", "give an image file")
    from nemo_vopd.tools.generate import generate  # Megatron takes seconds to import: mistakes are told first

    reply = generate(config, Path(config.image), config.prompt, config.max_new_tokens, config.temperature)
    if reply is not None:
        print(json.dumps(reply, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    run_recipe(main, COMMAND)
