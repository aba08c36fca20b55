"""What people type: unknown options however they are written, texts with any characters, help, Hydra's own mistakes."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from nemo_vopd.command_line import CONF, Command, did_you_mean, help_text, options, read, taken_literally
from nemo_vopd.config import Config
from nemo_vopd.errors import OptionError
from nemo_vopd.tools.evaluation.evaluate_options import EvaluateConfig
from nemo_vopd.tools.planning.assumptions import PlanConfig
from nemo_vopd.validation import typed
from recipes.generate import COMMAND as GENERATE
from recipes.report import folders_as_option
from tests.distributed import HANG, ROOT

TRAIN = Command(Config, None)
TEXTS = [
    "What is, this?",
    "is it (red), or {blue}?",
    "a=b",
    'say "hello" twice',
    "it's here",
    "[1, 2]",
    "null",
    "3",
    "${seed} and $HOME",
    r"back\slash \${x} \\${y}",
    "什么颜色？\n第二行",
    "-m",
    "'half",
    "'a' and 'b'",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_is_taken_as_it_is(text):
    arguments, texts = read(["model.hf_path=M", f"prompt={text}", "image=my photo (1), b.jpg"], GENERATE)
    assert texts == {"prompt": text, "image": "my photo (1), b.jpg"} and arguments == ["model.hf_path=M"]
    # OmegaConf gives it back, and would not without the escape where there is something to interpolate
    config = OmegaConf.create({"prompt": taken_literally(text), "seed": 1})
    assert config.prompt == text


def test_the_quotes_that_hydra_asks_for_are_taken_off():
    for quoted in ("'What is, this?'", '"What is, this?"'):
        assert read([f"prompt={quoted}"], GENERATE)[1] == {"prompt": "What is, this?"}
    assert read([r"prompt='it\'s here'"], GENERATE)[1] == {"prompt": "it's here"}


def test_what_hydra_can_read_stays_and_other_texts_get_quotes():
    plain = [
        "seed=3",
        "rollout.stop=[a,b]",
        "data.full={min_pixels: 1}",
        "data.path=/a/b",
        "data.path='/a b,c'",
        "~seed",
    ]
    assert read(["--config-name", "tiny", *plain], TRAIN)[0] == [*plain, "--config-name=tiny"]
    arguments, _ = read(["-cn=tiny", "data.path=/a (1)/b,c", r"data.question_hint=it\'s, odd"], TRAIN)
    assert arguments == ["data.path='/a (1)/b,c'", r"data.question_hint='it\\\'s, odd'", "--config-name=tiny"]
    # NeMo's own options need Hydra's plus, which nobody has to know; options of ours never do
    asked = ["exp_manager.create_mlflow_logger=true", "+exp_manager.name=x", "+seed=2", "+model=tiny"]
    assert read(["-cn", "tiny", *asked], TRAIN)[0][:4] == [
        "++exp_manager.create_mlflow_logger=true",
        "++exp_manager.name=x",
        "seed=2",
        "+model=tiny",
    ]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["model.hf_path=M"], "--config-name: says which configuration to use, and none was given; choose one of tiny"),
        (["--config-name"], "--config-name=?: is no configuration of this command; choose one of tiny"),
        (
            ["--config-name", "evaluate"],
            "--config-name=evaluate: is no configuration of this command; choose one of tiny",
        ),
        (["-cn", "tiny", "-m", "seed=1,2"], "-m: starts several runs in one process"),
        (["-cn", "tiny", "--multirun", "seed=1,2"], "--multirun: starts several runs in one process"),
        (["-cn", "tiny", "--steps", "3"], "--steps: is no flag of this command"),
        (
            ["-cn", "tiny", "rollout.stop=[a,", "b]"],
            "rollout.stop=[a,: is cut at a space; put quotes around it, 'rollout",
        ),
        (
            ["-cn", "tiny", "optimizer.lr=1e-3,1e-4"],
            "optimizer.lr=1e-3,1e-4: is several values, and one command is one run",
        ),
        (["-cn", "tiny", "trainer.max_steps=(3"], "trainer.max_steps=(3: cannot be read as a value"),
        (["-cn", "tiny", "faster"], "faster: is not of the form option=value"),
    ],
)
def test_mistakes_before_hydra(arguments, words):
    with pytest.raises(OptionError) as refused:
        read(arguments, TRAIN)
    assert str(refused.value).startswith(words), str(refused.value)


def test_a_file_is_found_by_its_path(tmp_path, monkeypatch):
    for name in ("conf/tiny.yaml", "tiny.yaml", "./conf/tiny", f"{ROOT}/conf/tiny.yaml"):
        assert read(["--config-name", name, "seed=2"], TRAIN)[0] == ["seed=2", "--config-name=tiny"]
    (tmp_path / "mine.yaml").write_text("defaults: [train]\n")
    with pytest.raises(OptionError, match=f"write --config-dir {tmp_path} --config-name mine$"):
        read(["--config-name", f"{tmp_path}/mine.yaml"], TRAIN)
    assert read(["--config-name", "train", "seed=2", "-cn=tiny"], TRAIN)[0] == ["seed=2", "--config-name=tiny"]
    own = ["--config-dir", str(tmp_path), "--config-name", "mine"]
    assert read(own, TRAIN)[0] == ["--config-dir", str(tmp_path), "--config-name=mine"]


def test_what_was_meant():
    assert did_you_mean("trainer.max_step", Config).startswith("did you mean trainer.max_steps")
    assert did_you_mean("max_steps", Config) == "did you mean trainer.max_steps?"
    assert did_you_mean("optimizer.learning_rate", Config).startswith("optimizer has lr, min_lr, beta1")
    assert did_you_mean("lora.rank", Config).startswith("there are seed, num_nodes, model")


def test_help_shows_every_option_with_its_meaning():
    text = help_text(TRAIN, "Train.")
    for option in options(Config):
        assert f"\n  {option.name}{'.' if isinstance(option.default, dict) else ' = '}" in text
    own = " ".join(help_text(Command(EvaluateConfig, "evaluate"), "Ask.").split())
    assert "judge.url = null" in own and "trainer.max_steps =" not in own and "(must be one of native, server)" in own
    undocumented = [o.name for o in options(EvaluateConfig) if not o.meaning and not o.rule]
    groups = ("data.full", "data.crop_pixels", "distill.early_stop")  # which are explained as a whole
    assert not [name for name in undocumented if not name.startswith(groups)]


PROCESSES = [
    (
        "train_vopd.py -cn tiny +trainer.max_step=1",
        "trainer.max_step=1: no such option; did you mean trainer.max_steps",
    ),
    (
        "train_vopd.py -cn tiny ++optimizer.learning_rate=5",
        "optimizer.learning_rate=5: no such option; optimizer has lr",
    ),
    ("train_vopd.py -cn tiny +lora.rank=16", "lora.rank=16: no such option; there are seed"),
    ("train_vopd.py -cn tiny rollout.nn=3", "rollout.nn=3: no such option; did you mean rollout.n"),
    (
        "train_vopd.py -cn tiny data.full={min_pixels:1,maxpixels:5}",
        "data.full={min_pixels:1,maxpixels:5}: no such option",
    ),
    (
        "train_vopd.py -cn tiny rollout=vlm",
        "rollout=vlm: there is no conf/rollout/vlm.yaml; choose one of megatron, replay",
    ),
    ("train_vopd.py -cn train model=tiny", "model=tiny: this configuration has no model yet; write +model=tiny"),
    (
        "train_vopd.py -cn tiny model.freeze=vision",
        "model.freeze=vision: model.freeze is a group of options; did you mean",
    ),
    ("train_vopd.py -cn tiny trainer.max_steps=1.5", "trainer.max_steps=1.5: must be a whole number"),
    ("train_vopd.py -cn tiny trainer.max_steps=null", "trainer.max_steps=null: needs a value"),
    (
        "train_vopd.py -cn tiny data.question_hint=${oc.env:HOME}",
        "would write the environment variable HOME into config.yaml",
    ),
    ("prepare_data.py source=a output=b colums.question=q", "colums.question=q: no such option; did you mean columns"),
    ("evaluate.py benchmarks=vstar", "benchmarks=vstar: no such option; did you mean benchmark"),
    ("plan.py -cn train_72b +gpus=8", "gpus=8: no such option; did you mean gpu"),
    ("launch.py -- parallel.tensor=2", "--config-name: says which configuration to use, and none was given"),
]


def test_mistakes_that_hydra_or_the_schema_finds():
    """One line, code 2, nothing written; Megatron is not even imported."""

    def ask(command):
        run = [sys.executable, *f"recipes/{command}".split()]
        return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=HANG)

    with ThreadPoolExecutor(2) as pool:
        for (command, words), done in zip(PROCESSES, pool.map(ask, [row[0] for row in PROCESSES]), strict=True):
            lines = done.stderr.splitlines()
            assert done.returncode == 2 and len(lines) == 1 and words in lines[0], (command, done.stderr[-600:])


def test_a_recipe_says_how_it_is_called():
    recipes = [file for file in (ROOT / "recipes").glob("*.py") if "run_recipe(" in file.read_text()]

    def ask(file):
        return subprocess.run([sys.executable, str(file), "--help"], capture_output=True, text=True, timeout=HANG)

    with ThreadPoolExecutor(2) as pool:
        for file, done in zip(recipes, pool.map(ask, recipes), strict=True):
            assert done.returncode == 0 and not done.stderr, (file, done.stderr[-600:])
            assert f"recipes/{file.name}" in done.stdout and "\nOptions (NAME=VALUE):\n" in done.stdout
            shown = "\nConfigurations (--config-name NAME, files in conf/):\n" in done.stdout
            assert shown == (file.stem in ("train_vopd", "plan")), file


def documented():
    """Every command line of a recipe in README, docs and docstrings: (recipe, arguments)."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = [block for page in pages for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)]
    texts += [ast.get_docstring(ast.parse(file.read_text())) or "" for file in sorted((ROOT / "recipes").glob("*.py"))]
    for line in "\n".join(texts).replace("\\\n", " ").splitlines():
        if found := re.match(r"\s*(?:\w+=\S+ )*(?:python|torchrun|\S+/bin/python)\b.*?recipes/(\w+)\.py(.*)", line):
            yield found[1], shlex.split(found[2], comments=True)


