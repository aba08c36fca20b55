"""Every benchmark in its published schema, end to end through a server and through the native engine."""

from __future__ import annotations

import base64
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

import recipes.evaluate  # noqa: F401  registers the options
from nemo_vopd.command_line import CONF
from nemo_vopd.errors import OptionError
from nemo_vopd.tools.evaluation.benchmark_files import read_benchmark, read_rows
from nemo_vopd.tools.evaluation.benchmarks import BENCHMARKS, find_benchmark, help_text
from nemo_vopd.tools.evaluation.evaluate import evaluate
from nemo_vopd.tools.evaluation.evaluate_options import EvaluateConfig
from nemo_vopd.validation import from_hydra
from tests.distributed import run_recipe
from tests.tools.evaluation.published import (
    LETTERS,
    NUM,
    PUBLISHED,
    RIGHT,
    Server,
    base64_png,
    categories,
    listed,
    reply,
    tsv,
    which,
)

FORMS = [(name, form) for name, forms in PUBLISHED.items() for form in forms]
CATEGORIES = {
    "vstar": ("direct_attributes", "relative_position"),
    "zoombench": ("choice", "open"),
    "hrbench-4k": ("single", "cross"),
    "hrbench-8k": ("single", "cross"),
    "mme-realworld": ("Perception", "Reasoning"),
    "mme-realworld-cn": ("Perception", "Reasoning"),
    "mme-realworld-lite": ("Perception", "Reasoning"),
    "visualprobe": ("Easy", "Hard"),
    "mmvp": (),
    "cv-bench": ("2D", "3D"),
    "mmstar": ("coarse perception", "math"),
    "pope": ("adversarial", "random"),
}
REALWORLD = f"What is it? The choices are listed below:\n{listed()}\nSelect the best answer to the above "
PROMPTS = {
    "vstar": f"What is it?\n{listed()}\nAnswer with the option's letter from the given choices directly.",
    "zoombench": "What is it?\nA. red\nB. dark red\nC. blue\nD. 3",
    "hrbench-4k": f"What is it? Select from the following choices.\n{listed()}",
    "mme-realworld": REALWORLD
    + "multiple-choice question based on the image. Respond with only the letter (A, B, C, D, or E) of the correct "
    "option.\nThe best answer is: ",
    "mme-realworld-cn": f"What is it? 选项如下所示:\n{listed()}\n根据图像选择上述多项选择题的最佳答案。"
    "只需回答正确选项的字母（A, B, C, D 或 E）。\n最佳答案为： ",
    "visualprobe": "What is written there?",
    "mmvp": "Is it open, or closed? (a) Open (b) Closed",
    "cv-bench": f"What is it? Select from the following choices.\n{listed()}",
    "mmstar": "What is it?\nOptions: A: red, B: dark red, C: blue, D: 3",
    "pope": "Is there a dog in the image?\nAnswer the question using a single word or phrase.",
}
PROMPTS |= {"hrbench-8k": PROMPTS["hrbench-4k"], "mme-realworld-lite": PROMPTS["mme-realworld"]}


def configured(*overrides: str) -> EvaluateConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return from_hydra(compose("evaluate", overrides=list(overrides)), EvaluateConfig)


def served(url: str, *overrides: str) -> EvaluateConfig:
    server = ["engine=server", f"server.url={url}", "server.model=m", "model.hf_path=m", "server.retries=3"]
    return configured(*server, *overrides)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """One folder with every benchmark in every form: {(name, form): folder}."""
    root = tmp_path_factory.mktemp("published")
    folders = {}
    for name, form in FORMS:
        folders[name, form] = root / form / name
        folders[name, form].mkdir(parents=True)
        PUBLISHED[name][form](folders[name, form])
    return folders


@pytest.fixture
def server(request):
    asked: dict[int, str] = {}

    def answer(text, image):
        index, view = which(image)
        asked.setdefault(index, text)
        return reply(request.node.current, index, view)

    with Server(answer).running() as running:
        running.asked = asked
        yield running


