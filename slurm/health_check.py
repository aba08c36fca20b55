"""Is this node fit to train? One process for each task; slurm/health.sh starts it in a Slurm step.

The first process of a node looks at GPUs and disks; then all take part in an all-reduce within the node and in one
over all nodes. `<folder>/<node>.bad` says why a node is not fit; `<folder>/<node>.ok` says what was measured. A node
with neither did not answer. Exit code 0 only when everything worked.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

MAX_USED_MIB = 2048
"""GPU memory in use before a run: a driver takes some hundred MiB, a process left over from another job gigabytes."""
PAYLOAD_MIB = 256


def check_gpus(count: int) -> list[str]:
    """What is wrong with this node's GPUs, of which there should be `count`; empty when they are fit."""
    fields = "index,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
    try:
        rows = _nvidia_smi(f"--query-gpu={fields}")
        remapped = _nvidia_smi("--query-remapped-rows=gpu_bus_id,remapped_rows.pending,remapped_rows.failure")
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi failed ({' '.join(str(error).split())})"]
    wrong = [] if len(rows) == count else [f"{len(rows)} GPUs where {count} are asked for"]
    sizes = sorted(int(total) for _, total, _, _ in rows)
    for index, total, used, errors in rows:
        if int(total) < 0.95 * sizes[len(sizes) // 2]:
            wrong.append(f"GPU {index} has {total} MiB where others have {sizes[-1]}")
        if int(used) > MAX_USED_MIB:
            wrong.append(f"GPU {index} has {used} MiB in use before the run")
        if errors.isdigit() and int(errors):  # [N/A] without ECC
            wrong.append(f"GPU {index} has {errors} uncorrected ECC errors")
    for bus, pending, failure in remapped:
        if pending == "Yes" or pending == "1":
            wrong.append(f"GPU {bus} waits for a reset to remap memory rows")
        if failure == "Yes" or failure == "1":
            wrong.append(f"GPU {bus} could not remap memory rows")
    return wrong


def check_disks(paths: list[str], min_free_gib: float) -> list[str]:
    """Which of `paths` cannot be written here or has less than `min_free_gib` GiB free."""
    wrong = []
    for path in paths:
        probe = Path(path) / f".health-{os.uname().nodename}-{os.getpid()}"
        try:
            probe.write_text("written")
            probe.unlink()
            free = shutil.disk_usage(path).free / 2**30
        except OSError as error:
            wrong.append(f"{path} cannot be written ({error.strerror})")
            continue
        if free < min_free_gib:
            wrong.append(f"{path} has {free:.1f} GiB free, {min_free_gib:g} are asked for")
    return wrong


def all_reduce(group, world_size: int, device) -> float:
    """Sum ones over `group` and return the seconds of the second of two rounds; raises RuntimeError on a wrong sum."""
    import torch
    import torch.distributed as dist

    payload = torch.ones(PAYLOAD_MIB * 2**20 // 4 if device.type == "cuda" else 1024, device=device)
    seconds = 0.0
    for power in (1, 2):
        start = time.monotonic()
        dist.all_reduce(payload, group=group)
        correct = bool((payload == float(world_size) ** power).all())  # also waits for the device
        seconds = time.monotonic() - start
        if not correct:
            raise RuntimeError("an all-reduce gave a wrong sum")
    return seconds


def communicate(rank: int, world_size: int, local: int, per_node: int, seconds: float) -> str:
    """All-reduces within the node and over all nodes; returns what was measured."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(local)
    timeout = datetime.timedelta(seconds=seconds)
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=world_size, timeout=timeout)
    num_nodes = world_size // per_node
    nodes = [dist.new_group(range(n * per_node, (n + 1) * per_node), timeout=timeout) for n in range(num_nodes)]
    within = all_reduce(nodes[rank // per_node], per_node, device)
    over = all_reduce(None, world_size, device)
    dist.destroy_process_group()
    if not cuda:
        return "gloo all-reduce within the node and over all nodes"
    # bytes that each GPU sends in a ring, the number nccl-tests call bus bandwidth
    sent = [2 * (n - 1) / n * PAYLOAD_MIB / 1024 for n in (per_node, world_size)]
    return f"NCCL all-reduce {sent[0] / within:.0f} GiB/s within the node, {sent[1] / over:.0f} GiB/s over all nodes"


def main() -> int:
    """Check this node; the exit code of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of a node; 0 on machines without")
    parser.add_argument("--paths", required=True, help="folders that must be writable, separated by colons")
    parser.add_argument("--min-free-gib", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="how long a collective may take")
    options = parser.parse_args()
    env = os.environ
    node, local = env["SLURMD_NODENAME"], int(env["SLURM_LOCALID"])
    rank, world_size = int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
    wrong = []
    if local == 0:
        wrong = check_disks(options.paths.split(":"), options.min_free_gib)
        wrong += check_gpus(options.gpus) if options.gpus else []
        if wrong:
            (options.folder / f"{node}.bad").write_text(f"{node}: {'; '.join(wrong)}\n")
            return 1  # Slurm ends the others: there is nothing left to find out
        (options.folder / f"{node}.ok").write_text(f"{node}: answers\n")
    # a collective of NCCL may hang without an error that Python could see
    watchdog = threading.Timer(2.5 * options.seconds, lambda: os._exit(3))
    watchdog.daemon = True
    watchdog.start()
    measured = communicate(rank, world_size, local, world_size // int(env["SLURM_STEP_NUM_NODES"]), options.seconds)
    if local == 0:
        (options.folder / f"{node}.ok").write_text(f"{node}: {measured}\n")
    return 0


def _nvidia_smi(query: str) -> list[list[str]]:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


if __name__ == "__main__":
    sys.exit(main())
