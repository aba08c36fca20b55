"""The image without a docker engine: what the build is given, what it installs, and how the container starts."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tests.distributed import HANG, ROOT
from tests.helpers import read_lines

ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"
DOCUMENT = (ROOT / "docs" / "clusters.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WANTED = {entry.name: entry for entry in map(Requirement, PROJECT["dependencies"])}
(ENGINE,) = map(Requirement, PROJECT["optional-dependencies"]["gpu"])
VERBS = "train plan prepare_data generate evaluate report convert_checkpoint benchmark quickstart".split()


def module(name: str):
    """docker/NAME.py, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docker" / f"{name}.py")
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments) of the Dockerfile, comments gone and continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, rest in re.findall(r"^([A-Z]+) (.*)$", joined, flags=re.MULTILINE)]


def ignored(path: str) -> bool:
    """What .dockerignore says of `path`: the last pattern that matches it or a folder above it decides."""
    parents = ["/".join(path.split("/")[: i + 1]) for i in range(path.count("/") + 1)]
    result = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            regex = re.escape(line.lstrip("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
            if any(re.fullmatch(regex, each) for each in parents):
                result = not line.startswith("!")
    return result


# what the build is given


def test_sources_of_the_dockerfile_are_in_the_build_context():
    mounted = [re.findall(r"type=bind,source=([^,\s]+)", rest) for word, rest in instructions() if word == "RUN"]
    copied = [source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]]
    assert copied == ["."] and sum(map(len, mounted)) == 3
    for source in sum(mounted, []):
        assert (ROOT / source).is_file() and not ignored(source), source


def test_everything_a_run_needs_is_in_the_build_context_and_nothing_else():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    needed = [name for name in tracked if name.startswith(("conf/", "nemo_vopd/", "recipes/", "docker/", "slurm/"))]
    assert len(needed) > 100 and not [name for name in [*needed, "pyproject.toml", "README.md"] if ignored(name)]
    folders = {file.name for file in ROOT.iterdir() if not ignored(file.name)}
    assert folders <= {
        "LICENSE",
        "README.md",
        "benchmarks",
        "conf",
        "constraints.txt",
        "docker",
        "nemo_vopd",
        "pyproject.toml",
    } | {
        "recipes",
        "slurm",
    }
    private = [".git/config", ".venv/bin/python", "runs/tiny/metrics.jsonl", ".env", "models/m/model.safetensors"]
    private += ["conf/.env", "nemo_vopd/__pycache__/model.pyc", "slurm/slurm-vopd-1.out", "docker/id.pem", "data.jsonl"]
    private += ["nemo_vopd.egg-info/PKG-INFO", "recipes/runs.log", "nemo_vopd/data/.cache/huggingface/token"]
    assert [name for name in private if not ignored(name)] == []


def test_packages_are_a_layer_of_their_own_before_the_source():
    words = [word for word, _ in instructions()]
    packages = next(rest for word, rest in instructions() if word == "RUN")
    assert words.index("RUN") < words.index("COPY") and "--requirement" in packages and "--constraint" in packages
    assert set(re.findall(r"source=([^,\s]+)", packages)) == {
        "pyproject.toml",
        "constraints.txt",
        "docker/keep_base.py",
    }
    assert words.count("RUN") == 2 and words.count("COPY") == 1 and "apt" not in (ROOT / "Dockerfile").read_text()
    # what keep_base.py finds must stay, so this one is gone before
    assert packages.index("pip uninstall --yes --root-user-action=ignore nvidia-resiliency-ext") < packages.index(
        "&& python /tmp/build/keep_base.py"
    )
    # what changes with each commit comes after the layers that take long
    revision = next(i for i, (word, rest) in enumerate(instructions()) if word == "ARG" and "REVISION" in rest)
    assert revision > max(i for i, word in enumerate(words) if word == "RUN")


def test_the_image_is_labelled_and_does_not_run_as_root():
    found = dict(instructions())
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\S+)="([^"]*)"', found["LABEL"]))
    assert labels["version"] == PROJECT["version"] and labels["licenses"] == PROJECT["license"]
    assert labels["revision"] == "${REVISION}" and labels["base.name"] == "${BASE}"
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", found["USER"])
    (entrypoint,) = json.loads(found["ENTRYPOINT"])
    assert entrypoint == "/opt/nemo_vopd/docker/entrypoint.sh" and ENTRYPOINT.stat().st_mode & stat.S_IXOTH
    base = next(rest for word, rest in instructions() if word == "ARG")
    assert re.fullmatch(r"BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", base) and found["FROM"] == "${BASE}"


