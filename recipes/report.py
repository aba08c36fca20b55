"""One self-contained HTML page about a run, made from the files in its folder; two folders are compared.

    python recipes/report.py runs/NAME
    python recipes/report.py runs/NAME runs/BASELINE
    python recipes/report.py runs/NAME results=[after.json] baseline_results=[before.json]

The page of one run is runs/NAME/report.html. A comparison is a page of its own, runs/NAME/report-NAME-vs-BASELINE.html,
and leaves the page of each run as it is; `output` names another file. Runs are called by the part of their paths in
which they differ: runs/a/train and runs/b/train are a and b.

Any run will do: finished, running, crashed, with files missing. Results of recipes/evaluate.py in `results` of the
run's folder are picked up by themselves.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from nemo_vopd.cli import run_recipe
from nemo_vopd.command_line import Command
from nemo_vopd.errors import OptionError
from nemo_vopd.tools.report.page import write_report
from nemo_vopd.tools.report.run_files import Results, is_run, names_apart, read_results, read_run
from nemo_vopd.validation import typed


@dataclasses.dataclass
class ReportConfig:
    """Options of this recipe."""

    runs: list[str] = dataclasses.field(default_factory=list)
    """The run's folder, and that of a run to compare it with; may be given as words without `runs=`."""
    output: str | None = None
    """The HTML file; null: in the run's folder report.html, or report-NAME-vs-BASELINE.html for two runs."""
    results: list[str] = dataclasses.field(default_factory=list)
    """JSON files of recipes/evaluate.py about this run, besides those in `results` of its folder."""
    baseline_results: list[str] = dataclasses.field(default_factory=list)
    """JSON files of recipes/evaluate.py to compare with; none: those of the second run."""


ConfigStore.instance().store(name="report_schema", node=ReportConfig)
COMMAND = Command(ReportConfig, "report")


def main(cfg: DictConfig) -> None:
    """Read the folders, write the page, print where it is."""
    config = typed(cfg, ReportConfig)
    folders = [_folder(name) for name in config.runs]
    if not 1 <= len(folders) <= 2:
        value = f"[{','.join(config.runs)}]"
        raise OptionError("runs", value, "must be one folder, or two to compare", "give recipes/report.py runs/NAME")
    page = "report.html"
    if len(folders) > 1:
        if os.path.samefile(*folders):
            raise OptionError("runs", f"[{','.join(config.runs)}]", "is one folder twice", "give two runs, or one")
        names = names_apart(*folders)
        page = f"report-{names[0]}-vs-{names[1]}.html".replace("/", "-")
    output = Path(config.output) if config.output else folders[0] / page
    if os.path.isdir(output):
        raise OptionError("output", output, "is a folder", f"give a file, {output / 'report.html'}")
    baseline_paths = [Path(name) for name in config.baseline_results]
    baseline = [_checked(path, "baseline_results") for path in baseline_paths]
    for name in config.results:
        _checked(Path(name), "results")
    run = read_run(folders[0], [Path(name) for name in config.results], leave_out=baseline_paths)
    other = read_run(folders[1]) if len(folders) > 1 else None
    if other:
        run.name, other.name = names_apart(*folders)
    try:
        write_report(output, run, other, baseline)
    except OSError as error:
        raise OptionError("output", output, f"cannot be written ({error.strerror})", "name another file") from None
    print(f"{run.name} compared with {other.name}: {output}" if other else output)


def _folder(name: str) -> Path:
    folder = Path(name)
    if not os.path.isdir(folder):
        raise OptionError("runs", name, "is no folder", "give the exp_manager.exp_dir of a run")
    if not is_run(folder) and not is_run(folder / "train"):
        rule = "holds no file of a run (metrics.jsonl, status.json, ...)"
        raise OptionError("runs", name, rule, "give the exp_manager.exp_dir of a run")
    return folder


def _checked(path: Path, option: str) -> Results:
    if not os.path.isfile(path):
        raise OptionError(option, path, "is no file", "give the JSON that recipes/evaluate.py output=FILE wrote")
    results = read_results(path, [])
    if not results.benchmarks:
        raise OptionError(option, path, "holds no results", "give the JSON that recipes/evaluate.py output=FILE wrote")
    return results


def folders_as_option(arguments: list[str]) -> list[str]:
    """`arguments` with the words among them, which are folders, as the option `runs`."""

    def is_word(i: int) -> bool:
        word, before = arguments[i], arguments[i - 1] if i else ""
        takes_value = before.startswith("-") and "=" not in before
        return not word.startswith("-") and not takes_value and ("=" not in word or os.path.isdir(word))

    words = [word for i, word in enumerate(arguments) if is_word(i)]
    rest = [word for i, word in enumerate(arguments) if not is_word(i)]
    quoted = ",".join("'" + word.replace("\\", "\\\\").replace("'", "\\'") + "'" for word in words)
    return [f"runs=[{quoted}]", *rest] if words else rest


if __name__ == "__main__":
    sys.argv[1:] = folders_as_option(sys.argv[1:])
    run_recipe(main, COMMAND)
