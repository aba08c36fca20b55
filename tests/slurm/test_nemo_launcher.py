"""slurm/nemo_launcher.py with a checkout of NeMo-Framework-Launcher that NEMO_LAUNCHER names."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import nemo_vopd.config  # noqa: F401  (Hydra finds its schema there)
from slurm.nemo_launcher import hydra_value, in_double_quotes, recipe_options
from tests.distributed import HANG

pytestmark = pytest.mark.slurm

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = REPOSITORY / "slurm/nemo_launcher.py"
STAGES = {file.stem: file for file in (REPOSITORY / "conf/launcher/training/vopd").glob("*.yaml")}
PYTHON = os.environ.get("NEMO_LAUNCHER_PYTHON", sys.executable)
"""The launcher needs packages this project does not."""

DRY = {"NEMO_LAUNCHER_DEBUG": "1"}  # write the script, submit nothing

# stands for srun, and for the Python of the nodes: writes down how it was called
RECORDER = f"""#!{sys.executable}
import json, os, signal, sys
name = os.path.basename(sys.argv[0])
ignored = signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
record = dict(arguments=sys.argv[1:], environment=dict(os.environ), cwd=os.getcwd(), pid=os.getpid(), ignored=ignored)
json.dump(record, open(os.path.join(os.environ["RECORDS"], name + ".json"), "w"))
if name == "srun":
    os.execvp("bash", sys.argv[sys.argv.index("bash"):])
"""


def run(*arguments, **environment):
    """The program's process, ended."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "NEMO_LAUNCHER"))}
    return subprocess.run(
        [PYTHON, str(PROGRAM), *arguments], env={**kept, **environment}, capture_output=True, text=True, timeout=HANG
    )


@pytest.fixture(scope="session")
def checkout():
    """The path that NEMO_LAUNCHER gives; skips without it, or without the launcher's packages."""
    path = os.environ.get("NEMO_LAUNCHER")
    if not path:
        pytest.skip("NEMO_LAUNCHER names no checkout of NeMo-Framework-Launcher")
    packages = "hera.workflows, kubeflow.training, kubernetes, zstandard"
    probe = subprocess.run([PYTHON, "-c", f"import {packages}"], capture_output=True, text=True, timeout=HANG)
    if probe.returncode:
        pytest.skip(f"{PYTHON}: {probe.stderr.splitlines()[-1]}; NEMO_LAUNCHER_PYTHON can name another Python")
    return path


@pytest.fixture
def write_script(checkout, tmp_path):
    """A function that returns the sbatch options of a run and its batch script."""

    def write(name, *arguments):
        done = run(f"training=vopd/{name}", f"base_results_dir={tmp_path}", *arguments, **DRY, NEMO_LAUNCHER=checkout)
        assert done.returncode == 0, done.stdout + done.stderr
        file = tmp_path / f"vopd_{name}/nemo-megatron-vopd_{name}_submission.sh"
        options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", file.read_text(), re.M))
        return options, file

    return write


def execute(script, folder, **environment):
    """What srun and the recipe's Python are called with when bash runs `script`."""
    for name in ("srun", "python3"):
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(RECORDER)
        program.chmod(0o755)
    variables = {**os.environ, "RECORDS": str(folder), "PATH": f"{folder}/bin:{os.environ['PATH']}", **environment}
    subprocess.run(["bash", str(script)], env=variables, check=True, timeout=HANG)
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("srun", "python3")]


def composed(arguments):
    """The recipe's configuration from its command line."""
    assert arguments[:3] == ["-u", str(REPOSITORY / "recipes/train_vopd.py"), "--config-name"]
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        return compose(arguments[3], arguments[4:])


def srun_options(arguments):
    """Options before `bash -c`, with their values."""
    words = iter(arguments[: arguments.index("bash")])
    return {word: next(words) if word.startswith(("--container", "--output", "--error")) else None for word in words}


SIZES = {"tiny": (2, 2, None), "7b": (1, 8, 8), "72b": (8, 8, 8)}


