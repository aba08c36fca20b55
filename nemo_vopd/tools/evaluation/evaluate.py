"""recipes/evaluate.py beyond its options: questions to a model, answers to numbers, numbers to a table and a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from nemo_vopd.batch import View
from nemo_vopd.config import DataConfig, PixelConfig
from nemo_vopd.data.dataset import fingerprint, require_dataset
from nemo_vopd.data.processor import Processor
from nemo_vopd.errors import OptionError
from nemo_vopd.hf_directory import weight_files
from nemo_vopd.images import UnusableSample
from nemo_vopd.mcore import parallel
from nemo_vopd.rollout.native.engine import Decoder
from nemo_vopd.tools.evaluation.asking import AnswersFile, Asked, Model, NotAnswered, ask, read_answers
from nemo_vopd.tools.evaluation.benchmark_files import read_benchmark
from nemo_vopd.tools.evaluation.benchmarks import Benchmark, find_benchmark
from nemo_vopd.tools.evaluation.chat_server import Endpoint, Judge, served_model
from nemo_vopd.tools.evaluation.evaluate_options import EvaluateConfig
from nemo_vopd.tools.evaluation.gap import answers, greedy
from nemo_vopd.tools.evaluation.questions import Question, stored_questions
from nemo_vopd.tools.evaluation.results import compare, grade_all, summarise, table
from nemo_vopd.vlm.build import build_vlm, check_model

GAP = Benchmark("gap", "Full and crop view", "", None, protocol=None)
"""The user's own Energon data set."""
NUM_SHOWN = 3
_NUM_BLOCKS, _BLOCK_BYTES = 16, 1 << 16


def evaluate(config: EvaluateConfig) -> dict[str, Any] | None:
    """Evaluate as `config` says; prints tables, writes `config.output`, returns the results on rank 0."""
    benchmarks, data, native = _benchmarks(config.benchmark), config.data, config.engine == "native"
    output_file = None if config.output is None else Path(config.output)
    for benchmark in benchmarks:
        # a wrong column or option is told before the model is read
        next(_questions(benchmark, data, []), None)
        _setup(config, benchmark, PixelConfig() if native else None)
        if config.baseline is not None:
            _answers_of(config.baseline, benchmark.name)
    judge = None
    if config.judge.url is not None:
        judge = Judge(config.judge, None if output_file is None else _beside(output_file, "verdicts"))
    name = config.model.hf_path if native else f"{config.server.model} at {config.server.url}"
    under_test = _under_test(config)
    output: dict[str, Any] = {"model": name, "engine": config.engine, "data": data.path, "protocol": config.protocol}
    output |= {"settings": {}, "results": {}, "comparison": {}}
    for benchmark in benchmarks:
        unusable: list[str] = []
        setup = _setup(config, benchmark, under_test.pixels)
        output["settings"][benchmark.name] = settings = _settings(config, setup)
        with contextlib.ExitStack() as closing:
            file = None
            if output_file is not None and parallel.is_rank_zero():
                who = {"model": name, "weights": weights_fingerprint(Path(config.model.hf_path)) if native else None}
                if benchmark is GAP:
                    who["data"] = fingerprint(data.path)
                file = AnswersFile(_beside(output_file, f"{benchmark.name}.answers"), who | settings)
                closing.callback(file.close)
            given = ask(
                islice(_questions(benchmark, data, unusable), config.limit),
                under_test.model(setup),
                under_test.group,
                file,
                views=config.views,
                batch_size=config.batch_size,
                unusable=unusable,
                title=data.path if benchmark is GAP else benchmark.title,
            )
        if not parallel.is_rank_zero():
            continue
        if not given:
            first = f" ({unusable[0]})" if unusable else ""
            remedy = "check its images" + ("" if "full" in config.views else ", or set views=[full]")
            raise OptionError("data.path", data.path, f"holds no question that can be asked{first}", remedy)
        grades, seed, by_category = grade_all(given, judge), config.seed, bool(benchmark.by_category)
        result = summarise(given, grades, by_category=by_category, pairs=benchmark.pairs, seed=seed)
        result |= {"title": benchmark.title, "num_unusable": len(unusable)}
        output["results"][benchmark.name] = result
        if config.baseline is not None:
            asked, theirs = read_answers(_answers_of(config.baseline, benchmark.name), "baseline")
            for key in sorted(set(settings) & set(asked)):
                if settings[key] != asked[key]:
                    print(f"note: {key} was {asked[key]} for the baseline, and is {settings[key]} here", flush=True)
            found = compare(given, grades, theirs, grade_all(theirs, judge), by_category=by_category, seed=seed)
            if found is not None:
                output["comparison"][benchmark.name] = {"baseline": config.baseline, **found}
            else:
                print(f"{benchmark.name}: the baseline answered none of these questions", flush=True)
        print(table(result, benchmark.num_questions, output["comparison"].get(benchmark.name)), flush=True)
        if missing := [part for part in benchmark.by_category if part not in result["categories"]]:
            print(f"  no questions of {', '.join(missing)}: the accuracy is the mean of the others", flush=True)
        if unusable:
            print(f"  not used: {len(unusable)} of {len(unusable) + result['num_samples']} questions", flush=True)
        for reason in unusable[:NUM_SHOWN]:
            print(f"    {reason}", flush=True)
    if not parallel.is_rank_zero():
        return None
    if GAP.name in output["results"]:
        output |= _gap_lines(output["results"][GAP.name])
    if output_file is not None:
        output_file.parent.mkdir(parents=True, exist_ok=True)
        partial = output_file.with_name(output_file.name + ".partial")
        partial.write_text(json.dumps(output, indent=1, ensure_ascii=False) + "\n")
        partial.replace(output_file)
    return output