@pytest.mark.parametrize("name,form", FORMS)
def test_known_replies_give_the_known_score_in_every_category(name, form, published, server, request):
    request.node.current = name
    result = evaluate(served(server.url, f"benchmark={name}", f"data.path={published[name, form]}"))["results"][name]
    of_categories = name in ("visualprobe", "cv-bench")
    assert result["accuracy"] == pytest.approx((0.75 + 0.5) / 2 if of_categories else 4 / 6)
    assert result["num_samples"] == NUM and result["num_unusable"] == 0
    for category, accuracy, count in zip(CATEGORIES[name], (0.75, 0.5), (4, 2), strict=False):
        found = result["categories"][category]
        assert found["full"] == accuracy and found["num_samples"] == count, (category, found)
    low, high = result["full"]["interval"]
    assert 0 <= low < result["accuracy"] < high <= 1
    assert server.asked[0] == PROMPTS[name]
    assert [body["temperature"] for body, _ in server.requests] == [0.0] * len(server.requests)
    if name == "pope":
        expected = {"precision": 3 / 5, "recall": 1.0, "f1": 0.75, "yes_ratio": 5 / 6}
        assert result["metrics"] == pytest.approx(expected)
    elif name == "mmvp":
        assert result["metrics"] == pytest.approx({"pair_accuracy": 1 / 3})
    else:
        assert result["metrics"] == {}
    if name == "zoombench":
        assert result["crop"]["accuracy"] == 1 and result["gap"] == pytest.approx(2 / 6)
    else:
        assert "crop" not in result and "gap" not in result


def test_every_benchmark_is_tested_and_told_of(published):
    assert set(PUBLISHED) == set(BENCHMARKS) == set(CATEGORIES) == set(PROMPTS)
    done = run_recipe("recipes/evaluate.py", "--help")
    assert done.returncode == 0 and help_text() in done.stdout
    for benchmark in BENCHMARKS.values():
        assert benchmark.published in done.stdout
        assert all(", ".join(source.columns) in done.stdout for source in benchmark.sources)


@pytest.mark.parametrize("name", ["V*", "HR-Bench 4K", "hr_bench_8k", "MME_RealWorld_CN", "CVBench", "POPE", "v-star"])
def test_names_are_taken_as_people_write_them(name):
    assert find_benchmark(name).name in BENCHMARKS


def test_one_folder_may_hold_all_benchmarks(published):
    root = published["vstar", "parquet"].parent
    for name in ("mmstar", "pope", "vstar", "mme-realworld-cn"):
        questions = list(read_benchmark(BENCHMARKS[name], root, []))
        assert len(questions) == NUM and [q.category for q in questions] == categories(*CATEGORIES[name])
        assert len({q.id for q in questions}) == NUM


