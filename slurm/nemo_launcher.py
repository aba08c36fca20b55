"""Start a run through NVIDIA's NeMo-Framework-Launcher, whose checkout stays as it is.

NEMO_LAUNCHER=/path/to/NeMo-Framework-Launcher python slurm/nemo_launcher.py training=vopd/72b \
    base_results_dir=/lustre/results container=/lustre/vopd.sqsh container_mounts=[/lustre/models,/lustre/data] \
    training.model.hf_path=/lustre/models/Qwen2.5-VL-72B-Instruct training.data.path=/lustre/data/vision_opd_6k

Every option of the launcher is accepted (cluster.partition, cluster.account, env_vars.NCCL_DEBUG, ...), and every
option of the recipe as training.OPTION; the runs are in conf/launcher/training/vopd. A wrong option of the recipe is
told now, not when the job starts. The same command again continues a run that its time limit ended; container=null uses
the Python of the nodes (training.run.python); NEMO_LAUNCHER_DEBUG=1 writes the batch script and submits nothing.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
CONF = REPOSITORY / "conf"
sys.path.insert(0, str(REPOSITORY))  # the launcher's Python need not have this project installed

from nemo_vopd.errors import OptionError  # noqa: E402

PACKAGES = "hydra-core hera kubeflow-training kubernetes requests tqdm zstandard"
"""What the launcher imports to write a Slurm script, the Kubernetes packages included."""

LAUNCHER_ONLY = ("num_nodes", "devices", "accelerator")
"""Keys of `trainer` that describe the job; Lightning's trainer learns them from the processes it finds."""


class RecipeStage:
    """What replaces NeMo's own scripts and folders in the launcher's `Training` stage, which comes next in line."""

    cfg: Any
    stage_cfg: Any

    def __init__(self, cfg: Any) -> None:
        """Read `training`, and refuse now what would be refused after hours in the queue."""
        super().__init__(cfg)  # type: ignore[call-arg]
        try:
            check_job(cfg)
            self.options = recipe_options(self.stage_cfg)
            check_options(self.stage_cfg, self.options)
        except OptionError as error:
            refuse(error)  # here: Hydra, which called, would print a traceback

    def make_stage_command_groups(self, stage_cfg_path: Path) -> list[list[str]]:
        """One group of commands, which the launcher joins with semicolons and puts into `bash -c "..."`."""
        run, repository = self.stage_cfg.run, shlex.quote(str(REPOSITORY))
        recipe = [run.get("python") or "python3", "-u", str(REPOSITORY / run.script), "--config-name", run.config_name]
        commands = [
            f"cd {repository}",
            f"export PYTHONPATH={repository}${{PYTHONPATH:+:$PYTHONPATH}}",
            f". {repository}/slurm/environment.sh",
            # Slurm signals this bash as it does Python, and a bash that dies of it ends the task before Python has
            # saved: exec leaves no bash behind, trap keeps a signal harmless that comes before Python listens
            "trap '' USR1",
        ]
        words = [in_double_quotes(word) for word in (f"exec {shlex.join(recipe)}", *map(shlex.quote, self.options))]
        login = self._make_wandb_login_command()  # type: ignore[attr-defined]
        return [[*filter(None, login), *map(in_double_quotes, commands), " \\\n    ".join(words)]]

    def _make_container_mounts_string(self) -> str:
        mounts = super()._make_container_mounts_string()  # type: ignore[misc]
        return f"{mounts},{REPOSITORY}:{REPOSITORY}" if self.cfg.get("container") else ""

    def _make_cluster_parameters(self, cluster: str) -> dict[str, Any]:
        parameters = super()._make_cluster_parameters(cluster)  # type: ignore[misc]
        if self.stage_cfg.trainer.get("accelerator") == "cpu":
            parameters["gpus_per_node"] = None
        if signal := self.stage_cfg.run.get("signal"):
            parameters["signal"] = signal  # not on the launcher's list: it warns, and hands it to sbatch all the same
        # srun does not take cores from the job since Slurm 22.05: a rank and its loaders would share one
        cores = "export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / SLURM_NTASKS_PER_NODE))}"
        parameters["setup"] = [*(parameters["setup"] or []), cores]
        # one rank's failure ends all: the others would sit in a collective until it times out
        arguments = ["--kill-on-bad-exit=1", *(parameters.get("srun_args") or [])]
        if not self.cfg.get("container"):  # a Slurm without pyxis does not know its options
            arguments = [a for a in arguments if not re.match("--(no-)?container", a)]
        parameters["srun_args"] = arguments
        return parameters


def check_job(cfg: Any) -> None:
    """Raise OptionError when the launcher's `cfg` describes no job that can run this recipe."""
    run, image = cfg.training.run, cfg.get("container") or ""
    if cfg.cluster_type != "bcm":
        rule = "this recipe is started by Slurm only"
        raise OptionError("cluster_type", cfg.cluster_type, rule, "set cluster_type=bcm and cluster=bcm")
    if "script" not in run:
        runs = ", ".join(sorted(f"vopd/{file.stem}" for file in (CONF / "launcher/training/vopd").glob("*.yaml")))
        raise OptionError("training", cfg.training_config, "names no script of this project", f"choose one of {runs}")
    if re.match(r"nvcr\.io[/#]nvidia/nemo:2[34]\.", image):  # the launcher's default
        rule = "is older than the packages this recipe needs (pyproject.toml)"
        raise OptionError("container", image, rule, "give container=IMAGE with them, or container=null")
    if not os.path.isabs(run.results_dir):
        rule = "is relative, and the job runs in another folder"
        raise OptionError("training.run.results_dir", run.results_dir, rule, "give base_results_dir=/FOLDER")


