"""Who may import what, read from the syntax tree: no circles, no tool in the run, Megatron behind its doors."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("architecture", ROOT / "docs" / "architecture.py")
assert spec is not None and spec.loader is not None
architecture = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architecture)

FILES, MODULES = architecture.FILES, architecture.MODULES
IMPORTS = {name: architecture.imports(path) for name, path in MODULES.items()}


def importers(prefix: str, among=MODULES) -> set[str]:
    return {name for name in among if any(f"{used}.".startswith(f"{prefix}.") for used in IMPORTS[name])}


def below(*folders: str) -> set[str]:
    return {name for name in MODULES for folder in folders if f"{name}.".startswith(f"nemo_vopd.{folder}.")}


def test_there_is_no_circle():
    """Modules are taken away whose imports are all gone already, until none is left; a circle would stay."""
    left = {name: architecture.modules_of(used) - {name} for name, used in IMPORTS.items()}
    while free := [name for name, used in left.items() if not used & left.keys()]:
        for name in free:
            del left[name]
    assert not left, {name: used & left.keys() for name, used in left.items()}


def test_the_picture_is_up_to_date():
    assert architecture.mermaid() in architecture.DOCUMENT.read_text(), "run python docs/architecture.py"


def test_the_run_uses_no_tool():
    assert importers("nemo_vopd.tools") <= below("tools")
    outside = below("model", "training", "tools")
    assert importers("nemo_vopd.model") <= outside and importers("nemo_vopd.training") <= outside


def test_the_algorithm_does_not_know_megatron():
    pure = below("distill", "data", "views", "batch", "config", "errors")
    inner = ("mcore", "vlm", "rollout", "model", "training")
    for name in ("megatron.core", "nemo", "lightning", *(f"nemo_vopd.{part}" for part in inner)):
        assert not importers(name, pure), name


def test_megatron_has_few_doors():
    """mcore and vlm; the process groups that others take as an argument are only named there."""
    assert importers("megatron.core.parallel_state") <= {"nemo_vopd.mcore.parallel"}
    named = {"megatron.core.process_groups_config.ProcessGroupCollection"}
    others = MODULES.keys() - below("mcore", "vlm")
    users = {n for n in others if any(used.startswith("megatron.core.") for used in IMPORTS[n] - named)}
    # exceptions and queues of checkpoints, the loss of the warm-up
    assert users <= {"nemo_vopd.training.checkpoint", "nemo_vopd.training.environment", *below("tools")}


def test_hydra_stays_at_the_edge():
    assert importers("hydra") == {"nemo_vopd.cli", "nemo_vopd.command_line", "nemo_vopd.config"}


def test_one_word_names_one_thing():
    for word in ("checkpoint", "report", "convert", "evaluation"):
        named = {path.stem for path in FILES if path.stem.startswith(word)}
        assert len(named) <= 1, named


def test_files_stay_readable():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert max(lengths.values()) <= 350, {name: num for name, num in lengths.items() if num > 400}
