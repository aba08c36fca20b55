"""slurm/train_tiny.sh on a real Slurm: real ranks, real Megatron-Core on gloo; signals, failures and restarts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import HANG, ROOT

pytestmark = pytest.mark.slurm
SCRIPT = "slurm/train_tiny.sh"
QUICK = {"PLAN": "0", "HEALTH_CHECK": "0"}
"""For starts that check something else."""
RUN = ("trainer.max_steps=12", "data.num_workers=1", "rollout.max_response_length=16", "checkpoint.every_n_steps=4")


@pytest.fixture(scope="session")
def submit(cluster, assets, tmp_path_factory):
    """`submit(results, *arguments, **variables)` of the tiny script; returns the job id."""

    def start(results: Path, *arguments: str, script: str = SCRIPT, options: tuple = (), **variables: str) -> int:
        variables = {"RESULTS": str(results), "NEMO_VOPD_TINY": str(assets), "MIN_FREE_GIB": "0.01", **variables}
        output = f"--output={results.parent}/{results.name}-%j.out"
        return cluster.submit(output, *options, script, *arguments, cwd=ROOT, **variables)

    return start


def steps(results: Path) -> list[dict]:
    """The metrics of a run without what a clock measured."""
    lines = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "lr", "num_response_tokens", "entropy", "student_topk_mass")
    return [{key: line[key] for key in kept} for line in lines]


def status(results: Path) -> dict:
    return json.loads((results / "status.json").read_text())


@pytest.fixture(scope="session")
def uninterrupted(cluster, submit, tmp_path_factory):
    """(job, results) of a run that nothing happened to, with all checks on."""
    results = tmp_path_factory.mktemp("uninterrupted") / "run"
    job = submit(results, *RUN)
    cluster.wait(job)
    return job, results


def test_runs_to_the_end(cluster, uninterrupted):
    job, results = uninterrupted
    output = cluster.output(job)
    assert cluster.job(job)["JobState"] == "COMPLETED", output
    assert "finished after step 12: max_steps" in output
    assert [line["step"] for line in steps(results)] == list(range(12))
    log = results / "slurm" / f"{job}-0"
    assert sorted(file.name for file in log.glob("rank-*")) == [f"rank-00{i}.log" for i in range(4)]
    assert "tensor 2, pipeline 1, data 2" in (log / "rank-000.log").read_text()
    assert "gloo all-reduce" in (log / "health" / "vopd1.ok").read_text()
    assert (log / "plan.txt").read_text().startswith("fits: ")
    assert "max_steps: 12" in (log / "config.yaml").read_text()
    assert (results / "slurm" / str(job) / "code" / "nemo_vopd" / "model.py").exists()
    assert (results / "slurm" / "latest").resolve() == log


def wait_for_steps(cluster, results: Path, number: int) -> None:
    """Until the run has written `number` steps."""
    file = results / "metrics.jsonl"
    cluster.until(lambda: file.exists() and len(file.read_text().splitlines()) >= number)


def check_same(cluster, job: int, results: Path, uninterrupted: tuple[int, Path]) -> str:
    """The job has ended well and its metrics are those of the uninterrupted run; returns what it printed."""
    fields, output = cluster.wait(job), cluster.output(job)
    assert fields["JobState"] == "COMPLETED", output
    assert steps(results) == steps(uninterrupted[1])
    return output


def test_signal_before_the_time_limit(cluster, submit, uninterrupted, tmp_path):
    job = submit(tmp_path / "run", *RUN, **QUICK)
    wait_for_steps(cluster, tmp_path / "run", 2)
    # what `#SBATCH --signal=B:USR1@120` makes Slurm do
    cluster.command("scancel", "--batch", "--signal=USR1", str(job))
    cluster.until(lambda: cluster.job(job)["Restarts"] == "1")
    saved = status(tmp_path / "run")
    assert saved["reason"] == "SIGUSR1" and not saved["finished"]
    assert 2 <= saved["step"] < 12
    output = check_same(cluster, job, tmp_path / "run", uninterrupted)
    assert f"restarting from step {saved['step']}" in output
    assert f"resuming after step {saved['step']}" in (tmp_path / "run/slurm/latest/rank-000.log").read_text()
    # another submission finds nothing left to do, without starting a rank
    again = submit(tmp_path / "run", *RUN, **QUICK)
    assert cluster.wait(again)["JobState"] == "COMPLETED"
    assert "the run is finished" in cluster.output(again)


def test_preemption(cluster, submit, uninterrupted, tmp_path):
    job = submit(tmp_path / "run", *RUN, **QUICK)
    wait_for_steps(cluster, tmp_path / "run", 2)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/bash\nsleep 3\n")
    other = cluster.submit(
        "--partition=urgent", "--nodes=8", "--exclusive", f"--output={tmp_path}/urgent.out", str(urgent)
    )
    cluster.wait(other)
    output = check_same(cluster, job, tmp_path / "run", uninterrupted)
    assert "asking all ranks to save" in output
    assert cluster.job(job)["Restarts"] == "1"


def test_node_failure(cluster, submit, uninterrupted, tmp_path):
    job = submit(tmp_path / "run", *RUN, **QUICK)
    wait_for_steps(cluster, tmp_path / "run", 5)
    lost = cluster.hosts(job)[1]
    cluster.lose_node(lost)
    try:
        cluster.until(lambda: cluster.job(job)["Restarts"] == "1")
        check_same(cluster, job, tmp_path / "run", uninterrupted)
    finally:
        cluster.start_node(lost)
    assert lost not in cluster.hosts(job)
    assert "resuming after step 4" in (tmp_path / "run/slurm/latest/rank-000.log").read_text()


def test_killed_rank(cluster, submit, tmp_path):
    job = submit(tmp_path / "run", *RUN, MAX_RESTARTS="0", **QUICK)
    wait_for_steps(cluster, tmp_path / "run", 1)
    [rank, *_] = cluster.processes(cluster.hosts(job)[1], "train_vopd.py")
    os.kill(rank, signal.SIGKILL)
    fields, output = cluster.wait(job), cluster.output(job)
    assert fields["JobState"] == "FAILED" and fields["ExitCode"] == "1:0"
    assert "step ended with code 137" in output
    assert "MAX_RESTARTS=0 restarts in a row brought no checkpoint after step" in output
    assert not cluster.processes("vopd1", "train_vopd.py")


def test_unfit_node_is_left_out(cluster, submit, uninterrupted, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    smi = programs / "nvidia-smi"  # the driver's program, where there is no driver
    smi.write_text(
        "#!/bin/bash\n"
        "[[ $1 == *remapped* ]] && { for i in 0 1; do echo 0000:$i, No, No; done; exit; }\n"
        'errors=0; [ "$SLURMD_NODENAME" = vopd1 ] && errors=3\n'
        'for i in 0 1; do echo "$i, 81559, 512, $errors"; done\n'
    )
    smi.chmod(0o755)
    options = ("--gpus-per-node=2", "--exclude=vopd8")
    path = f"{programs}:{os.environ['PATH']}"
    job = submit(tmp_path / "run", *RUN, options=options, PLAN="0", HEALTH_SECONDS="120", PATH=path)
    output = check_same(cluster, job, tmp_path / "run", uninterrupted)
    assert "the nodes are not fit: vopd1" in output
    assert "GPU 0 has 3 uncorrected ECC errors; GPU 1 has 3 uncorrected ECC errors" in output
    assert "restarting from step 0 without vopd1" in output
    assert set(cluster.job(job)["ExcNodeList"].split(",")) == {"vopd1", "vopd8"}  # the user's list stays
    assert cluster.hosts(job) == ["vopd2", "vopd3"]


def test_refused_configuration(cluster, submit, tmp_path):
    by_plan = submit(tmp_path / "planned", *RUN, "parallel.tensor=3", HEALTH_CHECK="0")
    by_training = submit(tmp_path / "trained", *RUN, "parallel.tensor=3", options=("--job-name=other",), **QUICK)
    for job in (by_plan, by_training):
        fields, output = cluster.wait(job), cluster.output(job)
        assert fields["JobState"] == "FAILED" and fields["ExitCode"] == "2:0" and fields["Restarts"] == "0", output
        assert "Traceback" not in output
    assert "error: num_nodes=2: 4 GPUs are no multiple of parallel.tensor" in cluster.output(by_plan)
    assert "refused: parallel.tensor=3: " in cluster.output(by_training)
    assert not (tmp_path / "planned/slurm" / f"{by_plan}-0" / "rank-000.log").exists()


def test_a_dry_run_works_from_any_folder_and_says_what_is_not_there(assets, tmp_path):
    def dry(folder, script, **variables):
        environment = {
            **os.environ,
            "DRY_RUN": "1",
            "PYTHON": sys.executable,
            "NEMO_VOPD_TINY": str(assets),
            **variables,
        }
        return subprocess.run(
            ["bash", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=HANG
        )

    (tmp_path / "model").symlink_to(assets / "tiny-vlm")
    done = dry(tmp_path, os.path.relpath(ROOT / "slurm" / "train_tiny.sh", tmp_path), MODEL="model")
    assert done.returncode == 0 and "sed:" not in done.stderr, done.stderr[-1000:]
    # paths mean what they mean where they were typed
    assert f"model.hf_path={assets}/tiny-vlm" in done.stdout and f"exp_dir={tmp_path}/runs/slurm_tiny" in done.stdout
    done = dry(ROOT / "slurm", "train_7b.sh", MODEL="/nowhere/model", DATA="/nowhere/data")
    assert done.returncode == 0 and "note: MODEL=/nowhere/model is not a directory on" in done.stdout, done.stderr[
        -1000:
    ]
    assert "note: DATA=/nowhere/data does not exist on" in done.stdout