def test_every_documented_command_has_options_that_exist():
    store, seen = ConfigStore.instance(), Counter()
    for recipe, arguments in documented():
        seen[recipe] += 1
        if "--help" in arguments:
            continue
        command = importlib.import_module(f"recipes.{recipe}").COMMAND
        # plan.py gives training configurations its own options, in a process of its own
        store.store(name="nemo_vopd", node=PlanConfig if recipe == "plan" else Config)
        if recipe == "report":
            arguments = folders_as_option(arguments)
        parts = [(command, arguments)]
        if "--" in arguments:
            cut = arguments.index("--")
            parts = [(command, arguments[:cut]), (TRAIN, arguments[cut + 1 :])]
        for asked, words in parts:
            words = [word for word in words if word not in ("--json", "--preview")]
            try:
                overrides, texts = read(words, asked)
                named = [word.partition("=")[2] for word in overrides if word.startswith("--config-name=")]
                with initialize_config_dir(str(CONF), version_base="1.3"):
                    config = compose((named or [asked.config_name])[0], [w for w in overrides if not w.startswith("-")])
                for option, text in texts.items():
                    config[option] = taken_literally(text)
                if "engine=server" in words:  # the server has the model
                    config.model.hf_path = "none"
                typed(config, asked.schema)
            except Exception as error:
                raise AssertionError(f"{recipe}.py {shlex.join(words)}") from error
    store.store(name="nemo_vopd", node=Config)
    assert set(seen) >= {"train_vopd", "prepare_data", "plan", "generate", "evaluate", "report", "launch"}, seen
    assert seen.total() > 40
