"""recipes/launch.py with NeMo-Run's own environment: on this machine and on the pretended cluster."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import HANG
from tests.helpers import read_lines

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("NEMO_VOPD_LAUNCH_PYTHON", ROOT / ".venv-launch" / "bin" / "python"))
TWO_NODES = ["executor=slurm", "nodes=2", "gpus_per_node=0", "exclusive=false", "mem=1000"]


@pytest.fixture
def launch(assets, tmp_path):
    """Starts the recipe with options and training arguments; NeMo-Run's files and the run's go to `tmp_path`."""
    if not PYTHON.exists():
        pytest.skip(f"there is no {PYTHON}: NeMo-Run has an environment of its own, make launch-env makes it")

    def start(options, training=(), env=None) -> subprocess.Popen:
        own = [f"folder={tmp_path}/launch", f"python={sys.executable}", *options]
        training = ["--config-name", "tiny", f"exp_manager.exp_dir={tmp_path}/run", *training]
        command = [str(PYTHON), str(ROOT / "recipes" / "launch.py"), *own, "--", *training]
        environment = {**(env or os.environ), "NEMO_VOPD_TINY": str(assets), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)

    return start


def finish(process: subprocess.Popen, timeout: float = HANG) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    return process.returncode, output


def test_local_processes_train_and_an_error_is_told(launch, tmp_path):
    code, output = finish(launch(["nproc=2"], ["parallel.tensor=2", "trainer.max_steps=2"]))
    assert code == 0, output[-3000:]
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["finished"] is True
    assert "layout: tensor 2" in output
    code, output = finish(launch([], ["model.hf_path=/nowhere/model"]))
    assert code == 1 and "error: the run ended with an error (FAILED)" in output, output[-3000:]
    assert "model.hf_path=/nowhere/model: does not exist" in output


def test_an_interrupted_launch_ends_its_run_in_order(launch, tmp_path):
    process = launch([], ["trainer.max_steps=100000"])
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.1)
    process.terminate()
    finish(process, 60)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["reason"] == "SIGTERM"


def test_slurm_job_saves_on_a_signal_returns_to_the_queue_and_finishes(launch, cluster, tmp_path):
    options = [*TWO_NODES, "cpus_per_task=2", "retries=1", "detach=false", "time=00:30:00"]
    process = launch(options, ["trainer.max_steps=60"], env=cluster.environment())
    metrics, status = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "status.json"
    cluster.until(lambda: process.poll() is not None or (metrics.exists() and len(read_lines(metrics)) >= 2))
    assert process.poll() is None, process.communicate()[0][-3000:]
    (job,) = cluster.command("squeue", "-h", "-o", "%i").split()
    cluster.command("scancel", "--signal=USR1", job)
    cluster.until(lambda: json.loads(status.read_text())["reason"] == "SIGUSR1")
    fields = cluster.job(int(job))
    assert fields["NumNodes"] == "2" and fields["NumTasks"] == "2" and fields["JobName"] == "vopd-tiny"
    code, output = finish(process)
    assert code == 0 and f"job {job}: COMPLETED" in output and f"submitted job {job}" in output, output
    assert cluster.job(int(job))["Restarts"] == "1"
    assert [line["step"] for line in read_lines(metrics)] == list(range(60))
    assert json.loads(status.read_text())["finished"] is True
    logs = sorted((tmp_path / "launch").rglob(f"log-vopd-tiny_{job}_*.out"))
    assert [log.name[-6:] for log in logs] == ["_0.out", "_1.out"] and str(logs[0]) in output
    assert "layout: tensor 1, pipeline 1, data 2" in logs[0].read_text()
    assert "resuming after step" in logs[1].read_text()


def test_slurm_jobs_that_fail_or_are_refused_are_told(launch, cluster):
    one = ["nodes=1", "detach=false"]  # two ranks: the silent one may end the job before rank 0 has spoken
    code, output = finish(launch([*TWO_NODES, *one], ["model.hf_path=/nowhere/model"], env=cluster.environment()))
    assert code == 1 and re.search(r"error: job \d+ ended as FAILED; its output is in \S+_0.out\n", output), output
    (log,) = re.findall(r"its output is in (\S+)", output)
    assert "model.hf_path=/nowhere/model: does not exist" in Path(log).read_text()
    code, output = finish(launch([*TWO_NODES, "partition=none"], env=cluster.environment()))
    assert code == 1 and "error: sbatch refused the job: " in output and "invalid partition" in output, output
    assert "Traceback" not in output


def test_dry_run_prints_the_job_and_submits_nothing(launch, cluster, tmp_path):
    options = ["executor=slurm", "dry_run=true", "image=/images/vopd.sqsh", "mounts=[/scratch]", "account=team"]
    options += ["+sbatch.qos=night", "+env.NCCL_DEBUG=INFO"]
    training = ["--config-name=train_72b", f"data.path={tmp_path}", f"model.hf_path={ROOT}/model"]
    code, output = finish(launch(options, training, env=cluster.environment()))
    assert code == 0, output
    for flag in ("nodes=8", "ntasks-per-node=8", "gpus-per-node=8", "signal=USR1@600", "open-mode=append", "mem=0"):
        assert f"#SBATCH --{flag}\n" in output, flag
    for flag in ("exclusive", "account=team", "qos=night", "dependency=singleton", "time=04:00:00"):
        assert f"#SBATCH --{flag}\n" in output, flag
    mounts = re.search(r"--container-mounts (\S+)", output)
    assert "--container-image /images/vopd.sqsh" in output and mounts
    folders = [str(ROOT), str(tmp_path)]
    assert mounts.group(1).split(",")[:3] == [f"{folder}:{folder}" for folder in folders] + ["/scratch:/scratch"]
    assert "export NCCL_DEBUG=INFO\n" in output and "num_nodes" not in output
    assert "/slurm/environment.sh\n" in output and "\npython " in output.replace(str(sys.executable), "python")
    assert not cluster.command("squeue", "-h").strip() and not list((tmp_path / "launch").rglob("*.sh"))


MISTAKES = {
    "executr=slurm": "executr=slurm: no such option",
    "executor=cloud": "executor=cloud: must be one of local, slurm; set executor=local",
    "executor=slurm -- --config-name tiny": "executor=slurm: there is no sbatch here; start it on a login node",
    "nproc=0": "nproc=0: must be at least 1; set nproc=1 or more",
    "name=a/b -- --config-name tiny": "name=a/b: must be letters",
    "--config-name=train": "is an option of the training run; write it after --",
    "nproc=3 -- --config-name tiny parallel.tensor=2": "parallel.tensor=2: times parallel.pipeline=1 must divide",
    "-- --config-name tiny rollout.nn=3": "rollout.nn=3: no such option",
    "-- --config-name tiny --multirun": "--multirun: starts several runs in one process",
    "-- --config-name tiny --resolve": "--resolve: cannot be passed on; give --config-name NAME and",
    "-- trainer.max_steps=1": "--config-name: says which configuration to use, and none was given",
    "-- --config-name tiny rollout.n=-1": "rollout.n=-1: must be at least 1; set rollout.n=1 or more",
    "-- --config-name": "--config-name=?: is no configuration of this command",
    "executor=slurm dry_run=true image=i -- --config-name train_7b data.path=/nowhere/d model.hf_path=/nowhere/m": (
        "model.hf_path=/nowhere/m: is not here and cannot be mounted; give a path that all nodes see"
    ),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_ends_with_one_line_and_code_2(words, launch, tmp_path):
    command = [str(PYTHON), str(ROOT / "recipes" / "launch.py"), f"folder={tmp_path}", *words.split()]
    environment = {**os.environ, "PATH": str(tmp_path)}  # no sbatch there
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG)
    errors = done.stderr.splitlines()
    assert done.returncode == 2 and len(errors) == 1 and MISTAKES[words] in errors[0], done.stderr


def test_without_nemo_run_one_line_says_how_to_get_it(launch):
    command = [sys.executable, str(ROOT / "recipes" / "launch.py"), "--", "--config-name", "tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "has no NeMo-Run" in done.stderr and "make launch-env" in done.stderr
