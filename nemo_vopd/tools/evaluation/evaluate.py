"""recipes/evaluate.py beyond its options: questions to a model, answers to numbers, numbers to a table and a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from nemo_vopd.config import DataConfig
from nemo_vopd.data.dataset import fingerprint, require_dataset
from nemo_vopd.errors import OptionError
from nemo_vopd.mcore import parallel
from nemo_vopd.tools.evaluation.answers import Answer, AnswersFile, Model, ask, read_answers
from nemo_vopd.tools.evaluation.benchmarks import Benchmark, find_benchmark, read_benchmark
from nemo_vopd.tools.evaluation.judge import Judge
from nemo_vopd.tools.evaluation.models import NativeModel, ServedModel
from nemo_vopd.tools.evaluation.options import EvaluateConfig
from nemo_vopd.tools.evaluation.questions import Question, stored_questions
from nemo_vopd.tools.evaluation.results import compare, grade_all, summarise
from nemo_vopd.tools.evaluation.tables import table

GAP = Benchmark("gap", "Full and crop view", "", (), None)
"""The user's own Energon data set."""
NUM_SHOWN = 3


def evaluate(config: EvaluateConfig) -> dict[str, Any] | None:
    """Evaluate as `config` says; prints tables, writes `config.output`, returns the results on rank 0."""
    chosen = benchmarks(config.benchmark)
    output_file = None if config.output is None else Path(config.output)
    for benchmark in chosen:
        next(_questions(benchmark, config.data, []), None)  # a wrong column is told before the model is read
        if config.baseline is not None:
            _answers_of(config.baseline, benchmark.name)
    judge = None
    if config.judge.url is not None:
        judge = Judge(config.judge, None if output_file is None else _beside(output_file, "verdicts"))
    model, settings = _model(config), _settings(config)
    name = config.model.hf_path if config.engine == "native" else f"{config.server.model} at {config.server.url}"
    output: dict[str, Any] = {"model": name, "engine": config.engine, "data": config.data.path}
    output |= {"settings": settings, "results": {}, "comparison": {}}
    for benchmark in chosen:
        unusable: list[str] = []
        file = None
        if model.collects and output_file is not None:
            who = {"model": name, "weights": model.fingerprint()}
            if benchmark is GAP:
                who["data"] = fingerprint(config.data.path)
            file = AnswersFile(_beside(output_file, f"{benchmark.name}.answers"), {**who, **settings})
        answers = _ask(benchmark, model, file, config, unusable)
        if not model.collects:
            continue
        if not answers:
            _refuse_nothing(config.data.path, config.views, unusable)
        grades = grade_all(answers, judge)
        result = summarise(answers, grades, benchmark.scoring, config.seed)
        result |= {"title": benchmark.title, "num_unusable": len(unusable)}
        output["results"][benchmark.name] = result
        if config.baseline is not None:
            theirs = read_answers(_answers_of(config.baseline, benchmark.name), "baseline")
            found = compare(answers, grades, theirs, grade_all(theirs, judge), benchmark.scoring, config.seed)
            if found is not None:
                output["comparison"][benchmark.name] = {"baseline": config.baseline, **found}
            else:
                print(f"{benchmark.name}: the baseline answered none of these questions", flush=True)
        print(table(result, benchmark.num_questions, output["comparison"].get(benchmark.name)), flush=True)
        for reason in unusable[:NUM_SHOWN]:
            print(f"  not used: {reason}", flush=True)
    if not model.collects:
        return None
    if GAP.name in output["results"]:
        output |= _gap_lines(output["results"][GAP.name])
    if output_file is not None:
        _write(output_file, output)
    return output


def _ask(
    benchmark: Benchmark, model: Model, file: AnswersFile | None, config: EvaluateConfig, unusable: list[str]
) -> list[Answer]:
    """All answers to one benchmark, new and old."""
    try:
        return ask(
            islice(_questions(benchmark, config.data, unusable), config.limit),
            model,
            file,
            config.data,
            views=tuple(config.views),
            batch_size=config.batch_size,
            unusable=unusable,
            title=config.data.path if benchmark is GAP else benchmark.title,
        )
    finally:
        if file is not None:
            file.close()


def _refuse_nothing(path: str, views: list[str], unusable: list[str]) -> NoReturn:
    if views == ["crop"] and not unusable:
        raise OptionError("views", views, "there are neither boxes nor crops", "set views=[full]")
    first = f" ({unusable[0]})" if unusable else ""
    raise OptionError("data.path", path, f"holds no question that can be asked{first}", "check its images")


def _gap_lines(result: dict[str, Any]) -> dict[str, Any]:
    """Prints and returns the accuracies of both views and the gap under their short names."""
    lines = {f"{view}_accuracy": result[view]["accuracy"] for view in ("full", "crop") if view in result}
    if "gap" in result:
        lines["gap"] = result["gap"]
    print("\n".join(f"{name:14} {value:.4f}" for name, value in lines.items()), flush=True)
    return {"num_samples": result["num_samples"], **lines}


def _write(path: Path, output: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(output, indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)


def benchmarks(names: Any) -> Sequence[Benchmark]:
    """The benchmarks called `names` (one, a list, or several with commas); None is the user's own data set."""
    if names is None:
        return [GAP]
    listed = names.split(",") if isinstance(names, str) else list(names)
    if not listed:
        raise OptionError("benchmark", names, "is empty", "name at least one, or leave it out")
    return [find_benchmark(name) for name in listed]


def _questions(benchmark: Benchmark, data: DataConfig, unusable: list[str]) -> Iterator[Question]:
    if benchmark is not GAP:
        return read_benchmark(benchmark, Path(data.path), unusable)
    require_dataset(data.path)
    return stored_questions(data.path, data, unusable)


def _model(config: EvaluateConfig) -> Model:
    if config.engine == "native":
        return NativeModel(config, parallel.initialize(config.parallel, seed=config.seed))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        rule = "a server is asked by one process"
        raise OptionError("engine", config.engine, rule, "start it without torchrun")
    return ServedModel(config.server, config.rollout.max_response_length)


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    """What changes the replies, besides model and data."""
    data = config.data
    settings: dict[str, Any] = {"max_response_length": config.rollout.max_response_length}
    if config.engine == "native":
        pixels = {"full": data.full, "crop": data.crop_pixels}
        settings["dtype"] = config.precision.dtype
        settings["pixels"] = {view: [limits.min_pixels, limits.max_pixels] for view, limits in pixels.items()}
    else:
        settings["extra_body"] = config.server.extra_body
    return settings | {"crop": asdict(data.crop), "question_hint": data.question_hint}


def _beside(output: Path, kind: str) -> Path:
    return output.with_name(f"{output.stem}.{kind}.jsonl")


def _answers_of(baseline: str, name: str) -> Path:
    path = _beside(Path(baseline), f"{name}.answers")
    if not path.is_file():
        rule = f"has no answers to {name} beside it ({path.name})"
        raise OptionError("baseline", baseline, rule, "give the output of an evaluation of the same benchmarks")
    return path