def test_dockerfile_document_and_pyproject_agree_about_the_base():
    dockerfile = (ROOT / "Dockerfile").read_text()

    def the(pattern: str) -> str:
        """The one version that both texts name."""
        in_dockerfile, in_document = (set(re.findall(pattern, text)) for text in (dockerfile, DOCUMENT))
        assert in_dockerfile == in_document and len(in_document) == 1, (pattern, in_dockerfile, in_document)
        return in_document.pop()

    release = the(r"nvidia/pytorch:(\d\d\.\d\d)-py3")
    assert f"build and test on {release}" in dockerfile
    assert ENGINE.name == "transformer-engine" and the(r"Transformer Engine (\d+\.\d+)") in ENGINE.specifier
    assert f">={the(r'Python (\d+\.\d+)')}" == PROJECT["requires-python"]
    tested = module("keep_base").pins((ROOT / "constraints.txt").read_text())
    for name, pattern in {"megatron-core": r"Megatron-Core (\d+\.\d+)", "torch": r"torch (\d+\.\d+)"}.items():
        assert tested[name].startswith(the(pattern) + ".")
    assert the(r"CUDA (\d+\.\d+)")


# what the build installs


IMAGE = {
    "torch": "2.13.0a0+8145d630e8.nv26.6.54250401",
    "numpy": "2.3.5",
    "transformer-engine": "2.16.0+4220403e",
    "apex": "0.1",
    "nvidia-modelopt": "0.40.0",
    "packaging": "25.0",
    "megatron-core": "0.15.0",
    "pyyaml": "6.0.1",
    "python-apt": "2.7.7ubuntu4",
}


def test_constraints_keep_the_image_and_pin_the_rest_as_tested():
    keep_base = module("keep_base")
    kept = keep_base.keep(IMAGE, fixed={"pyyaml", "python-apt"})
    assert set(kept) == {"torch", "numpy", "transformer-engine", "apex", "nvidia-modelopt", "pyyaml"}
    wanted = keep_base.requirements((ROOT / "pyproject.toml").read_text())
    tested = keep_base.pins((ROOT / "constraints.txt").read_text())
    lines = dict(line.split("==") for line in keep_base.constraints(kept, IMAGE, wanted, tested))
    assert kept.items() <= lines.items()
    assert all(tested[name] == version for name, version in lines.items() if name not in kept)
    assert {name for name, entry in WANTED.items() if entry.specifier} <= lines.keys()
    assert "packaging" not in lines, "pip keeps the image's where it will do"
    fixed = keep_base.keep({"torch": "2.13", "hydra-core": "1.3.1"}, fixed={"hydra-core"})
    assert "hydra-core==1.3.1" in keep_base.constraints(fixed, fixed, wanted, tested), "pip must not try to replace it"


