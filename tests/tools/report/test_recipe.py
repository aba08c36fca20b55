"""recipes/report.py as it is typed, on the folder of a real run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.distributed import ROOT, Finished, run_distributed, run_recipe
from tests.helpers import read_lines, tiny_config
from tests.tools.report.run_folder import results


def report(*arguments: object, cwd: Path = ROOT) -> Finished:
    return run_recipe("recipes/report.py", *map(str, arguments), cwd=cwd)


def train(config) -> None:
    from nemo_vopd.mcore import parallel
    from nemo_vopd.tools.during_training import GapDuringTraining
    from nemo_vopd.training.run import train

    train(config, evaluation=GapDuringTraining(config))
    parallel.destroy()


@pytest.fixture(scope="module")
def trained(assets, tmp_path_factory):
    """A finished run of two steps over two pipeline stages, with accuracy before and after."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = tiny_config(
        assets, folder, "trainer.max_steps=2", f"evaluation.path={assets / 'tiny-digits'}", "parallel.pipeline=2",
        "parallel.pipeline_layout=[1,2]",
        "evaluation.every_n_steps=2", "evaluation.num_samples=12", "evaluation.num_traces=2",
    )  # fmt: skip
    run_distributed(train, 2, config)
    return folder


def test_a_run_leaves_what_its_report_needs(trained):
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["parallel"]["pipeline"] == 2 and config["evaluation"]["num_traces"] == 2
    environment = json.loads((trained / "environment.json").read_text())
    assert environment["layout"] == {
        "processes": 2, "tensor": 1, "pipeline": 2, "data": 1, "sequence_parallel": False,
    }  # fmt: skip
    assert environment["versions"]["torch"] and environment["implementations"]["attention"]
    content = json.loads((trained / "examples.json").read_text())
    assert len(content["examples"]) == 9 and len(content["traces"]) == 2
    for card in content["examples"]:
        assert all(isinstance(card[key]["right"], bool) for key in ("full_before", "full_after", "crop_after"))
        assert card["image"]["uri"].startswith("data:image/png") and len(card["bbox"]) == 4
    first = content["traces"][0]
    assert len(first["tokens"]) == len(first["divergence"]) == len(first["teacher_top"]) > 0
    assert all(0 <= value <= 0.694 for value in first["divergence"])
    assert all(len(top) == 5 and top[0][1] >= top[1][1] for top in first["student_top"])


def test_the_page_of_a_run(trained):
    done = report(trained)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(trained / "report.html")
    text = (trained / "report.html").read_text()
    assert "Vision-OPD: tiny" in text and "Token by token" in text and "every_n_steps: 2" in text
    loss = read_lines(trained / "metrics.jsonl")[-1]["loss"]
    assert f"last {loss:.3f}" in text


def test_two_runs_and_results_with_output_elsewhere(trained, tmp_path):
    other, output = tmp_path / "it's a=baseline, [1]", tmp_path / "new" / "both.html"
    other.mkdir()
    (other / "status.json").write_text('{"reason": "max_time", "step": 1, "max_steps": 2, "finished": false}')
    for name, shift in (("before", 0.0), ("after", 0.1)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results(shift)))
    done = report(
        trained, other, f"output={output}", "results=[after.json]", "baseline_results=[before.json]", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    text = output.read_text()
    assert "it&#39;s a=baseline, [1]" in text and "V* Bench" in text and "+10.0" in text
    assert not (other / "report.html").exists()


def test_a_comparison_is_a_page_of_its_own(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "train").mkdir(parents=True)
        (tmp_path / name / "train" / "status.json").write_text('{"reason": "running", "step": 0, "max_steps": 65}')
        (tmp_path / name / "train" / "report.html").write_text("the page of one run")
    done = report("b/train", "a/train", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "b compared with a: b/train/report-b-vs-a.html"
    assert "Vision-OPD: b and a" in (tmp_path / "b" / "train" / "report-b-vs-a.html").read_text()
    assert {path.read_text() for path in tmp_path.glob("*/train/report.html")} == {"the page of one run"}
    told = report("--help")
    assert "A comparison is a page of its own, runs/NAME/report-NAME-vs-BASELINE.html" in told.stdout


def test_a_folder_without_metrics(tmp_path):
    (tmp_path / "status.json").write_text('{"reason": "running", "step": 0, "max_steps": 65, "finished": false}')
    done = report(tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.html").read_text()
    assert "No training step on record." in text and "still running, or ended without a word" in text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "error: runs=nowhere: is no folder; "),
        (["."], "error: runs=.: holds no file of a run "),
        ([], "error: runs=[]: must be one folder, or two to compare; "),
        (["run", "./run"], "error: runs=[run,./run]: is one folder twice; "),
        (["run", "run", "run"], "error: runs=[run,run,run]: must be one folder, or two to compare; "),
        (["run", "results=[a.json]"], "error: results=a.json: is no file; "),
        (["run", "baseline_results=[run/status.json]"], "error: baseline_results=run/status.json: holds no results; "),
        (["run", "output=run"], "error: output=run: is a folder; "),
        (["run", "output=run/status.json/x.html"], "error: output=run/status.json/x.html: cannot be written "),
        (["run", "colour=red"], "error: colour=red: no such option; "),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, line):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text("{}")
    done = report(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(line) and done.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["status.json"]