def test_a_wrong_column_set_says_which_column_is_missing(tmp_path, published):
    wrong = tmp_path / "vstar"
    tsv(wrong / "x.tsv", index=[1], image=["a"], question=["q"], A=["x"], B=["y"], category=["c"])
    config = served("http://localhost:9/v1", "benchmark=vstar", f"data.path={wrong}")
    with pytest.raises(OptionError, match=r"data.path=.*x.tsv: has no column 'answer' \(columns: index, image"):
        evaluate(config)
    shutil.copytree(published["zoombench", "parquet"], tmp_path / "z")
    with pytest.raises(OptionError, match=r"test.parquet: has no column 'text' .*columns: id, query"):
        evaluate(served("http://localhost:9/v1", "benchmark=vstar", f"data.path={tmp_path / 'z'}"))
    for name, path, words in (
        ("vstar", tmp_path / "none", "does not exist"),
        ("mmvp", tmp_path / "z", "test.parquet: has no column 'Index'"),
        ("mmvp", published["visualprobe", "json"], r"holds no file of MMVP .Questions.csv or"),
        ("nonsense", tmp_path, "benchmark=nonsense: is unknown; choose from vstar, zoombench"),
    ):
        with pytest.raises(OptionError, match=words):
            evaluate(served("http://localhost:9/v1", f"benchmark={name}", f"data.path={path}"))
    tsv(tmp_path / "empty" / "MMVP.tsv", index=[], image=[], question=[], A=[], B=[], answer=[])
    with pytest.raises(OptionError, match="holds no usable question of MMVP"):
        evaluate(served("http://localhost:9/v1", "benchmark=mmvp", f"data.path={tmp_path / 'empty'}"))
    shutil.copytree(published["visualprobe", "json"], tmp_path / "probe")
    for records, column in (([{"images": ["a.png"], "problem": "?"}], "solution"), ([], "images")):
        (tmp_path / "probe" / "VisualProbe_Hard" / "val.json").write_text(json.dumps(records))
        with pytest.raises(OptionError, match=f"VisualProbe_Hard/val.json: has no column '{column}'"):
            evaluate(served("http://localhost:9/v1", "benchmark=visualprobe", f"data.path={tmp_path / 'probe'}"))
    cut = tmp_path / "cut" / "mmstar.parquet"
    cut.parent.mkdir()
    cut.write_bytes((published["mmstar", "parquet"] / "mmstar.parquet").read_bytes()[:-100])
    with pytest.raises(OptionError, match="mmstar.parquet: cannot be read"):
        evaluate(served("http://localhost:9/v1", "benchmark=mmstar", f"data.path={cut.parent}"))


def test_rows_that_cannot_be_used_are_left_out_and_told(tmp_path, server, request, capsys):
    request.node.current = "mmstar"
    PUBLISHED["mmvp"]["tsv"](tmp_path)
    lines = (tmp_path / "MMVP.tsv").read_text().splitlines()
    lines[2] = lines[2].rsplit("\t", 1)[0] + "\tZ"
    lines[3] = "\t".join([*lines[3].split("\t")[:1], "", *lines[3].split("\t")[2:]])
    (tmp_path / "MMVP.tsv").write_text("\n".join(lines) + "\n")
    request.node.current = "mmvp"
    result = evaluate(served(server.url, "benchmark=mmvp", f"data.path={tmp_path}"))["results"]["mmvp"]
    assert result["num_samples"] == NUM - 2 and result["num_unusable"] == 2
    out = capsys.readouterr().out
    assert "4 questions of 300" in out and "MMVP.tsv, row 2: has the answer 'Z'" in out and "row 3: has no image" in out


def test_cells_of_other_writers_are_read_or_the_reason_is_told(tmp_path):
    """Options that are numbers, 0 among them; empty cells as None and NaN; base64 in lines and without padding."""
    image = base64.b64decode(base64_png(0))
    encoded = base64.b64encode(image).decode()
    spellings = [
        encoded,
        encoded.rstrip("="),
        "\n".join(encoded[i : i + 76] for i in range(0, len(encoded), 76)),
        f"data:image/png;base64,{encoded}",
        f" {encoded}\r\n",
    ]
    whole = {"question": "How many?", "A": 0, "B": 1, "C": 0.5, "D": float("nan"), "answer": "A", "category": "x"}
    rows = [{**whole, "index": number, "l2_category": "y", "image": text} for number, text in enumerate(spellings)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns["A"] = [0] * len(rows)
    (tmp_path / "mmstar").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "mmstar" / "mmstar.parquet")
    unusable: list[str] = []
    questions = list(read_benchmark(find_benchmark("mmstar"), tmp_path, unusable))
    assert [q.options for q in questions] == [{"A": "0", "B": "1", "C": "0.5"}] * len(rows) and not unusable
    assert [q.full for q in questions] == [image] * len(rows)
    for cell, reason in (
        ("not base64!", "neither base64 nor"),
        ("['a', 'b']", "neither base64 nor"),
        ("", "has no image"),
        (None, "has no image"),
    ):
        columns["image"] = [encoded] * (len(rows) - 1) + [cell]
        pq.write_table(pa.table(columns), tmp_path / "mmstar" / "mmstar.parquet")
        unusable = []
        assert len(list(read_benchmark(find_benchmark("mmstar"), tmp_path, unusable))) == len(rows) - 1
        assert f"mmstar.parquet, row {len(rows)}: " in unusable[0] and reason in unusable[0]