def _benchmarks(names: Any) -> list[Benchmark]:
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


class Setup(NamedTuple):
    """How the questions of one benchmark are put."""

    data: DataConfig
    """Sizes of the views, and how crops are cut."""
    max_response_length: int


class UnderTest(NamedTuple):
    """What is asked."""

    model: Callable[[Setup], Model]
    group: dist.ProcessGroup | None
    """Ranks that share the questions; None: this process asks alone."""
    pixels: PixelConfig | None
    """Limits in the model's own image processor, where they are known."""


def _setup(config: EvaluateConfig, benchmark: Benchmark, own: PixelConfig | None) -> Setup:
    """The sizes and the length of a run's options, or those that the published numbers were made with."""
    data, published = config.data, benchmark.protocol
    if config.protocol == "training":
        return Setup(data, config.rollout.max_response_length)
    if published is None:
        rule = "is for public benchmarks, and data.path is a data set of your own"
        raise OptionError("protocol", config.protocol, rule, "name a benchmark, or set protocol=training")
    pixels = own if published.pixels is None else PixelConfig(*published.pixels)
    if own is None and published.pixels is not None:
        body = config.server.extra_body or {}
        wanted = dict(zip(("min_pixels", "max_pixels"), published.pixels, strict=True))
        if body.get("mm_processor_kwargs") != wanted:
            asked = "{mm_processor_kwargs:{" + ",".join(f"{k}:{v}" for k, v in wanted.items()) + "}}"
            rule = f"shows {benchmark.title} at its own size, which a server has to be told"
            raise OptionError("protocol", config.protocol, rule, f"set server.extra_body={asked} (vLLM)")
    if pixels is not None:
        data = replace(data, full=pixels, crop_pixels=pixels)
    return Setup(data, published.max_response_length)


def _under_test(config: EvaluateConfig) -> UnderTest:
    if config.engine == "native":
        groups = parallel.initialize(config.parallel, seed=config.seed)
        check_model(config)
        processor = Processor.from_pretrained(config.model.hf_path)
        decoder = Decoder(build_vlm(config, groups), groups, config.rollout.max_batch_tokens)
        return UnderTest(partial(_native_model, decoder, processor), groups.dp_cp, processor.pixel_limits)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        rule = "a server is asked by one process"
        raise OptionError("engine", config.engine, rule, "start it without torchrun")
    endpoint = Endpoint(config.server, "server")
    return UnderTest(lambda setup: served_model(endpoint, setup.data, setup.max_response_length), None, None)


def _native_model(decoder: Decoder, processor: Processor, setup: Setup) -> Model:
    """The model of `decoder`, asked as `setup` says."""
    data, params = setup.data, greedy(processor, setup.max_response_length)
    pixels = {"full": data.full, "crop": data.crop_pixels}

    def reply(asked: list[Asked]) -> list[str | NotAnswered]:
        replies: dict[int, str | NotAnswered] = {}
        views: dict[int, View] = {}
        for place, (question, view) in enumerate(asked):
            try:
                views[place] = processor.view([question.image(view, data)], question.prompt, [pixels[view]])
            except UnusableSample as unusable:
                replies[place] = NotAnswered(str(unusable))
        names = [f"{question.id}/{view}" for question, view in map(asked.__getitem__, views)]
        for place, (ids, _) in zip(views, answers(decoder, list(views.values()), names, params), strict=True):
            replies[place] = processor.decode(ids)
        return [replies[place] for place in range(len(asked))]

    return reply


def weights_fingerprint(folder: Path) -> str:
    """A hash of the sizes of the weight files in `folder` and of some blocks of each: an export there changes it."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for part in range(_NUM_BLOCKS):
                stream.seek(max(0, size - _BLOCK_BYTES) * part // (_NUM_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]


def _settings(config: EvaluateConfig, setup: Setup) -> dict[str, Any]:
    """What changes the replies, besides model and data."""
    data = setup.data
    settings: dict[str, Any] = {"max_response_length": setup.max_response_length}
    if config.engine == "native":
        pixels = {"full": data.full, "crop": data.crop_pixels}
        settings["dtype"] = config.precision.dtype
        settings["pixels"] = {view: [limits.min_pixels, limits.max_pixels] for view, limits in pixels.items()}
    else:
        settings["extra_body"] = config.server.extra_body
    return settings | {"crop": asdict(data.crop), "question_hint": data.question_hint}


def _gap_lines(result: dict[str, Any]) -> dict[str, Any]:
    """Prints and returns the accuracies of both views and the gap under their short names."""
    lines = {f"{view}_accuracy": result[view]["accuracy"] for view in ("full", "crop") if view in result}
    if "gap" in result:
        lines["gap"] = result["gap"]
    print("\n".join(f"{name:14} {value:.4f}" for name, value in lines.items()), flush=True)
    return {"num_samples": result["num_samples"], **lines}


def _beside(output: Path, kind: str) -> Path:
    return output.with_name(f"{output.stem}.{kind}.jsonl")


def _answers_of(baseline: str, name: str) -> Path:
    path = _beside(Path(baseline), f"{name}.answers")
    if not path.is_file():
        rule = f"has no answers to {name} beside it ({path.name})"
        raise OptionError("baseline", baseline, rule, "give the output of an evaluation of the same benchmarks")
    return path
