"""Draws which part of the project imports which, for docs/architecture.md: `python docs/architecture.py` updates it."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nemo_vopd"
DOCUMENT = Path(__file__).with_suffix(".md")
EVERYWHERE = {"batch", "cli", "config", "errors", "bounds", "validation", "images", "decoding", "http", "hf_directory"}
"""Single files at the bottom that nearly everything imports; they are named in the text instead of drawn."""
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, inside functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules_of(names: set[str]) -> set[str]:
    """The modules of this package among imported `names`: a name is a module, or something in one."""
    return {name if name in MODULES else name.rpartition(".")[0] for name in names} & MODULES.keys()


def part_of(module: str) -> str | None:
    """The box that a module is drawn in, None for what is used everywhere."""
    _, *names = module.split(".")
    if not names or names[0] in EVERYWHERE:
        return None
    if names[0] == "tools":
        return "tools/" + (names[1] if (PACKAGE / "tools" / "/".join(names[1:2])).is_dir() and names[1:] else "*.py")
    return {"training.run": "training/run.py", "model": "model.py"}.get(".".join(names), names[0])


def graph() -> nx.DiGraph:
    """The parts and their imports; raises networkx.NetworkXError when there is a circle."""
    drawing = nx.DiGraph()
    sources = {name: (part_of(name), path) for name, path in MODULES.items()}
    for folder in ("recipes", "benchmarks"):
        sources |= {f"{folder}.{path.stem}": (folder, path) for path in (ROOT / folder).glob("*.py")}
    for part, path in sources.values():
        targets = {part_of(module) for module in modules_of(imports(path))}
        drawing.add_edges_from((part, target) for target in targets if part and target and part != target)
    return nx.transitive_reduction(drawing)


def mermaid() -> str:
    """The drawing as a Mermaid block."""
    drawing = graph()
    names = {part: f"n{i}" for i, part in enumerate(sorted(drawing))}
    lines = [f'  {name}["{part}"]' for part, name in names.items()]
    lines += sorted(f"  {names[a]} --> {names[b]}" for a, b in drawing.edges)
    return "```mermaid\nflowchart TD\n" + "\n".join(lines) + "\n```\n"


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    start = text.index("```mermaid")
    end = text.index("```\n", start) + len("```\n")
    DOCUMENT.write_text(text[:start] + mermaid() + text[end:])