def test_keep_base_writes_what_pip_is_given(tmp_path):
    command = [str(ROOT / "docker/keep_base.py"), "pyproject.toml", "constraints.txt", str(tmp_path / "base")]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    base = json.loads((tmp_path / "base" / "base.json").read_text())
    lines = (tmp_path / "base" / "constraints.txt").read_text().split()
    assert {"torch", "numpy"} <= base.keys() and {f"{name}=={version}" for name, version in base.items()} <= set(lines)
    assert (tmp_path / "base" / "requirements.txt").read_text().splitlines() == PROJECT["dependencies"]
    done = subprocess.run([sys.executable, "-I", "-S", *command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: BASE: has no torch; give an NGC PyTorch or NeMo image\n")


def test_check_without_transformer_engine_fails_with_one_line():
    if importlib.util.find_spec("transformer_engine"):
        pytest.skip("Transformer Engine is installed here")
    done = subprocess.run([sys.executable, "docker/check_image.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and re.search(r"^transformer-engine +WRONG +absent$", done.stdout, re.MULTILINE)
    wanted = PROJECT["optional-dependencies"]["gpu"][0]
    assert done.stderr.startswith(f"error: transformer-engine=absent: pyproject.toml asks for {wanted}; build on")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("found, right", [(IMAGE["transformer-engine"], True), ("1.13.0", False), ("99.0", False)])
def test_check_holds_transformer_engine_to_the_range_of_pyproject(found, right, monkeypatch):
    check = module("check_image")
    real = check.version
    monkeypatch.setattr(check, "version", lambda name: found if name == "transformer-engine" else real(name))
    table = check.Table()
    check.check_versions(table, cpu=False, base={})
    assert [fault.split(":")[0] for fault in table.faults] == ([] if right else [f"transformer-engine={found}"])


def test_check_passes_here_with_cpu(capsys):
    assert module("check_image").main(["--cpu"]) == 0
    table = capsys.readouterr().out
    assert "WRONG" not in table and "transformer-engine" not in table
    (found,) = re.findall(r"^megatron-core +ok +(\S+)$", table, re.MULTILINE)
    assert found in WANTED["megatron-core"].specifier
    assert re.search(r"^import nemo_vopd\.training\.run +ok +imported$", table, re.MULTILINE)
    assert re.search(r"^conf/train_72b\.yaml +ok +composes$", table, re.MULTILINE)


def test_check_names_what_is_wrong(capsys, tmp_path, monkeypatch):
    check = module("check_image")
    base = tmp_path / "base.json"
    base.write_text(json.dumps({"torch": "2.13.0a0+nv", "apex": "0.1"}))
    assert check.main(["--cpu", "--base", str(base)]) == 1
    error = capsys.readouterr().err
    assert re.search(r"^error: torch of the base image=\S+: was 2\.13\.0a0\+nv; nothing may replace it$", error, re.M)
    assert "error: apex of the base image=absent: was 0.1" in error

    monkeypatch.setattr(check, "MODULES", ("hydra", "nemo_vopd.nosuch"))
    assert check.main(["--cpu"]) == 1
    assert "error: import nemo_vopd.nosuch=failed: ModuleNotFoundError: No module named" in capsys.readouterr().err

    real = check.version
    monkeypatch.setattr(check, "version", lambda name: "0.16.1" if name == "megatron-core" else real(name))
    assert check.main(["--cpu"]) == 1
    (wanted,) = [entry for entry in PROJECT["dependencies"] if entry.startswith("megatron-core")]
    assert f"error: megatron-core=0.16.1: pyproject.toml asks for {wanted}; install" in capsys.readouterr().err


# how the container starts


@pytest.fixture
def start(tmp_path):
    """Run the entry point with arguments; its caches go to `tmp_path`."""

    def run(*arguments: str, python: str = sys.executable, prefix: tuple[str, ...] = (), **extra: str):
        names = ("NPROC", "RANK", "WORLD_SIZE", "PET_", "SLURM_", "CUDA_VISIBLE_DEVICES", "NEMO_VOPD_", "PYTHONPATH")
        env = {name: value for name, value in os.environ.items() if not name.startswith(names)}
        env |= {"PYTHON": python, "TMPDIR": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "triton"), **extra}
        command = [*prefix, "bash", str(ENTRYPOINT), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=HANG)

    return run


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_entrypoint_is_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(ENTRYPOINT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_without_arguments_the_verbs_are_listed(start):
    for arguments in ([], ["help"], ["--help"]):
        done = start(*arguments)
        assert done.returncode == 0 and done.stdout.startswith("usage: ")
        assert re.findall(r"^  (\w+)  ", done.stdout, flags=re.MULTILINE) == [*VERBS, "check"]
    named = re.findall(r"`(\w+)`", DOCUMENT.split("Verbs: ")[1].split(";")[0])
    assert named == [*VERBS, "check"]


def test_train_runs_for_real(start, assets, tmp_path):
    arguments = ["--config-name", "tiny", "trainer.max_steps=1", f"exp_manager.exp_dir={tmp_path / 'run'}"]
    done = start("train", *arguments, NEMO_VOPD_ROOT=str(ROOT), NEMO_VOPD_TINY=str(assets), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 1 and "ended after step 1 of 1" in done.stdout


def test_exit_codes_and_messages_pass_through(start):
    done = start("plan", "--config-name", "nosuch")
    assert done.returncode == 2 and "--config-name=nosuch: is no configuration" in done.stderr
    assert start("bash", "-c", "exit 7").returncode == 7
    done = start("no-such-verb")
    assert done.returncode == 127 and done.stderr == "error: no-such-verb: is no verb and no program; see help\n"
    done = start("train", NPROC="many")
    assert done.returncode == 2 and done.stderr == "error: NPROC=many: must be a number; set NPROC=8\n"
    done = start("plan", NEMO_VOPD_ROOT="/nowhere")
    assert done.returncode == 2 and done.stderr == "error: NEMO_VOPD_ROOT=/nowhere: has no recipes/plan.py\n"


TORCHRUN = "-m torch.distributed.run"


@pytest.mark.parametrize(
    "verb, env, expected",
    [
        ("train", {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, f"{TORCHRUN} --standalone --nproc-per-node 4"),
        ("train", {"CUDA_VISIBLE_DEVICES": "0"}, ""),
        ("train", {"CUDA_VISIBLE_DEVICES": ""}, ""),
        ("train", {"CUDA_VISIBLE_DEVICES": "0,1", "NPROC": "1"}, ""),
        ("train", {"CUDA_VISIBLE_DEVICES": "", "NPROC": "2"}, f"{TORCHRUN} --standalone --nproc-per-node 2"),
        ("train", {"CUDA_VISIBLE_DEVICES": "0,1", "RANK": "0", "WORLD_SIZE": "2"}, ""),
        ("train", {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, ""),
        ("train", {"NPROC": "8", "PET_NNODES": "2"}, f"{TORCHRUN} --nproc-per-node 8"),
        ("evaluate", {"CUDA_VISIBLE_DEVICES": "0,1"}, ""),
        ("evaluate", {"NPROC": "2"}, f"{TORCHRUN} --standalone --nproc-per-node 2"),
        ("plan", {"NPROC": "2"}, ""),
    ],
)
def test_number_of_processes(start, tmp_path, verb, env, expected):
    done = start(verb, "a=1 2", "b=[3]", python=script(tmp_path / "python", 'printf "%s\\n" "$@"'), **env)
    recipe = ROOT / "recipes" / ("train_vopd.py" if verb == "train" else f"{verb}.py")
    assert done.stdout.splitlines() == ["-W", "ignore", *expected.split(), str(recipe), "a=1 2", "b=[3]"], done.stderr


def test_gpus_are_counted_with_nvidia_smi(start, tmp_path):
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin" / "nvidia-smi", 'printf "GPU 0: NVIDIA H100 (UUID: GPU-1)\\nGPU 1: NVIDIA H100\\n"')
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = start("train", python=script(tmp_path / "python", 'echo "$@"'), PATH=path)
    assert "--nproc-per-node 2" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_recipe(start, tmp_path, verb):
    done = start(verb, python=script(tmp_path / "python", 'echo "$@"'), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0 and Path(done.stdout.split()[-1]).is_file()


def test_python_takes_the_place_of_the_shell_so_signals_reach_it(tmp_path):
    python = script(
        tmp_path / "python", f"trap 'exit 7' TERM; echo $$ > {tmp_path}/pid; while true; do sleep 0.05; done"
    )
    env = {**os.environ, "PYTHON": python, "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(["bash", str(ENTRYPOINT), "train"], env=env)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
    assert int((tmp_path / "pid").read_text()) == process.pid
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANG) == 7


def wait_for(condition) -> None:
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("kind", ["of somebody else", "a link", "open to others", "one's own"])
def test_a_cache_folder_is_private(kind, start, tmp_path):
    """Compiled code is loaded from there, and anybody may make a folder of that name before."""
    name = f"nemo_vopd-{os.geteuid()}"
    place, other = tmp_path / name, tmp_path / "other"
    other.mkdir()
    if kind == "a link":
        place.symlink_to(other)
    else:
        place.mkdir(mode=0o700)
    if kind == "of somebody else":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(place, 12345, 12345)
    if kind == "open to others":
        place.chmod(0o777)
    show = 'echo "$TRITON_CACHE_DIR"'
    unset = ("env", "--unset=TRITON_CACHE_DIR", "--unset=XDG_CACHE_HOME")
    entry = start("bash", "-c", show, prefix=unset, TMPDIR=str(tmp_path)).stdout.strip()
    script = f". {ROOT}/slurm/environment.sh; {show}"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop("TRITON_CACHE_DIR", None)
    rank = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=HANG).stdout
    for cache in (Path(entry), Path(rank.strip())):
        assert cache.is_relative_to(tmp_path) and cache.is_relative_to(place) == (kind == "one's own"), cache
        top = tmp_path / cache.relative_to(tmp_path).parts[0]
        assert top.stat().st_uid == os.geteuid() and top.stat().st_mode & 0o777 == 0o700 and not top.is_symlink()


def test_a_user_without_name_and_home_has_places_to_write(start):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o1777)
        become = ("setpriv", "--reuid=12345", "--regid=12345", "--clear-groups") if os.geteuid() == 0 else ()
        places = ["HOME", "HF_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"]
        test = 'for name in "$@"; do touch "${!name}/x" && echo "$name=${!name}"; done; echo "USER=$USER"'
        unset = ("env", "--unset=USER", "--unset=XDG_CACHE_HOME", f"--chdir={folder}")
        done = start(
            *("bash", "-c", test, "-", *places),
            prefix=(*become, *unset),
            TMPDIR=folder,
            HOME="/nonexistent",
            HF_HOME="/nonexistent/huggingface",
            TRITON_CACHE_DIR=f"{folder}/mine",
        )
        found = dict(line.split("=") for line in done.stdout.split())
        assert done.returncode == 0 and list(found) == [*places, "USER"], done.stderr
        assert found["TRITON_CACHE_DIR"] == f"{folder}/mine" and found["USER"]
        assert all(found[name].startswith(folder) for name in places)


def test_environment_of_the_ranks_is_sourced_where_it_is_there(start, tmp_path):
    root = tmp_path / "checkout"
    (root / "recipes").mkdir(parents=True)
    (root / "recipes" / "plan.py").write_text("import os; print(os.environ.get('SOURCED'), os.environ['PYTHONPATH'])")
    assert start("plan", NEMO_VOPD_ROOT=str(root), PYTHONPATH="/mine").stdout == f"None {root}:/mine\n"
    (root / "slurm").mkdir()
    (root / "slurm" / "environment.sh").write_text("export SOURCED=${SOURCED:-yes}\n")
    assert start("plan", NEMO_VOPD_ROOT=str(root)).stdout == f"yes {root}\n"


# docs/clusters.md


def test_links_point_at_files():
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", DOCUMENT)
    assert len(links) >= 3
    for target in links:
        assert (ROOT / "docs" / target).exists(), target


@pytest.fixture(scope="module")
def manifest() -> dict[str, dict]:
    """Kind and contents of what the page says to apply."""
    (text,) = re.findall(r"```yaml\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    return {each["kind"]: each for each in yaml.safe_load_all(text)}


def test_manifest_is_whole(manifest):
    job, service = manifest["Job"]["spec"], manifest["Service"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    env = {each["name"]: each.get("value") for each in container["env"]}
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"] == int(env["PET_NNODES"])
    name = manifest["Job"]["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name} and service["spec"]["clusterIP"] == "None"
    assert env["PET_MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}" and pod["subdomain"] == name
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert (
        pod["volumes"][0]["emptyDir"]["medium"] == "Memory" and container["resources"]["limits"]["nvidia.com/gpu"] == 8
    )
    num_nodes = yaml.safe_load((ROOT / "conf" / "train_72b.yaml").read_text())["num_nodes"]
    assert job["completions"] == num_nodes and "--config-name train_72b " in container["args"][0]


def test_a_pod_is_done_when_the_run_is_finished(manifest, tmp_path):
    """The manifest's own commands, with a python that only starts a rank: it ends in order when it is asked to save."""
    (container,) = manifest["Job"]["spec"]["template"]["spec"]["containers"]

    def local(text: str) -> str:
        here = {"/tmp/": f"{tmp_path}/", "/results/72b": str(tmp_path), "/opt/nemo_vopd": str(ROOT)}
        return re.sub("|".join(here), lambda found: here[found.group()], text)

    status, up = tmp_path / "status.json", tmp_path / "up"
    (tmp_path / "saved").write_text('{"finished": false, "step": 10}')
    (tmp_path / "done").write_text('{"finished": true, "step": 65}')
    saving = f"trap 'cp {tmp_path}/saved {status}; exit' USR1; touch {up}; while true; do sleep 0.05; done"
    rank = script(tmp_path / "rank", saving)
    env = {**os.environ, "TMPDIR": str(tmp_path), "NPROC": "8"}
    command = [*container["command"], *map(local, container["args"])]

    env["PYTHON"] = script(tmp_path / "torchrun", f"{rank} & wait $!")
    pod = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    wait_for(up.exists)
    hook = [local(word) for word in container["lifecycle"]["preStop"]["exec"]["command"]]
    subprocess.run(hook, timeout=HANG, stderr=subprocess.DEVNULL)
    assert pod.wait(HANG) == 1 and json.loads(status.read_text())["step"] == 10

    env["PYTHON"] = script(tmp_path / "torchrun", f"cp {tmp_path}/done {status}")
    assert subprocess.run(command, env=env).returncode == 0
    env["PYTHON"] = "false"  # a pod that is started once more has nothing to do
    assert subprocess.run(command, env=env).returncode == 0
