"""What of the base image must stay, and with which versions the rest is added: run before anything is installed.

python docker/keep_base.py pyproject.toml constraints.txt FOLDER

Writes FOLDER/base.json (name and version of every package that must stay), FOLDER/requirements.txt (the dependencies of
pyproject.toml) and FOLDER/constraints.txt (for pip). Standard library only.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import tomllib
from pathlib import Path

KEPT = re.compile(r"(torch.*|pytorch-triton|triton|numpy|transformer-engine.*|apex|flash-attn.*|nvidia-.*|cuda-.*)")
"""Built for this image's CUDA and torch; another build of any of them breaks the others."""


def normal(name: str) -> str:
    """The name under which PyPI knows a package."""
    return re.sub(r"[-_.]+", "-", name).lower()


PINNABLE = re.compile(r"[0-9]+(\.[0-9]+)*((a|b|rc)[0-9]+)?(\.post[0-9]+)?(\.dev[0-9]+)?(\+[A-Za-z0-9._-]+)?")
"""A version that pip reads; distributions have others, such as 1.2ubuntu3."""


def pins(text: str) -> dict[str, str]:
    """Name and version of each line `name==version`."""
    found = re.findall(r"^([\w.-]+)==(\S+)", text, flags=re.MULTILINE)
    return {normal(name): version for name, version in found}


def requirements(pyproject: str, extra: str = "") -> list[str]:
    """The entries of `project.dependencies`, or those of an extra, as written."""
    project = tomllib.loads(pyproject)["project"]
    return project["optional-dependencies"][extra] if extra else project["dependencies"]


def keep(installed: dict[str, str], fixed: set[str]) -> dict[str, str]:
    """Packages that must stay: those built for this image, and `fixed` ones, which pip could not remove."""
    stays = {name: version for name, version in installed.items() if KEPT.fullmatch(name) or name in fixed}
    return {name: version for name, version in stays.items() if PINNABLE.fullmatch(version)}


def constraints(kept: dict[str, str], installed: dict[str, str], wanted: list[str], tested: dict) -> list[str]:
    """Lines for pip: what stays; direct dependencies with a range, and packages the image lacks, as they were tested.

    Any other package of the image is left free: pip keeps it where it will do.
    """
    ranged = {normal(re.split(r"[\[<>=!~ ;]", entry)[0]) for entry in wanted if re.search(r"[<>=!~]", entry)}
    added = {name: version for name, version in tested.items() if name in ranged or name not in installed}
    return [f"{name}=={version}" for name, version in sorted({**added, **kept}.items())]


def main() -> None:
    """Read the installed packages and write the three files."""
    pyproject, tested, folder = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    installed, fixed = {}, set()
    for package in importlib.metadata.distributions():
        name = package.metadata["Name"]
        if not name or normal(name) in installed:  # the first on the path is the one that is imported
            continue
        installed[normal(name)] = package.version
        if not (package.read_text("RECORD") or package.read_text("installed-files.txt")):  # nobody knows its files
            fixed.add(normal(name))
    kept, wanted = keep(installed, fixed), requirements(pyproject.read_text())
    if "torch" not in kept:
        sys.exit("error: BASE: has no torch; give an NGC PyTorch or NeMo image")
    lines = constraints(kept, installed, wanted, pins(tested.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.json").write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    (folder / "requirements.txt").write_text("\n".join(wanted) + "\n")
    (folder / "constraints.txt").write_text("\n".join(lines) + "\n")
    print(f"{len(kept)} packages of the image stay, {len(lines) - len(kept)} are pinned as tested")


if __name__ == "__main__":
    main()
