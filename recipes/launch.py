"""Start training with NeMo-Run, on this machine or on a Slurm cluster; `make launch-env` makes the small environment.

.venv-launch/bin/python recipes/launch.py nproc=2 -- --config-name tiny parallel.tensor=2
.venv-launch/bin/python recipes/launch.py executor=slurm partition=h100 account=team time=04:00:00 \
    image=/images/vopd.sqsh -- --config-name train_72b data.path=/data/vision_opd_6k

Before `--` stands where to run, after it what recipes/train_vopd.py is given; both are checked before anything starts.
Neither torch nor Megatron is needed where this runs, so a cluster's login node will do.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this environment has NeMo-Run and not this package

from nemo_vopd.bounds import bounded  # noqa: E402
from nemo_vopd.cli import fail, run_recipe  # noqa: E402
from nemo_vopd.command_line import Command, read  # noqa: E402
from nemo_vopd.config import Config  # noqa: E402
from nemo_vopd.errors import OptionError, RunError  # noqa: E402
from nemo_vopd.validation import from_hydra, typed  # noqa: E402

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
POLL_SECONDS, LOST_AFTER = 3, 200


@dataclasses.dataclass
class LaunchConfig:
    """Where a run is started, and how."""

    executor: str = bounded("local", one_of=("local", "slurm"))
    """Place of the run: this machine by torchrun, or a cluster by Slurm, with one task for each GPU."""
    name: str | None = None
    """Name of the job after `vopd-`; null takes the name of the configuration."""
    python: str | None = None
    """Interpreter with torch; null takes `python` in an image and .venv/bin/python of this checkout without one."""
    folder: str = "runs/launch"
    """Folder of the scripts that NeMo-Run starts and of their logs; on a cluster, one that every node sees."""
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    """Environment of every process, `+env.NCCL_DEBUG=INFO`; slurm/environment.sh sets what is not set."""
    dry_run: bool = False
    """Print what would be started, start nothing."""
    nproc: int = bounded(1, at_least=1)
    """Number of processes with executor=local. The options below are for executor=slurm."""
    partition: str | None = None
    account: str | None = None
    time: str = "04:00:00"
    nodes: int | None = bounded(None, at_least=1)
    """Number of nodes, which replaces num_nodes of the training configuration; null keeps that."""
    gpus_per_node: int = bounded(8, at_least=0)
    """Number of GPUs and of tasks on each node; 0 for machines without GPUs."""
    tasks_per_node: int = bounded(1, at_least=1)
    """Number of tasks on each node with gpus_per_node=0."""
    cpus_per_task: int | None = bounded(None, at_least=1)
    mem: str | None = "0"
    """Memory of each node; 0 is all of it."""
    exclusive: bool = True
    """Whether nodes are not shared with other jobs."""
    signal: str = "USR1@600"
    """Signal and seconds before the end of `time`: enough for a step and a save, and less than `time` is."""
    retries: int = bounded(0, at_least=0)
    """Number of times that a job that failed or ended unfinished (time limit, signal) returns to the queue."""
    image: str | None = None
    """Container image for pyxis (a .sqsh file or a registry's name); null runs on the bare nodes."""
    mounts: list[str] = dataclasses.field(default_factory=list)
    """More folders for the container, /path or /path:/path/inside; code, model, data and results are there anyway."""
    sbatch: dict[str, Any] = dataclasses.field(default_factory=lambda: {"dependency": "singleton"})
    """More options of sbatch, `+sbatch.qos=night`. singleton: jobs of one name run one after the other."""
    detach: bool = True
    """Return once the job is submitted; false waits for its end and fails if it failed."""


ConfigStore.instance().store(name="nemo_vopd_launch", node=LaunchConfig)
COMMAND = Command(LaunchConfig, "launch")


def main(cfg: DictConfig, arguments: list[str]) -> None:
    """Check both halves of the command line, then start training with `arguments`, or say what would be started."""
    launch = typed(cfg, LaunchConfig)
    config_name, config = read_training(arguments)
    if launch.nodes is not None:
        config.num_nodes = launch.nodes
        arguments = [*arguments, f"num_nodes={launch.nodes}"]  # Hydra takes the last one
    check(launch, config)
    mounts = container_mounts(launch, config) if launch.image else []
    folder, name, identity = Path(launch.folder).absolute(), launch.name or config_name, f"vopd_{time.time_ns()}"
    os.environ["NEMORUN_HOME"] = str(folder)  # read when it is imported
    try:
        import nemo_run as run  # type: ignore[import-not-found]
    except ImportError as error:
        install = "`make launch-env` makes .venv-launch; start .venv-launch/bin/python recipes/launch.py"
        raise OptionError("python", sys.executable, f"has no NeMo-Run ({error})", install) from None
    home, local = folder / "experiments" / "vopd" / identity, launch.executor == "local"
    text = script(launch, config, arguments, home / "torchrun.pid")
    executor = run.LocalExecutor() if local else slurm_executor(run, launch, config, mounts, folder)
    quiet = {"clean_mode": True, "enable_goodbye_message": False, "skip_status_at_exit": True, "log_level": "WARNING"}
    with run.Experiment("vopd", id=identity, **quiet) as experiment:
        experiment.add(run.Script(inline=text), executor=executor, name=name, tail_logs=local)
        job = experiment.jobs[0]
        if launch.dry_run:
            experiment.dryrun(log=False, delete_exp_dir=False)
            if not local:
                print((home / f"{name}_sbatch.sh").read_text(), end="\n# what srun starts in each task\n")
            print(text)
            shutil.rmtree(home)
            return
        if local:
            pass_signals_on(home / "torchrun.pid")
            experiment.run()
        else:
            if launch.image:  # a folder must exist to be mounted
                Path(config.exp_manager["exp_dir"]).mkdir(parents=True, exist_ok=True)
            try:
                experiment.run(detach=True)
            except Exception as error:
                told = getattr(getattr(error, "result", None), "stderr", None) or str(error)
                raise RunError(f"sbatch refused the job: {' '.join(told.split())}") from None
    if not local:
        number = job.handle.rpartition("/")[2]
        log = home / name / f"log-vopd-{name}_{number}_0.out"
        print(f"submitted job {number}, vopd-{name}: {config.num_nodes} nodes x {tasks_per_node(launch)} tasks")
        print(f"  output  tail -F {log}    (_1, _2, ... after each return to the queue)")
        print(f"  state   squeue -j {number}    save and stop: scancel --signal=USR1 {number}    end: scancel {number}")
        if not launch.detach:
            wait(number, log)
    elif job.state.name != "SUCCEEDED":
        raise RunError(f"the run ended with an error ({job.state.name}); its output is in {home / name}")


def tasks_per_node(launch: LaunchConfig) -> int:
    """One for each GPU, as the training program wants it."""
    return launch.gpus_per_node or launch.tasks_per_node


def slurm_executor(run: Any, launch: LaunchConfig, config: Config, mounts: list[str], folder: Path) -> Any:
    """NeMo-Run's description of the job."""
    return run.SlurmExecutor(
        account=launch.account,
        partition=launch.partition,
        job_name_prefix="vopd-",
        time=launch.time,
        nodes=config.num_nodes,
        ntasks_per_node=tasks_per_node(launch),
        gpus_per_node=launch.gpus_per_node or None,
        cpus_per_task=launch.cpus_per_task,
        mem=launch.mem,
        exclusive=launch.exclusive or None,
        signal=launch.signal,
        retries=launch.retries,
        container_image=launch.image,
        container_mounts=mounts,
        additional_parameters=launch.sbatch,
        srun_args=[f"--cpus-per-task={launch.cpus_per_task}"] if launch.cpus_per_task else [],  # it inherits none
        # the batch shell must outlive a SIGTERM of preemption, or the ranks would be killed while they save
        setup_lines="trap : USR1 TERM",
        tunnel=run.LocalTunnel(job_dir=str(folder / "experiments")),
        packager=run.Packager(),  # nothing is copied: nodes read the checkout
        poll_estimated_start_time=False,
    )


def read_training(arguments: list[str]) -> tuple[str, Config]:
    """Name and validated configuration of a training command line. Raises what recipes/train_vopd.py would raise."""
    arguments, _ = read(arguments, Command(Config, None))
    flags = [argument for argument in arguments if argument.startswith("-")]
    name = flags.pop().partition("=")[2]
    if flags:
        raise OptionError(flags[0], ..., "cannot be passed on", "give --config-name NAME and option=value after --")
    sys.argv[1:] = arguments  # a mistake is explained with the words that were typed
    return name, from_hydra(hydra.compose(name, [a for a in arguments if not a.startswith("-")]))


def check(launch: LaunchConfig, config: Config) -> None:
    """Raise OptionError for what would fail only once the job has waited for its nodes."""
    if launch.name is not None and not re.fullmatch(r"[\w.-]+", launch.name):
        raise OptionError("name", launch.name, "must be letters, digits, '.', '_' and '-'", "set name=vision_opd")
    if launch.executor == "slurm" and not launch.dry_run and shutil.which("sbatch") is None:
        raise OptionError("executor", "slurm", "there is no sbatch here", "start it on a login node, or dry_run=true")
    num_processes = launch.nproc if launch.executor == "local" else config.num_nodes * tasks_per_node(launch)
    size = config.parallel.tensor * config.parallel.pipeline
    if num_processes % size:
        rule = f"times parallel.pipeline={config.parallel.pipeline} must divide the {num_processes} processes"
        remedy = "change nproc" if launch.executor == "local" else "change nodes, gpus_per_node or tasks_per_node"
        raise OptionError("parallel.tensor", config.parallel.tensor, rule, remedy)


def script(launch: LaunchConfig, config: Config, arguments: list[str], pid_file: Path) -> str:
    """What bash runs: once with executor=local, in every task with executor=slurm."""
    python = launch.python or ("python" if launch.image else str(ROOT / ".venv/bin/python"))
    training = shlex.join([str(ROOT / "recipes" / "train_vopd.py"), *arguments])
    lines = [f"export {name}={shlex.quote(value)}" for name, value in launch.env.items()]
    lines += [f". {shlex.quote(str(ROOT / 'slurm' / 'environment.sh'))}"]
    lines += [f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"]  # also in an image
    lines += [f"cd {shlex.quote(os.getcwd())} || exit 1"]  # relative paths mean what they mean here
    if launch.executor == "local":
        # not NeMo-Run's torchrun launcher: it takes the torchrun of its own environment, which has no torch
        torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {launch.nproc}"
        lines += [f"echo $$ > {shlex.quote(str(pid_file))}", f"exec {shlex.quote(python)} {torchrun} {training}"]
        return "\n".join(lines) + "\n"
    # Slurm signals this shell too: python saves meanwhile, and the shell must live to tell its exit code. USR1 is
    # ignored, which python inherits until it listens; TERM must still end a python that is loading
    lines += ["trap '' USR1", "trap : TERM", f"{shlex.quote(python)} {training}", "code=$?"]
    if launch.retries:  # NeMo-Run's batch script returns a job that failed to the queue
        finished = f"""grep -q '"finished": true' {shlex.quote(config.exp_manager["exp_dir"] + "/status.json")}"""
        lines += [f'if [ $code = 0 ] && [ "$SLURM_PROCID" = 0 ] && ! {finished}; then code=75; fi']
    return "\n".join([*lines, "exit $code"]) + "\n"


def container_mounts(launch: LaunchConfig, config: Config) -> list[str]:
    """Code, working directory, model, data and results at their own paths, then what the user adds."""
    mounted = list(dict.fromkeys([str(ROOT), os.getcwd()]))
    used = {"model.hf_path": config.model.hf_path, "data.path": config.data.path}
    used |= {"evaluation.path": config.evaluation.path, "rollout.path": config.rollout.path}
    for option, value in [*used.items(), ("exp_manager.exp_dir", config.exp_manager["exp_dir"])]:
        path = os.path.abspath(value) if value is not None else str(ROOT)
        if any(Path(path).is_relative_to(folder) for folder in mounted):
            continue
        if option in used and not os.path.exists(path):
            raise OptionError(option, value, "is not here and cannot be mounted", "give a path that all nodes see")
        # a blend names the data sets beside it
        mounted.append(os.path.dirname(path) if path.endswith(".yaml") else path)
    return [f"{path}:{path}" for path in mounted] + [m if ":" in m else f"{m}:{m}" for m in launch.mounts]


def pass_signals_on(pid_file: Path) -> None:
    """An interrupted launch ends its run in order: torchrun tells the ranks, which save, and then ends."""

    def handler(number: int, frame: object) -> None:
        if not pid_file.exists():
            raise KeyboardInterrupt
        os.kill(int(pid_file.read_text()), signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, handler)


def wait(job: str, log: Path) -> None:
    """Print each state of the `job` until it has ended; raise RunError unless it succeeded."""
    before, lost = "", 0
    while lost < LOST_AFTER:  # not NeMo-Run's wait: it cancels the job where Slurm keeps no accounting
        command = ["scontrol", "show", "job", "--oneliner", job]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        found = re.search(r"JobState=(\w+)", done.stdout)
        lost = 0 if found else lost + 1
        state = found.group(1) if found else before
        if state != before:
            print(f"job {job}: {state}", flush=True)
        elif found and state in ENDED:  # twice: a job that returns to the queue passes through these
            if state != "COMPLETED":
                raise RunError(f"job {job} ended as {state}; its output is in {log}")
            return
        before = state
        time.sleep(POLL_SECONDS)
    raise RunError(f"scontrol has not known job {job} for {LOST_AFTER * POLL_SECONDS} seconds; its output is in {log}")


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    training, sys.argv = sys.argv[split + 1 :], sys.argv[:split]
    for word in sys.argv[1:]:
        if word.startswith(("--config-name", "-cn")):  # Hydra would take it for this recipe's own
            fail(str(OptionError(word, "", "is an option of the training run", "write it after --")))
    run_recipe(lambda cfg: main(cfg, training), COMMAND)
