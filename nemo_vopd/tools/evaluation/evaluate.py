"""recipes/evaluate.py beyond its options: questions to a model, answers to numbers, numbers to a table and a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from nemo_vopd.data.dataset import fingerprint, require_dataset
from nemo_vopd.errors import OptionError
from nemo_vopd.mcore import parallel
from nemo_vopd.tools.evaluation.answers import Answer, AnswersFile, Model, ask, read_answers
from nemo_vopd.tools.evaluation.benchmarks import Benchmark, Scoring, find_benchmark, read_benchmark
from nemo_vopd.tools.evaluation.judge import Judge
from nemo_vopd.tools.evaluation.models import NativeModel, ServedModel
from nemo_vopd.tools.evaluation.options import EvaluateConfig
from nemo_vopd.tools.evaluation.questions import Question, stored_questions
from nemo_vopd.tools.evaluation.results import compare, grade_all, summarise
from nemo_vopd.tools.evaluation.tables import table

GAP = "gap"
"""Name of the results on an Energon data set."""
NUM_SHOWN = 3


def evaluate(config: EvaluateConfig) -> dict[str, Any] | None:
    """Evaluate as `config` says; prints tables, writes `config.output`, returns the results on rank 0."""
    chosen = benchmarks(config.benchmark)
    for benchmark in chosen:
        _first(benchmark, config)  # a wrong column is told before the model is read
        if config.baseline is not None:
            _answers_of(config.baseline, benchmark.name if benchmark else GAP)
    judge = None if config.judge.url is None else Judge(config.judge, _beside(config, "verdicts"))
    model = _model(config)
    output: dict[str, Any] = {"model": _model_name(config), "engine": config.engine, "data": config.data.path}
    output |= {"settings": _settings(config), "results": {}, "comparison": {}}
    for benchmark in chosen:
        name, scoring = (benchmark.name, benchmark.scoring) if benchmark else (GAP, Scoring())
        unusable: list[str] = []
        answers = _ask(benchmark, name, model, config, unusable)
        if not model.collects:
            continue
        if not answers:
            _refuse_nothing(config, unusable)
        grades = grade_all(answers, judge)
        result = summarise(answers, grades, scoring, config.seed)
        result |= {"title": benchmark.title if benchmark else "Full and crop view", "num_unusable": len(unusable)}
        output["results"][name] = result
        if config.baseline is not None:
            theirs = read_answers(_answers_of(config.baseline, name), "baseline")
            found = compare(answers, grades, theirs, grade_all(theirs, judge), scoring, config.seed)
            if found is not None:
                output["comparison"][name] = {"baseline": config.baseline, **found}
            else:
                print(f"{name}: the baseline answered none of these questions", flush=True)
        print(table(benchmark, result, output["comparison"].get(name)), flush=True)
        for reason in unusable[:NUM_SHOWN]:
            print(f"  not used: {reason}", flush=True)
    if not model.collects:
        return None
    if GAP in output["results"]:
        output |= _gap_lines(output["results"][GAP])
    if config.output is not None:
        _write(Path(config.output), output)
    return output


def _ask(
    benchmark: Benchmark | None, name: str, model: Model, config: EvaluateConfig, unusable: list[str]
) -> list[Answer]:
    """All answers to one benchmark, new and old."""
    file = None
    if model.collects and (path := _beside(config, f"{name}.answers")) is not None:
        who = {"model": _model_name(config), "weights": model.fingerprint()}
        if benchmark is None:
            who["data"] = fingerprint(config.data.path)
        file = AnswersFile(path, {**who, **_settings(config)})
    try:
        return ask(
            islice(_questions(benchmark, config, unusable), config.limit),
            model,
            file,
            config.data,
            views=tuple(config.views),
            batch_size=config.batch_size,
            unusable=unusable,
            title=benchmark.title if benchmark else config.data.path,
        )
    finally:
        if file is not None:
            file.close()


def _refuse_nothing(config: EvaluateConfig, unusable: list[str]) -> NoReturn:
    if config.views == ["crop"] and not unusable:
        raise OptionError("views", config.views, "there are neither boxes nor crops", "set views=[full]")
    first = f" ({unusable[0]})" if unusable else ""
    raise OptionError("data.path", config.data.path, f"holds no question that can be asked{first}", "check its images")


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


def benchmarks(names: Any) -> Sequence[Benchmark | None]:
    """The benchmarks called `names` (one, a list, or several with commas); None is the data set itself."""
    if names is None:
        return [None]
    listed = names.split(",") if isinstance(names, str) else list(names)
    if not listed:
        raise OptionError("benchmark", names, "is empty", "name at least one, or leave it out")
    return [find_benchmark(name) for name in listed]


def _questions(benchmark: Benchmark | None, config: EvaluateConfig, unusable: list[str]) -> Iterator[Question]:
    if benchmark is None:
        return stored_questions(config.data.path, config.data, unusable)
    return read_benchmark(benchmark, Path(config.data.path), unusable)


def _first(benchmark: Benchmark | None, config: EvaluateConfig) -> None:
    if benchmark is None:
        require_dataset(config.data.path)
    next(_questions(benchmark, config, []), None)


def _model(config: EvaluateConfig) -> Model:
    if config.engine == "native":
        return NativeModel(config, parallel.initialize(config.parallel, seed=config.seed))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        rule = "a server is asked by one process"
        raise OptionError("engine", config.engine, rule, "start it without torchrun")
    return ServedModel(config.server, config.rollout.max_response_length)


def _model_name(config: EvaluateConfig) -> str:
    return config.model.hf_path if config.engine == "native" else f"{config.server.model} at {config.server.url}"


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    """What changes the replies, besides model and data."""
    data = config.data
    settings: dict[str, Any] = {"max_response_length": config.rollout.max_response_length}
    if config.engine == "native":
        settings["dtype"] = config.precision.dtype
        settings["pixels"] = {
            k: [v.min_pixels, v.max_pixels] for k, v in (("full", data.full), ("crop", data.crop_pixels))
        }
    else:
        settings["extra_body"] = config.server.extra_body
    crop = data.crop
    settings["crop"] = {name: getattr(crop, name) for name in crop.__dataclass_fields__}
    settings["question_hint"] = data.question_hint
    return settings


def _beside(config: EvaluateConfig, kind: str) -> Path | None:
    return None if config.output is None else _named(Path(config.output), kind)


def _named(output: Path, kind: str) -> Path:
    return output.with_name(f"{output.stem}.{kind}.jsonl")


def _answers_of(baseline: str, name: str) -> Path:
    path = _named(Path(baseline), f"{name}.answers")
    if not path.is_file():
        rule = f"has no answers to {name} beside it ({path.name})"
        raise OptionError("baseline", baseline, rule, "give the output of an evaluation of the same benchmarks")
    return path
