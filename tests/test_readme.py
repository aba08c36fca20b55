"""The commands of the README, as written, on small data: only paths, process counts and run length are replaced."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from nemo_vopd.tools.prepare.synthetic import write_digits
from tests.distributed import ROOT, run_recipe

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
SMALL = {
    "--config-name train_7b": [
        *["trainer.max_steps=2", "data.batch_size=2", "rollout.n=2", "rollout.max_response_length=4"],
        "parallel.tensor=2",  # a tiny model has two key-value heads, and this machine two cores
    ],
    "--config-name tiny": ["trainer.max_steps=2"],
    "recipes/generate.py": ["max_new_tokens=3"],
    "recipes/evaluate.py": ["limit=4", "rollout.max_response_length=4"],
}


def local(command: str, folder: Path, model: Path) -> tuple[int, list[str]]:
    """Number of processes and arguments of a README command with its placeholders replaced."""
    command = command.replace("my/", f"{folder}/").replace("Qwen2.5-VL-7B-Instruct", str(model))
    command = command.replace("runs/", f"{folder}/runs/")
    command = command.replace("photo.jpg", next((folder / "images").iterdir()).relative_to(folder).as_posix())
    command = command.replace("--nproc-per-node 8", "--nproc-per-node 2")
    program, *arguments = shlex.split(command)
    nproc = 1
    if program == "torchrun":
        assert arguments[0] == "--nproc-per-node"
        nproc, arguments = int(arguments[1]), arguments[2:]
    extra = [item for key, items in SMALL.items() if key in command for item in items]
    if "train_vopd" in command:
        name = "train_7b" if "--config-name train_7b" in command else "tiny"
        extra.append(f"exp_manager.exp_dir={folder}/runs/{name}")
    return nproc, [*arguments, *extra]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for line in COMMANDS if line.startswith("make ")]
    assert targets == ["quickstart", "test"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_commands_run_in_order(assets, tmp_path):
    write_digits(tmp_path / "digits", num_samples=24, seed=2)
    (tmp_path / "digits").rename(tmp_path / "my")
    commands = [line for line in COMMANDS if line.startswith(("python ", "torchrun "))]
    assert len(commands) == 9
    for command in commands:
        nproc, arguments = local(command, tmp_path / "my", assets / "tiny-vlm")
        done = run_recipe(*arguments, nproc=nproc, NEMO_VOPD_TINY=str(assets))
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
    assert (tmp_path / "my" / "runs" / "train_7b" / "results" / "gap.json").exists()
    assert (tmp_path / "my" / "runs" / "train_7b" / "report.html").exists()


def test_links_and_paths_name_files():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text()
        links = [page.parent / link for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text)]
        folders = "benchmarks|conf|docs|docker|nemo_vopd|recipes|slurm|tests"
        paths = [ROOT / path for path in re.findall(rf"`((?:{folders})/[\w./-]+\.(?:py|yaml|sh|md))`", text)]
        assert not [str(path) for path in (*links, *paths) if not path.exists()], page