def test_tsv_images_that_point_to_an_earlier_row(tmp_path):
    images = [base64_png(0), "10", base64_png(2), "10", "30"]
    tsv(tmp_path / "a.tsv", index=[10, 20, 30, 40, 50], image=images)
    rows = list(read_rows(tmp_path / "a.tsv", ["index", "image"]))
    assert [row["image"] for row in rows] == [images[0], images[0], images[2], images[0], images[2]]


def constant_model(source, folder, word: str):
    """A copy of the tiny model that answers every prompt with `word`: two directions of the residual stream carry
    "answer now" and "end now" past layers that may not write to them."""
    shutil.copytree(source, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    token = vocabulary[word] = vocabulary.pop("white")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight")) and "visual" not in name:
            weight[:2] = 0
        elif name.endswith("embed_tokens.weight"):
            weight[:, 0], weight[:, 1] = 100.0, 0.0
            weight[token, 1] = 1000.0
        elif name == "lm_head.weight":
            weight.zero_()
            weight[token, 0], weight[vocabulary["<|im_end|>"], 1] = 1.0, 5.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_native_engine_gives_the_known_score(assets, published, tmp_path, groups):
    """A model that always says B: right exactly where B is the answer; one that always says yes, for POPE."""
    root = published["vstar", "parquet"].parent
    names = [name for name, form in FORMS if form == "parquet" and name not in ("pope", "mmvp")]
    small = ["data.full.max_pixels=12544", "precision.dtype=fp32", "rollout.max_response_length=4", "batch_size=4"]
    model = constant_model(assets / "tiny-vlm", tmp_path / "b", "B")
    config = configured(f"model.hf_path={model}", f"benchmark=[{','.join(names)}]", f"data.path={root}", *small)
    results = evaluate(config)["results"]
    assert LETTERS == ["B", "A", "D", "C", "A", "B"] and list(results) == names
    for name in names:
        first, second = (results[name]["categories"][category]["full"] for category in CATEGORIES[name])
        # ZoomBench's open questions ask for numbers
        assert (first, second) == ((0.25, 0.0) if name == "zoombench" else (0.25, 0.5)), name
    assert results["vstar"]["accuracy"] == pytest.approx(2 / 6)
    assert results["cv-bench"]["accuracy"] == pytest.approx(0.375)
    assert results["zoombench"]["crop"]["accuracy"] == pytest.approx(1 / 6) and results["zoombench"]["gap"] == 0

    model = constant_model(assets / "tiny-vlm", tmp_path / "yes", "yes")
    pope = f"data.path={published['pope', 'tsv']}"
    result = evaluate(configured(f"model.hf_path={model}", "benchmark=pope", pope, *small))["results"]["pope"]
    assert result["accuracy"] == 0.5 and result["metrics"]["yes_ratio"] == 1 and result["metrics"]["precision"] == 0.5
    model = constant_model(assets / "tiny-vlm", tmp_path / "exit", "b")
    mmvp = f"data.path={published['mmvp', 'csv']}"
    result = evaluate(configured(f"model.hf_path={model}", "benchmark=mmvp", mmvp, *small))["results"]["mmvp"]
    assert result["accuracy"] == 0.5 and result["metrics"] == {"pair_accuracy": 0.0}
    model = constant_model(assets / "tiny-vlm", tmp_path / "text", "exit")
    probe = f"data.path={published['visualprobe', 'json']}"
    result = evaluate(configured(f"model.hf_path={model}", "benchmark=visualprobe", probe, *small))["results"]
    assert result["visualprobe"]["accuracy"] == 0 and result["visualprobe"]["full"]["num_undecided"] == NUM


def test_the_right_four_are_right():
    assert RIGHT == [True, True, True, False, True, False]
