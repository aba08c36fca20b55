"""The pretended cluster itself."""

import pytest

pytestmark = pytest.mark.slurm


def test_runs_a_job_on_every_gpu(cluster, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nsrun --container-image=some/image bash -c 'echo $SLURM_PROCID of $SLURM_NTASKS'\n")
    job = cluster.submit(
        "--nodes=8", "--ntasks-per-node=8", "--gpus-per-node=8", f"--output={tmp_path}/%j.out", str(script)
    )
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    assert sorted(cluster.output(job).split("\n")[:-1]) == sorted(f"{i} of 64" for i in range(64))
    assert "container-image=some/image" in cluster.container_options.read_text().splitlines()
