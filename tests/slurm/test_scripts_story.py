"""What slurm/train_*.sh do around the ranks, which are told what to do here (fake_python.sh): quick to run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import HANG, ROOT

pytestmark = pytest.mark.slurm
FAKE = str(Path(__file__).with_name("fake_python.sh"))
SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("train_*.sh"))


@pytest.fixture
def submit(cluster, tmp_path):
    """`submit(script, *arguments, train=...)`: job id; records are in tmp_path/record."""
    for name in ("record", "model", "data"):
        (tmp_path / name).mkdir()

    def start(script: str, *arguments: str, train: str, options: tuple = (), **variables: str) -> int:
        given = {"PYTHON": FAKE, "REAL_PYTHON": sys.executable, "TRAIN": train, "RECORD": str(tmp_path / "record")}
        given |= {"RESULTS": str(tmp_path / "run"), "MODEL": str(tmp_path / "model"), "DATA": str(tmp_path / "data")}
        given |= {"HEALTH_CHECK": "0", "MIN_FREE_GIB": "0.01", **variables}
        return cluster.submit(f"--output={tmp_path}/%j.out", *options, script, *arguments, cwd=ROOT, **given)

    return start


def test_scripts_are_clean():
    assert SCRIPTS == ["train_32b.sh", "train_72b.sh", "train_7b.sh", "train_tiny.sh"]
    done = subprocess.run(
        ["shellcheck", "--external-sources", *map(str, sorted((ROOT / "slurm").glob("*.sh")))],
        capture_output=True, text=True, timeout=HANG, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_72b_reaches_its_srun_line(cluster, submit, tmp_path):
    image = "/images/nemo_vopd.sqsh"
    job = submit(
        "slurm/train_72b.sh", "trainer.max_steps=4", "data.question_hint='look, closely'", train="finish",
        IMAGE=image, MOUNTS="/scratch:/scratch", SBATCH_TIMELIMIT="00:20:00", SBATCH_PARTITION="main",
        NCCL_IB_TIMEOUT="23",
    )  # fmt: skip
    fields = cluster.wait(job)
    assert fields["JobState"] == "COMPLETED", cluster.output(job)
    assert fields["TimeLimit"] == "00:20:00" and fields["NumNodes"] == "8"
    assert fields["TresPerNode"].endswith("gpu:8")
    ranks = {}
    for file in (tmp_path / "record").glob("environment-*"):
        lines = [line.partition("=") for line in file.read_text().splitlines()]
        environment = {name: value for name, _, value in lines}
        ranks[int(environment["SLURM_PROCID"])] = environment
    assert sorted(ranks) == list(range(64))
    assert {env["SLURM_LOCALID"] for env in ranks.values()} == {str(i) for i in range(8)}
    for rank, env in ranks.items():
        assert rank == 8 * int(env["SLURM_NODEID"]) + int(env["SLURM_LOCALID"])
    for environment in ranks.values():
        assert environment["SLURM_STEP_NUM_TASKS"] == "64" and environment["SLURM_CPUS_PER_TASK"] == "2"
        assert environment["MASTER_ADDR"] == "vopd1" and environment["MASTER_PORT"] == str(20000 + job % 10000)
        assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "1" and environment["HF_HUB_OFFLINE"] == "1"
        assert environment["NCCL_IB_TIMEOUT"] == "23"  # the user's value stays
        assert environment["PYTHONPATH"].split(":")[0] == f"{tmp_path}/run/slurm/{job}/code"
        assert environment["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"  # each rank takes its own by its local rank
    assert (tmp_path / "record/arguments-63").read_text().splitlines() == [
        f"{tmp_path}/run/slurm/{job}/code/recipes/train_vopd.py", "--config-name", "train_72b", "num_nodes=8",
        f"exp_manager.exp_dir={tmp_path}/run", f"model.hf_path={tmp_path}/model", f"data.path={tmp_path}/data",
        "trainer.max_steps=4", "data.question_hint='look, closely'",
    ]  # fmt: skip
    asked = dict(line.split("=", 1) for line in cluster.container_options.read_text().splitlines())
    assert asked["container-image"] == image and asked["container-workdir"] == str(ROOT)
    assert asked["container-mounts"].split(",") == [
        *[f"{path}:{path}" for path in (ROOT, tmp_path / "run", tmp_path / "model", tmp_path / "data")],
        "/scratch:/scratch",
    ]
    assert "no-container-mount-home" in asked


def test_dry_run_in_a_job_runs_nothing(cluster, submit, tmp_path):
    job = submit("slurm/train_7b.sh", train="crash", PYTHON=sys.executable, DRY_RUN="1")
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    output = cluster.output(job)
    assert "8 x H100 80GB SXM: tensor 4 + sequence, pipeline 1, data 2" in output
    assert f"exp_dir: {tmp_path}/run" in output
    assert "srun --nodes=1 --ntasks=8 --ntasks-per-node=8 --cpus-per-task=2" in output
    assert not (tmp_path / "run").exists()


def test_crashes_are_bounded(cluster, submit, tmp_path):
    job = submit("slurm/train_tiny.sh", train="crash", MAX_RESTARTS="1", MODEL="", DATA="")
    fields, output = cluster.wait(job), cluster.output(job)
    assert fields["JobState"] == "FAILED" and fields["ExitCode"] == "1:0" and fields["Restarts"] == "1"
    assert output.count("step ended with code 1 after checkpoint 0") == 2
    assert output.count("restarting from step 0") == 1
    assert sorted(path.name for path in (tmp_path / "run/slurm").glob(f"{job}-*")) == [f"{job}-0", f"{job}-1"]


def test_progress_starts_the_count_anew(cluster, submit, tmp_path):
    job = submit("slurm/train_tiny.sh", train="progress", MAX_RESTARTS="1", MODEL="", DATA="")
    fields, output = cluster.wait(job), cluster.output(job)
    assert fields["JobState"] == "FAILED" and fields["Restarts"] == "2", output
    assert output.count("restarting from step 8") == 2


def test_cancelled_job_stays_cancelled(cluster, submit, tmp_path):
    job = submit("slurm/train_tiny.sh", train="sleep", MODEL="", DATA="")
    cluster.until(lambda: (tmp_path / "record/environment-3").exists())
    cluster.command("scancel", str(job))
    cluster.wait(job)
    cluster.until(lambda: cluster.command("squeue", "-h", "-j", str(job), check=False).strip() == "")
    assert cluster.job(job)["JobState"] == "CANCELLED" and cluster.job(job)["Restarts"] == "0"


def test_node_that_nobody_reaches_is_left_out(cluster, submit, tmp_path):
    job = submit(
        "slurm/train_tiny.sh", train="finish", options=("--nodes=4", "--ntasks-per-node=1"), MODEL="", DATA="",
        HEALTH_CHECK="1", HEALTH_SECONDS="60", UNREACHABLE="vopd2",
    )  # fmt: skip
    fields, output = cluster.wait(job), cluster.output(job)
    assert fields["JobState"] == "COMPLETED", output
    assert "the nodes are not fit: vopd2\n" in output and "vopd2: reaches neither neighbour" in output
    assert fields["ExcNodeList"] == "vopd2" and "vopd2" not in cluster.hosts(job)


@pytest.mark.parametrize(
    ("script", "options", "variables", "message"),
    [
        ("train_72b.sh", ("--ntasks-per-node=4",), {}, "--ntasks-per-node=4: one task drives one GPU"),
        ("train_7b.sh", (), {"CONFIG": "train_8b"}, "CONFIG=train_8b: there is no conf/train_8b.yaml"),
        ("train_7b.sh", (), {"MODEL": "/no/model"}, "MODEL=/no/model: is not a directory"),
        ("train_7b.sh", (), {"DATA": "/no/data"}, "DATA=/no/data: is not a directory"),
        ("train_7b.sh", (), {"RESULTS": "/proc/run"}, "RESULTS=/proc/run: cannot be written"),
        ("train_7b.sh", ("exp_manager.exp_dir=x",), {}, "give RESULTS=x instead"),
        ("train_7b.sh", ("num_nodes=2",), {}, "give sbatch --nodes=2 instead"),
        ("train_7b.sh", ("exp_manager.resume_if_exists=false",), {}, "would begin anew each time"),
    ],
)
def test_mistakes_are_told_at_once(cluster, submit, script, options, variables, message):
    arguments = [word for word in options if not word.startswith("--")]
    flags = tuple(word for word in options if word.startswith("--"))
    job = submit(f"slurm/{script}", *arguments, train="finish", options=flags, **variables)
    fields = cluster.wait(job)
    assert fields["ExitCode"] == "2:0" and fields["Restarts"] == "0"
    lines = cluster.output(job).splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1 and message in lines[-1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_no_job(script, tmp_path):
    help_text = subprocess.run(
        ["bash", f"{ROOT}/slurm/{script}", "--help"], capture_output=True, text=True, timeout=HANG, cwd=tmp_path
    )
    assert help_text.returncode == 0
    for name in ("IMAGE", "MOUNTS", "MODEL", "DATA", "RESULTS", "SBATCH_ACCOUNT", "SBATCH_PARTITION", "DRY_RUN"):
        assert f"  {name} " in help_text.stdout or f"{name}," in help_text.stdout
    alone = subprocess.run(
        ["bash", f"{ROOT}/slurm/{script}"], capture_output=True, text=True, timeout=HANG, cwd=tmp_path
    )
    assert alone.returncode == 2 and "submit it: sbatch" in alone.stderr