@pytest.mark.parametrize("name", SIZES)
def test_the_batch_script_starts_the_recipe(write_script, checkout, tmp_path, name):
    options, file = write_script(
        name,
        "container=/images/vopd.sqsh",
        "container_mounts=[/models]",
        "cluster.account=vision",
        r"""training.model.hf_path='/models/a "b" $HOME `id` it\'s'""",
        "training.optimizer.lr=1e-6",  # not among the keys of the YAML
        "training.exp_manager.wandb_logger_kwargs.name=first",  # nor of the recipe's defaults
    )
    nodes, tasks, gpus = SIZES[name]
    assert (int(options["nodes"]), int(options["ntasks-per-node"])) == (nodes, tasks)
    assert options.get("gpus-per-node") == (None if gpus is None else str(gpus))
    assert options["dependency"] == "singleton" and re.fullmatch(r"USR1@\d+", options["signal"])
    assert options["account"] == "vision" and "time" in options

    srun, python = execute(file, tmp_path, SLURM_CPUS_ON_NODE="96", SLURM_NTASKS_PER_NODE=str(tasks))
    given = srun_options(srun["arguments"])
    assert given["--container-image"] == "/images/vopd.sqsh"
    assert {"/models:/models", f"{REPOSITORY}:{REPOSITORY}"} <= set(given["--container-mounts"].split(","))
    assert "--kill-on-bad-exit=1" in given and "--no-container-mount-home" in given
    assert srun["environment"]["SRUN_CPUS_PER_TASK"] == str(96 // tasks)

    assert python["cwd"] == str(REPOSITORY) and python["environment"]["PYTHONPATH"].split(":")[0] == str(REPOSITORY)
    assert python["environment"]["HF_HUB_OFFLINE"]  # slurm/environment.sh was read
    assert python["pid"] == srun["pid"] and python["ignored"]  # no bash is left that SIGUSR1 could kill
    config = composed(python["arguments"])
    assert python["arguments"][3] == OmegaConf.load(STAGES[name]).run.config_name
    assert config.num_nodes == nodes
    assert config.model.hf_path == """/models/a "b" $HOME `id` it's"""
    assert config.optimizer.lr == 1e-6
    assert config.exp_manager.exp_dir == str(tmp_path / f"vopd_{name}/results")
    assert config.exp_manager.wandb_logger_kwargs.name == "first"


def test_without_a_container_srun_gets_no_option_of_pyxis(write_script, tmp_path):
    _, file = write_script("tiny", "container=null", "training.run.python=python3")
    srun, _ = execute(file, tmp_path, SLURM_CPUS_ON_NODE="16", SLURM_NTASKS_PER_NODE="2")
    assert not [word for word in srun_options(srun["arguments"]) if "container" in word]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training=vopd/tiny", "training.trainer.max_stepz=3"], "training.trainer.max_stepz=3: "),
        (["training=vopd/tiny", "training.rollout.n=0"], "rollout.n=0: "),
        (["training=vopd/tiny", "training.rollout=none"], "training.rollout=none: "),
        (["training=vopd/72b", "training.trainer.num_nodes=3"], "training.trainer.num_nodes=3: "),
        (["training=vopd/tiny", "training.run.results_dir=here"], "training.run.results_dir=here: "),
        (["training=vopd/tiny", "container=nvcr.io/nvidia/nemo:24.09"], "container=nvcr.io/nvidia/nemo:24.09: "),
        (["training=gpt3/5b"], "training=gpt3/5b: "),
    ],
)
def test_mistakes_are_told_before_anything_is_written(checkout, tmp_path, arguments, message):
    done = run("container=null", f"base_results_dir={tmp_path}/new", *arguments, **DRY, NEMO_LAUNCHER=checkout)
    assert_one_line(done, message)
    assert not (tmp_path / "new").exists()


def assert_one_line(done, message):
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.fullmatch(rf"error: {re.escape(message)}[^\n]*; [^\n]+\n", done.stderr), done.stderr


