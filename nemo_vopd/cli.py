"""The edge of every recipe: Hydra in, one line and exit code 2 out when the user asked for something wrong."""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from nemo_vopd.command_line import CONF, Command, explain, help_text, read, taken_literally
from nemo_vopd.errors import OptionError, RunError, printable

_ANNOUNCERS = (
    "torch.utils.cpp_extension",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.distributed.distributed_data_parallel",
    "megatron.core.dist_checkpointing.strategies.common",
    "megatron.core.dist_checkpointing.strategies.torch",
)


def quiet_announcements() -> None:
    """Silence the parts of torch and Megatron-Core 0.19 that announce at every start what is missing or will change.

    They would stand on standard output, before the JSON of plan.py and generate.py.
    """
    for name in _ANNOUNCERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def run_recipe(
    task: Callable[[DictConfig], None], command: Command, more_help: Callable[[], str] | None = None
) -> None:
    """Compose the configuration that the command line asks for and call `task` with it.

    --help prints what the recipe's module says, `more_help`, and every option of `command`.

    A user's mistake ends the process with one line (option=value: rule; remedy) and exit code 2, a fault that no option
    mends with one line and exit code 1. Options are read with Hydra itself: NeMo's `hydra_runner` accepts the same
    command line, but importing it takes ten seconds, which nobody should wait to be told of a typing error.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(command, sys.modules["__main__"].__doc__ or "", more_help() if more_help is not None else ""))
        return
    try:
        sys.argv[1:], texts = read(sys.argv[1:], command)
    except OptionError as error:
        fail(str(error))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra raise instead of printing its own report with code 1

    # NeMo's telemetry client says at length, on import, that it is switched off; Megatron and Energon tell what they
    # found on import and list every parameter
    logging.getLogger("nv_one_logger").setLevel(logging.ERROR)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    quiet_announcements()

    # what libraries tell their developers on import and at each call is not for the user of a recipe
    warnings.filterwarnings("ignore", module=r"(megatron|lightning|torch|nemo|transformers|webdataset)")

    @functools.wraps(task)
    def guarded(cfg: DictConfig) -> None:
        # inside Hydra's job: an error that leaves it gets a second line, "Error executing job with overrides"
        try:
            for name, text in texts.items():
                cfg[name] = taken_literally(text)
            task(cfg)
        except OptionError as error:
            fail(str(error))
        except RunError as error:
            fail(str(error), code=1)
        except (HydraException, OmegaConfBaseException) as error:
            fail(explain(error, command))
        except KeyboardInterrupt:
            fail("interrupted", code=130)
        except Exception:
            if not _distributed():
                raise
            traceback.print_exc()  # and leave at once: the other ranks must not wait for this one
            sys.stdout.flush()
            os._exit(1)

    try:
        _hydra_main(command.config_name)(guarded)()
    except OptionError as error:
        fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error, command))


def _hydra_main(config_name: str | None) -> Callable:
    """`hydra.main` on conf/; conf/quiet.yaml switches its output folders off, as NeMo's `hydra_runner` does."""
    return hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)


def _distributed() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def fail(message: str, code: int = 2) -> None:
    """End this process with one line on standard error, and `code`."""
    message = printable(message)
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    # every rank reads the same options, so rank 0 speaks; once ranks work on their own share, any of them may
    apart = _distributed()
    if rank == 0 or apart:
        where = f" (rank {rank})" if rank else ""
        print(f"\nerror{where}: {message}" if apart else f"error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(5)  # srun and torchrun end all ranks when the first one ends, which should be the one that speaks
    if code == 2 and (note := os.environ.get("NEMO_VOPD_REFUSED")):
        # for slurm/common.sh: srun returns the highest code of its tasks, which may be that of a kill
        Path(note).write_text(message + "\n")
    # os._exit: other ranks may sit in a collective, and an orderly interpreter exit would wait for them
    sys.stdout.flush()
    os._exit(code)
