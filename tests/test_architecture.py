"""Who may import what, checked on the syntax tree: Megatron behind one door, the loss and the data pure."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nemo_vopd"


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def importers(prefix: str, files) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in files
        if any(name == prefix or name.startswith(prefix + ".") for name in imports(path))
    }


FILES = sorted(PACKAGE.rglob("*.py"))


def test_loss_data_and_shapes_do_not_know_megatron_core():
    pure = [*(PACKAGE / "distill").glob("*.py"), *(PACKAGE / "data").glob("*.py"), PACKAGE / "batch.py"]
    pure += [PACKAGE / "config.py", PACKAGE / "errors.py"]
    assert not importers("megatron.core", pure)
    assert not importers("nemo", pure)
    inner = {"nemo_vopd.mcore", "nemo_vopd.vlm", "nemo_vopd.rollout", "nemo_vopd.model", "nemo_vopd.runtime"}
    assert not set().union(*(importers(name, pure) for name in inner))


def test_parallel_state_is_touched_in_one_module():
    touching = {str(p.relative_to(ROOT)) for p in FILES if "parallel_state." in p.read_text()}
    assert touching == {"nemo_vopd/mcore/parallel.py"}


def test_hydra_stays_at_the_edge():
    assert importers("hydra", FILES) == {"nemo_vopd/cli.py", "nemo_vopd/config.py"}


def test_nothing_in_the_package_imports_the_model_but_the_run():
    assert all(
        name.startswith(("nemo_vopd/training/", "nemo_vopd/tools/")) for name in importers("nemo_vopd.model", FILES)
    )


def test_files_stay_readable():
    longest = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in FILES}
    assert max(longest.values()) <= 400, longest
