"""A real Slurm of pretended nodes on this machine: munged, slurmctld and one slurmd a node, without systemd or GPUs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.distributed import HANG

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "shellcheck", "gcc")
GPUS_PER_NODE = 8
_STUB = Path(__file__).with_name("container_stub.c")
_GOES_ON = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED")


def missing() -> str | None:
    """Why a cluster cannot be started on this machine, or None."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} not installed; make test-slurm installs Debian's packages"
    return None if os.geteuid() == 0 else "slurmd starts jobs as root only"


class Cluster:
    """`num_nodes` nodes of 16 cores and 8 GPUs each, which are /dev/null under another name.

    The partition `main` is the default; jobs in `urgent` take nodes away from it after 30 seconds of grace. Options
    that pyxis adds to srun are accepted and recorded in `container_options`.
    """

    def __init__(self, folder: Path, num_nodes: int = 8) -> None:
        """Nothing is started before `with`."""
        self.folder, self.nodes = folder, [f"vopd{i}" for i in range(1, num_nodes + 1)]
        self.container_options = folder / "container_options.txt"
        self._conf = folder / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Cluster:
        """Start all daemons and wait until every node is idle."""
        for name in ("state", "spool", "log", "devices"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)  # munged distrusts a folder that others may write to
        _know_hosts(self.nodes)
        self._write_configuration()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = {"key-file": key, "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{name}={self.folder / file}" for name, file in files.items()]
        self._start("munged", *options, f"--seed-file={self.folder}/munge.seed", "--foreground", "--force")
        self.until(lambda: (self.folder / "munge.sock").exists())
        self._start("slurmctld", "-D", "-f", str(self._conf))
        for node in self.nodes:
            self.start_node(node)
        self.until(lambda: self.command("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(len(self.nodes)))
        return self

    def __exit__(self, *_: object) -> None:
        """End jobs, then daemons, each by its own id."""
        subprocess.run(["scancel", "--user=root"], env=self.environment(), capture_output=True, timeout=HANG)
        deadline = time.monotonic() + 20
        while self.command("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.5)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def _start(self, name: str, *arguments: str, key: str | None = None) -> None:
        log = (self.folder / "log" / f"{key or name}.out").open("ab")
        self._daemons[key or name] = subprocess.Popen(
            [name, *arguments], env=self.environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )

    def start_node(self, node: str) -> None:
        """Start the slurmd of `node` (again)."""
        self._start("slurmd", "-D", "-f", str(self._conf), "-N", node, key=node)

    def lose_node(self, node: str) -> None:
        """What a power failure looks like to the others: daemons and tasks of `node` are gone at once."""
        tasks = self.processes(node)
        parents = {int(Path(f"/proc/{task}/stat").read_text().rpartition(")")[2].split()[1]) for task in tasks}
        stepds = {p for p in parents if Path(f"/proc/{p}/cmdline").read_bytes().startswith(b"slurmstepd")}
        self._daemons[node].kill()
        self._daemons[node].wait()
        for process in [*stepds, *tasks]:  # a step's daemon first: it would report the end of its tasks
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def processes(self, node: str, containing: str = "") -> list[int]:
        """Ids of the processes of jobs on `node`, with `containing` in the command line."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                environment = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            here = {f"SLURM_CONF={self._conf}", f"SLURMD_NODENAME={node}"} <= set(environment)
            if here and containing in command:
                found.append(int(entry.name))
        return found

    def environment(self, **extra: str) -> dict[str, str]:
        """This process's environment for Slurm's commands, without what Slurm or a launcher set before."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "PMI", "MASTER_"))}
        return {**kept, "SLURM_CONF": str(self._conf), **extra}

    def command(self, *command: str, check: bool = True, env: Mapping[str, str] | None = None) -> str:
        """Standard output of a Slurm command; raises with its error output when it fails."""
        done = subprocess.run(
            command, env=self.environment(**(env or {})), capture_output=True, text=True, timeout=HANG
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, *command: str, cwd: Path | None = None, **env: str) -> int:
        """Job id of `sbatch *command`, submitted from `cwd` with `env` added to the environment."""
        done = subprocess.run(
            ["sbatch", *command], cwd=cwd, env=self.environment(**env), capture_output=True, text=True, timeout=HANG
        )
        found = re.search(r"Submitted batch job (\d+)", done.stdout)
        if found is None:
            raise RuntimeError(f"sbatch {' '.join(command)}: {done.stdout}{done.stderr}")
        return int(found.group(1))

    def job(self, job_id: int) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        text = self.command("scontrol", "show", "job", str(job_id), "--oneliner")
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def hosts(self, job_id: int) -> list[str]:
        """Nodes of a running job, the one of the batch script first."""
        return self.command("scontrol", "show", "hostnames", self.job(job_id)["NodeList"]).split()

    def wait(self, job_id: int, timeout: float = HANG) -> dict[str, str]:
        """The job's fields once it has ended for good; raises TimeoutError with its output so far."""

        def ended() -> bool:
            return self.job(job_id)["JobState"] not in _GOES_ON

        try:
            self.until(ended, timeout)
        except TimeoutError:
            raise TimeoutError(f"job {job_id} has not ended after {timeout} s:\n{self.output(job_id)}") from None
        return self.job(job_id)

    def output(self, job_id: int) -> str:
        """What the job's batch script printed, over all its restarts."""
        file = Path(self.job(job_id)["StdOut"])
        return file.read_text(errors="replace") if file.exists() else f"(no {file})"

    def until(self, condition: Callable[[], bool], timeout: float = HANG) -> None:
        """Wait for `condition`; raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {timeout} s")
            time.sleep(0.2)

    def _write_configuration(self) -> None:
        host = socket.gethostname().split(".")[0]
        devices = [self.folder / "devices" / f"gpu{i}" for i in range(GPUS_PER_NODE)]
        for device in devices:
            os.mknod(device, 0o020666, os.makedev(1, 3))
        names = ",".join(self.nodes)
        (self.folder / "gres.conf").write_text(
            "".join(f"NodeName={names} Name=gpu File={device}\n" for device in devices)
        )
        stub = self.folder / "container_stub.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(stub), str(_STUB)], check=True, timeout=HANG)
        (self.folder / "plugstack.conf").write_text(f"required {stub} {self.container_options}\n")
        ports = _free_ports(len(self.nodes) + 1)
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} Sockets=1 CoresPerSocket=16 "
            f"RealMemory=8000 Gres=gpu:{GPUS_PER_NODE}"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        ]
        settings = {
            "ClusterName": "vopd",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": ports[0],
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthInfo": f"socket={self.folder}/munge.sock,cred_expire=5",  # a requeued job waits for this long
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "spool/%n",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": self.folder / "%n.pid",
            "SlurmctldLogFile": self.folder / "log/slurmctld.log",
            "SlurmdLogFile": self.folder / "log/%n.log",
            "PlugStackConfig": self.folder / "plugstack.conf",
            "ProctrackType": "proctrack/linuxproc",  # cgroups are not to be had in a container
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "GresTypes": "gpu",
            "SlurmdParameters": "config_overrides",  # 16 cores a node, whatever this machine has
            "ReturnToService": 2,
            "KillWait": 5,
            "SlurmdTimeout": 10,
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "SlurmctldParameters": "preempt_send_user_signal",
        }
        lines = [f"{name}={value}" for name, value in settings.items()] + nodes
        lines.append("PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 State=UP")
        lines.append("PartitionName=urgent Nodes=ALL PriorityTier=10 State=UP")
        self._conf.write_text("\n".join(lines) + "\n")


def _know_hosts(nodes: list[str]) -> None:
    """Tasks meet at a node's name, so it must resolve."""
    hosts = Path("/etc/hosts")
    unknown = [node for node in nodes if node not in hosts.read_text().split()]
    if unknown:
        with hosts.open("a") as file:
            file.write(f"127.0.0.1 {' '.join(unknown)}\n")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
