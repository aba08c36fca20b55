"""docs/troubleshooting.md has every option, reason and word that can end a run, and no option that does not exist."""

import ast
import dataclasses
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_vopd.tools.evaluation.evaluate_options import EvaluateConfig
from recipes.prepare_data import PrepareConfig

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUICKSTART_OR_FILE = re.compile(r"warmup\.|.*\.(json|jsonl|lock|md|pt|previous|py|tar|yaml)$")
POSITION = {"OptionError": 0, "_require": 1}


def literal(path: str, name: str) -> Any:
    """The value of the constant `name` of a module, which need not be imported."""
    tree = ast.parse((ROOT / path).read_text())
    (value,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == name]
    return ast.literal_eval(value)


def refused_options(path: Path) -> Iterator[str]:
    """Options that a module refuses by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        for argument in node.args[POSITION.get(node.func.id, len(node.args)) :][:1]:
            if isinstance(argument, ast.Constant):
                yield argument.value


def test_every_option_that_can_be_refused_is_there():
    modules = [path for folder in ("nemo_vopd", "recipes") for path in (ROOT / folder).rglob("*.py")]
    options = {option for path in modules for option in refused_options(path)}
    assert len(options) > 40
    assert not {option for option in options if not re.search(rf"`{re.escape(option)}[`=]", PAGE)}


def test_the_bounds_of_all_options_are_up_to_date():
    spec = importlib.util.spec_from_file_location("options", ROOT / "docs" / "options.py")
    assert spec is not None and spec.loader is not None
    options = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(options)
    assert options.rows().count("\n") >= 6 and options.rows() in PAGE, "run python docs/options.py"


def test_every_drop_reason_and_every_end_of_a_run_is_there():
    words = {"vision_token_in_response", "running", *literal("nemo_vopd/images.py", "DROP_REASONS")}
    words |= set(literal("nemo_vopd/training/stopping.py", "REASONS"))
    assert not {word for word in words if f"`{word}`" not in PAGE}


def test_every_option_on_the_page_exists():
    code = " ".join(re.findall(r"`([^`]+)`", PAGE))
    names = set(re.findall(r"(?<![\w./-])[a-z_]+\.[\w.]+(?![\w./-])", code))
    assert len(names) > 70
    for name in {name for name in names if not QUICKSTART_OR_FILE.match(name)}:
        assert any(has_option(config, name) for config in (EvaluateConfig(), PrepareConfig())), name


def has_option(config: Any, name: str) -> bool:
    """Whether the dataclass `config` has `name`, a path with dots."""
    for part in name.split("."):
        fields = vars(config) if dataclasses.is_dataclass(config) else config
        if not isinstance(fields, dict) or part not in fields:
            return False
        config = fields[part]
    return True