def test_without_a_checkout(tmp_path):
    assert_one_line(run("training=vopd/tiny"), "NEMO_LAUNCHER=: is not set")
    assert_one_line(run("training=vopd/tiny", NEMO_LAUNCHER=str(tmp_path)), f"NEMO_LAUNCHER={tmp_path}: is no checkout")


def test_without_the_packages_of_the_launcher(tmp_path):
    package = tmp_path / "launcher_scripts/nemo_launcher/core"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "stages.py").write_text("import a_package_that_nobody_has\n")
    (tmp_path / "launcher_scripts/main.py").touch()
    done = run("training=vopd/tiny", NEMO_LAUNCHER=str(tmp_path))
    assert_one_line(done, f"python={PYTHON}: has no package a_package_that_nobody_has")


def test_a_run_through_slurm_saves_at_a_signal_and_resumes(checkout, cluster, assets, tmp_path):
    arguments = [
        "training=vopd/tiny",
        "container=null",
        f"training.run.python={sys.executable}",
        f"base_results_dir={tmp_path}",
        f"training.model.hf_path={assets}/tiny-vlm",
        f"training.data.path={assets}/tiny-digits",
    ]
    environment = {**cluster.environment(), "NEMO_LAUNCHER": checkout}
    results = tmp_path / "vopd_tiny/results"

    def submit(max_steps):
        done = run(*arguments, f"training.trainer.max_steps={max_steps}", **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return int((tmp_path / "vopd_tiny/launcher.log").read_text().split()[-1])

    def finish(job):
        fields = cluster.wait(job)
        assert fields["JobState"] == "COMPLETED", "".join(f.read_text() for f in tmp_path.glob("vopd_tiny/log-*"))
        return json.loads((results / "status.json").read_text())

    def steps():
        file = results / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return len([line for line in lines if line.endswith("\n")])

    interrupted = submit(max_steps=10_000)
    cluster.until(lambda: steps() > 1)
    cluster.command("scancel", "--signal=USR1", str(interrupted))  # what --signal=USR1@... does: steps, not the script
    status = finish(interrupted)
    assert (status["finished"], status["reason"]) == (False, "SIGUSR1")

    last = status["step"] + 2
    job = submit(max_steps=last)
    status = finish(job)
    assert status["finished"] and status["step"] == steps() == last
    output = (tmp_path / f"vopd_tiny/log-nemo-megatron-vopd_tiny_{job}.out").read_text()
    assert "tensor 2, pipeline 1, data 2" in output and f"resuming after step {last - 2}" in output, output


@pytest.mark.parametrize("name", STAGES)
def test_the_yaml_says_what_its_recipe_does_not(name):
    cfg = OmegaConf.create({"base_results_dir": "/results", "training": OmegaConf.load(STAGES[name])})
    run_options, trainer = cfg.training.run, cfg.training.trainer
    options = recipe_options(cfg.training)
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        base, config = compose(run_options.config_name), compose(run_options.config_name, options)
    if name != "tiny":  # whose conf/ is for one process
        assert (trainer.num_nodes, trainer.devices) == (base.num_nodes, 8)  # 8 GPUs a node, their first comment says
        options.remove(f"num_nodes={base.num_nodes}")
    keys = [option.lstrip("+").split("=")[0] for option in options]
    assert all(OmegaConf.select(base, key) != OmegaConf.select(config, key) for key in keys)
    assert trainer.num_nodes * trainer.devices % (config.parallel.tensor * config.parallel.pipeline) == 0
    assert (REPOSITORY / run_options.script).is_file()
    assert run_options.dependency == "singleton" and run_options.results_dir == f"/results/{run_options.name}"


TEXTS = ["", "plain/path-1.0", "a b", "it's", 'say "x"', r"\'", "\\", "$HOME `id`", "null", "12", "00:03:45:00"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_hydra_and_both_shells(text):
    option = f"key={hydra_value(text)}"
    assert OverridesParser.create().parse_override(option).value() == text
    quoted = in_double_quotes("printf %s " + shlex.quote(option))
    done = subprocess.run(["bash", "-c", f'bash -c "{quoted}"'], capture_output=True, text=True, timeout=HANG)
    assert done.stdout == option
