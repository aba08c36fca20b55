"""The edge of every recipe: Hydra in, one line and exit code 2 out when the user asked for something wrong."""

from __future__ import annotations

import functools
import logging
import os
import re
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

from nemo_vopd.errors import OptionError, RunError, printable

CONF = str(Path(__file__).resolve().parents[1] / "conf")


_ANNOUNCERS = (
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.distributed.distributed_data_parallel",
    "megatron.core.dist_checkpointing.strategies.common",
    "megatron.core.dist_checkpointing.strategies.torch",
)


def quiet_announcements() -> None:
    """Silence the parts of Megatron-Core 0.19 that announce at every start what a later version will change.

    They would stand on standard output, before the JSON of plan.py and generate.py.
    """
    for name in _ANNOUNCERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def run_recipe(
    task: Callable[[DictConfig], None],
    config_name: str,
    verb: str | None = None,
    more_help: Callable[[], str] | None = None,
) -> None:
    """Compose `conf/<config_name>.yaml` with the command line and call `task` with it.

    `verb` names the option whose value may be given as a first word alone (`benchmark.py loss` for `part=loss`).
    `more_help` is printed before Hydra's own answer to --help.

    A user's mistake ends the process with one line (option=value: rule; remedy) and exit code 2, a fault that no option
    mends with one line and exit code 1. Options are read
    with Hydra itself: NeMo's `hydra_runner` accepts the same command line, but importing it takes ten seconds, which
    nobody should wait to be told of a typing error.
    """
    if verb is not None and len(sys.argv) > 1 and re.fullmatch(r"\w+", sys.argv[1]):
        sys.argv[1] = f"{verb}={sys.argv[1]}"
    if more_help is not None and {"--help", "-h"} & set(sys.argv[1:]):
        print(more_help() + "\n")
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
            task(cfg)
        except OptionError as error:
            fail(str(error))
        except RunError as error:
            fail(str(error), code=1)
        except (HydraException, OmegaConfBaseException) as error:
            fail(_explain(error))
        except Exception:
            if not _distributed():
                raise
            traceback.print_exc()  # and leave at once: the other ranks must not wait for this one
            sys.stdout.flush()
            os._exit(1)

    try:
        _hydra_main(config_name)(guarded)()
    except OptionError as error:
        fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        fail(_explain(error))


def _hydra_main(config_name: str) -> Callable:
    """`hydra.main` on conf/; conf/quiet.yaml switches its output folders off, as NeMo's `hydra_runner` does."""
    return hydra.main(version_base="1.3", config_path=CONF, config_name=config_name)


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


def _explain(error: Exception) -> str:
    """One line with option, value, rule and remedy from a Hydra or OmegaConf error."""
    text = " ".join(str(error).split())
    cause = " ".join(str(error.__cause__).split()) if error.__cause__ else ""
    full_key = re.search(r"full_key: (\S+)", text + " " + cause)
    overrides = [a for a in sys.argv[1:] if "=" in a and not a.startswith(("-", "hydra"))]
    group = re.search(r"Could not find '([\w/]+)/(\w+)'", text)
    if group:
        name, value = group.groups()
        return f"{name}={value}: there is no conf/{name}/{value}.yaml; choose one of the files there"
    if "Error parsing override" in text:
        wrong = re.search(r"Error parsing override '([^']*)'", text)
        typed = wrong.group(1) if wrong else "?"
        return f"{typed}: is not of the form option=value; see --help"
    named = re.search(r"[Cc]ould not override '([^']+)'", text)
    name = named.group(1) if named else full_key.group(1) if full_key else ""
    typed = next((a for a in overrides if name and a.lstrip("+~").split("=")[0] == name), name or "configuration")
    if "=" not in typed:
        typed += "=?"
    if "is not in struct" in text + cause or "not in '" in text + cause:
        return f"{typed}: no such option; see conf/ or nemo_vopd/config.py for the names"
    if "Cannot find primary config" in text:
        names = ", ".join(sorted(file.stem for file in Path(CONF).glob("*.yaml") if file.stem != "quiet"))
        return f"--config-name: {text.split('.')[0]}; choose one of {names}"
    reason = (cause or text).split(" full_key:")[0]
    return f"{typed}: {reason}; see nemo_vopd/config.py for the type of each option"