def recipe_options(stage: Any) -> list[str]:
    """KEY=VALUE in Hydra's grammar for all that the launcher's config `stage` says to the recipe."""
    from omegaconf import OmegaConf

    settings: Any = OmegaConf.to_container(stage, resolve=True)
    trainer = {key: value for key, value in settings["trainer"].items() if key not in LAUNCHER_ONLY}
    settings = {"num_nodes": settings["trainer"]["num_nodes"], **settings, "trainer": trainer}
    del settings["run"]
    options = [f"{key}={hydra_value(value)}" for key, value in _leaves(settings)]
    # exp_manager's options are NeMo's, and only some have a value in conf/: ++ adds the others
    return [f"++{option}" if option.startswith("exp_manager.") else option for option in options]


def _leaves(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in settings.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found


def hydra_value(value: Any) -> str:
    """`value` as Hydra's command line spells it: `null`, `[1,2]`, and text in quotes wherever it needs them."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(hydra_value, value))}]"
    if not isinstance(value, str) or re.fullmatch(r"(?!(null|true|false|nan|inf)$)[A-Za-z_/][\w./-]*", value, re.I):
        return str(value)
    # between Hydra's quotes a backslash stands for itself, unless a quote follows
    return "'" + re.sub(r"(\\+)$", r"\1\1", re.sub(r"(\\*)'", r"\1\1\\'", value)) + "'"


def in_double_quotes(command: str) -> str:
    """`command` so that it is itself again after the shell has read it between double quotes."""
    return re.sub(r'([\\"$`])', r"\\\1", command)


def check_options(stage: Any, options: list[str]) -> None:
    """Raise OptionError when the recipe would refuse `options`, or its layout does not fit the job's size."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from nemo_vopd.validation import from_hydra

    GlobalHydra.instance().clear()  # there can be only one, and the launcher's has composed all it will
    try:
        with initialize_config_dir(str(CONF), version_base="1.2"):
            config = from_hydra(compose(stage.run.config_name, options))
    except (HydraException, OmegaConfBaseException) as error:
        text = " ".join(f"{error} {error.__cause__ or ''}".split())
        named = re.search(r"(?:override '|full_key: |Could not find ')([\w.]+)", text)
        key = named.group(1) if named else "run.config_name"
        given = {"run.config_name": stage.run.config_name, **dict(o.lstrip("+").split("=", 1) for o in options)}
        reason = re.split(" full_key:| Config search path:", " ".join(str(error.__cause__ or error).split()))[0]
        remedy = "see conf/ and nemo_vopd/config.py"
        raise OptionError(f"training.{key}", given.get(key, "?"), reason.rstrip("."), remedy) from None
    nodes, devices = stage.trainer.num_nodes, stage.trainer.devices
    size = config.parallel.tensor * config.parallel.pipeline
    if nodes * devices % size:
        rule = f"times trainer.devices={devices} is no multiple of parallel.tensor * parallel.pipeline, {size}"
        raise OptionError("training.trainer.num_nodes", nodes, rule, "change one of them")


def refuse(error: OptionError) -> None:
    """End with the one line of a user's mistake and exit code 2."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def find_launcher(path: str | None) -> Path:
    """The checkout's launcher_scripts folder, `path` being that or the checkout. Raises OptionError."""
    for folder in (Path(path or "?") / "launcher_scripts", Path(path or "?")):
        if (folder / "main.py").is_file() and (folder / "nemo_launcher/core/stages.py").is_file():
            return folder.resolve()
    rule = "is no checkout of NeMo-Framework-Launcher" if path else "is not set"
    raise OptionError("NEMO_LAUNCHER", path or "", rule, "set this environment variable to the folder of a checkout")


def launcher_arguments(arguments: list[str], scripts: Path) -> list[str]:
    """What is the same for every run, unless given, and the user's `arguments`."""
    given = {argument.lstrip("+").split("=")[0] for argument in arguments}
    folder = [] if given & {"--config-dir", "-cd"} else ["--config-dir", str(CONF / "launcher")]
    same = {"launcher_scripts_path": hydra_value(str(scripts)), "stages": "[training]"}
    # ++: an option of the recipe may be given whether or not the stage's YAML has it
    typed = [re.sub(r"^training\.", "++training.", argument) for argument in arguments]
    return [*folder, *(f"{key}={value}" for key, value in same.items() if key not in given), *typed]


def main() -> None:
    """Run the launcher's main.py with its `Training` stage replaced."""
    try:
        scripts = find_launcher(os.environ.get("NEMO_LAUNCHER"))
        sys.path.insert(0, str(scripts))  # before the folder of this file, which has the package's name
        sys.argv = [str(scripts / "main.py"), *launcher_arguments(sys.argv[1:], scripts)]
        try:
            from nemo_launcher.core import stages  # type: ignore[import-not-found]

            stages.Training = type("Training", (RecipeStage, stages.Training), {})  # main.py imports this name
            runpy.run_path(sys.argv[0], run_name="__main__")
        except ModuleNotFoundError as error:
            rule = f"has no package {error.name}, which the launcher imports"
            raise OptionError("python", sys.executable, rule, f"install in it, or in another: {PACKAGES}") from None
    except OptionError as error:
        refuse(error)


if __name__ == "__main__":
    main()
