"""Is everything a run needs installed, in the right versions, and does it import? Needs no GPU.

python docker/check_image.py                    an image for GPUs, or any environment with Transformer Engine
python docker/check_image.py --cpu              without Transformer Engine
python docker/check_image.py --base base.json   also: torch and its like are still those of keep_base.py's base.json

Prints a table; exit code 1 with one line for each thing that is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docker")]

from keep_base import normal, requirements  # noqa: E402

MODULES = (
    "torch.distributed.run",
    "hydra",
    "lightning.pytorch",
    "tensorboard",
    "transformers",
    "megatron.core.dist_checkpointing",
    "megatron.core.optimizer",
    "megatron.core.models.gpt",
    "megatron.energon",
    "nemo.core.classes.modelPT",
    "nemo.utils.exp_manager",
    "nemo_vopd.model",
    "nemo_vopd.training.run",
    "nemo_vopd.tools.convert",
    "nemo_vopd.tools.generate",
    "nemo_vopd.tools.evaluation.gap",
    "nemo_vopd.tools.planning.plan",
)
"""Everything that recipes/ import late: what is missing here would end a run after it has started."""

NO_DRIVER = "libcuda.so.1"
"""The driver's library comes from the host; where there is none, as in docker build, its absence is no fault."""


class Table:
    """Rows of what was looked at, what was found, and what is wrong with it."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []

    def add(self, what: str, found: str, wrong: str = "") -> None:
        """One row; `wrong` says what is wrong and what to do, or nothing."""
        self.rows.append((what, found, wrong))

    @property
    def faults(self) -> list[str]:
        """`what=found: wrong` for each row that has a fault."""
        return [f"{what}={found}: {wrong}" for what, found, wrong in self.rows if wrong]

    def __str__(self) -> str:
        width = max(len(what) for what, _, _ in self.rows)
        return "\n".join(f"{what:{width}}  {'WRONG' if wrong else 'ok':5}  {found}" for what, found, wrong in self.rows)


def version(name: str) -> str | None:
    """Installed version of `name`, None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_versions(table: Table, cpu: bool, base: dict[str, str]) -> None:
    """Packages lie in the ranges of pyproject.toml; what the base image brought is what is installed."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    wanted = [(entry, "install such a version") for entry in requirements(pyproject)]
    if not cpu:
        remedy = "build on an NGC PyTorch image that has it, or check with --cpu"
        wanted += [(entry, remedy) for entry in requirements(pyproject, "gpu")]
    for entry, remedy in wanted:
        name = re.split(r"[\[<>=!~ ;]", entry)[0]
        found = version(name)
        right = found is not None and _contains(entry, found)
        table.add(name, found or "absent", "" if right else f"pyproject.toml asks for {entry}; {remedy}")
    for name, before in sorted(base.items()):
        now = version(name)
        if now != before:
            table.add(f"{name} of the base image", now or "absent", f"was {before}; nothing may replace it")
    table.add("packages of the base image", f"{len(base)} unchanged" if base else "not compared (no --base)")


def _contains(entry: str, found: str) -> bool:
    from packaging.requirements import Requirement  # megatron-core depends on it

    return Requirement(entry).specifier.contains(found, prereleases=True)


def check_imports(table: Table, cpu: bool, base: dict[str, str]) -> None:
    """Import what a run imports, and see that Megatron-Core has found Transformer Engine."""
    for name in MODULES:
        table.add(f"import {name}", *_import(name))
    if cpu:
        return
    engine = _import("transformer_engine.pytorch")
    table.add("import transformer_engine.pytorch", *engine)
    if "apex" in base or version("apex"):
        table.add("import apex.optimizers", *_import("apex.optimizers"))
    if engine[0] == "imported" and "megatron.core.extensions.transformer_engine" in sys.modules:
        seen = sys.modules["megatron.core.extensions.transformer_engine"].HAVE_TE
        wrong = "" if seen else "Megatron-Core cannot use it; choose a base image whose version it supports"
        table.add("Transformer Engine in Megatron-Core", "found" if seen else "not found", wrong)


def _import(name: str) -> tuple[str, str]:
    """What became of importing `name`, and what is wrong with that."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # libraries may talk; standard output is for the table
            importlib.import_module(name)
    except Exception as error:  # whatever it is, the table has to say it
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if NO_DRIVER in reason and not Path("/dev/nvidiactl").exists():
            return f"not tried, no driver here ({NO_DRIVER})", ""
        return "failed", f"{reason}; run python -c 'import {name}' for the traceback"
    return "imported", ""


def check_configurations(table: Table) -> None:
    """Every training configuration of conf/ composes and passes the checks of a start."""
    from hydra import compose, initialize_config_dir

    from nemo_vopd.validation import from_hydra

    files = sorted((ROOT / "conf").glob("*.yaml"))
    names = [file.stem for file in files if re.search(r"^  - nemo_vopd$", file.read_text(), re.MULTILINE)]
    given = ["model.hf_path=MODEL", "data.path=DATA"]
    for name in names:
        try:
            with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
                from_hydra(compose(name, overrides=given))
        except Exception as error:
            table.add(f"conf/{name}.yaml", "refused", " ".join(str(error).split()))
        else:
            table.add(f"conf/{name}.yaml", "composes")


def check_torchrun(table: Table) -> None:
    """Torchrun can hand on the signal that asks a run to save and end, and wait for that as entrypoint.sh sets it."""
    from torch.distributed.run import get_args_parser

    options = get_args_parser().format_help()
    for option in ("--signals-to-handle", "--shutdown-timeout"):
        known = option in options
        wrong = "" if known else "torch is too old; choose a base image with torch 2.12 or newer"
        table.add(f"torchrun {option}", "known" if known else "unknown", wrong)


def check_device(table: Table) -> None:
    """Which GPU is there, if any: the same check also serves on a node."""
    import torch

    there = torch.cuda.is_available()
    table.add("GPU", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if there else "none")


def main(arguments: list[str] | None = None) -> int:
    """Check, print, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="do without Transformer Engine and apex")
    parser.add_argument("--base", type=Path, help="base.json that keep_base.py wrote")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("nv_one_logger").setLevel(logging.ERROR)  # says at length that it is switched off
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    base = {normal(k): v for k, v in json.loads(options.base.read_text()).items()} if options.base else {}
    table = Table()
    right = sys.version_info >= (3, 12)
    table.add("Python", sys.version.split()[0], "" if right else "is too old; choose a base image with 3.12 or newer")
    check_versions(table, options.cpu, base)
    if not table.faults:  # imports take a while and would only say the same at greater length
        check_imports(table, options.cpu, base)
    if not table.faults:
        check_torchrun(table)
        check_configurations(table)
        check_device(table)
    print(table)
    for fault in table.faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if table.faults else 0


if __name__ == "__main__":
    sys.exit(main())
