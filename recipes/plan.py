"""Will a run fit, and how long will it take? Needs neither a GPU nor the model.

python recipes/plan.py --config-name train_72b
python recipes/plan.py --config-name train_72b num_nodes=4 gpu=h200 assume.response_tokens=512 --json

Exit code 1 when it does not fit or sizes do not divide, with one line that says what to change.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from nemo_vopd.cli import run_recipe
from nemo_vopd.command_line import Command
from nemo_vopd.errors import OptionError, RunError
from nemo_vopd.tools.planning.assumptions import PlanConfig
from nemo_vopd.validation import from_hydra

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that happens to be here must not be asked for the model's memory

# the schema every training configuration begins with: so each of them takes these options as its own
ConfigStore.instance().store(name="nemo_vopd", node=PlanConfig)
COMMAND = Command(PlanConfig, "train_72b")


def main(cfg: DictConfig, as_json: bool) -> None:
    """Plan, print, and raise RunError with the remedy when the run cannot work."""
    config = from_hydra(cfg, PlanConfig)
    # libraries may print while they are imported; standard output is for the plan
    with contextlib.redirect_stdout(sys.stderr):
        # Megatron takes seconds to import: mistakes are told first
        from nemo_vopd.tools.planning.plan import Plan, divide_remedy, plan_json, plan_text, refusal_json, remedy_for

        if config.model.architecture is None:  # the tiny run's model is made on first use
            from nemo_vopd.tools.prepare.tiny_model import ensure_tiny_assets

            ensure_tiny_assets(Path(config.model.hf_path), Path(config.data.path))
        try:
            plan = Plan(config)
            remedy = None if plan.fits else remedy_for(plan)
            text = json.dumps(plan_json(plan, remedy), indent=1) if as_json else plan_text(plan)
        except OptionError as error:
            if not error.option.startswith(("parallel.", "data.batch_size", "num_nodes", "model.freeze")):
                raise
            remedy = divide_remedy(error, config)
            text = json.dumps(refusal_json(config, remedy), indent=1) if as_json else ""
    if text:
        print(text, flush=True)
    if remedy is not None:
        raise RunError(remedy)


if __name__ == "__main__":
    as_json = "--json" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--json"]
    run_recipe(lambda cfg: main(cfg, as_json), COMMAND)
