"""benchmark.py gpu: every part runs on real Megatron-Core at tiny sizes; errors are rows, time ends, files are whole.

What it measures needs a GPU; nothing here looks at how fast anything is.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, models
from benchmarks import step as steps
from benchmarks.loss import gpu_loss
from benchmarks.measure import Bench, measure
from nemo_vopd.config import Config
from nemo_vopd.mcore.stage import Stage
from tests.distributed import run_distributed, run_recipe

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what is expected here is a CPU's")

PARTS = ["ceilings", "layers", "loss", "decode", "step"]
SIZES = {
    "layer_tokens": 32,
    "sequence_tokens": 16,
    "loss_tokens": [12, 24],
    "vocab_size": 96,
    "hidden_size": 16,
    "decode_batches": [4],
    "prompt_tokens": 12,
    "response_tokens": 5,
    "step_sequences": 6,
    "step_response_tokens": 7,
    "step_microbatch_tokens": 64,
}


def tiny() -> dict:
    sizes = models.architecture("qwen2_5_vl_3b")
    sizes |= {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 400}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 396, "eos_token_id": 396}
    sizes |= {
        "image_token_id": 397,
        "video_token_id": 398,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }
    sizes["vision_config"] |= {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
    sizes["vision_config"] |= {"out_hidden_size": 64, "fullatt_block_indexes": [1]}
    return sizes


def tiny_config() -> Config:
    config = Config()
    config.rollout.n, config.distill.top_k = 2, 8
    return config


def all_parts(folder: Path) -> tuple[dict, dict]:
    """The rows of all parts at tiny sizes; what the file held at the start of each."""
    config, sizes, output = tiny_config(), tiny(), folder / "gpu.json"
    bench = Bench(gpu.machine(config), 1000.0, 1, str(output))
    on_file = {}

    def part(name, function, *args, **options):
        on_file[name] = json.loads(output.read_text())
        bench.part(name, lambda: function(bench, *args, **options))

    products = [(64, 64, 64), *models.layer_products(sizes, 32)]
    part("ceilings", gpu.ceilings, products, copy_bytes=2**20, at_least_seconds=1e-3)
    part("layers", gpu.layers, config, sizes, 32, 16, ("bf16", "fp8_tensorwise", "fp32"))
    part("loss", gpu_loss, [12, 24], 96, 16, 8, 0.5)
    part("decode", gpu.decode, config, sizes, [4], 12, 5, n=2)
    part(
        "step",
        steps.gpu_step,
        config,
        sizes,
        num_sequences=6,
        prompt_tokens=12,
        response_tokens=7,
        microbatch_tokens=64,
    )
    on_file["alive"] = sum(type(thing) is Stage for thing in gc.get_objects())
    return bench.parts, on_file


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[dict, dict, Path]:
    folder = tmp_path_factory.mktemp("gpu")
    ((parts, on_file),) = run_distributed(all_parts, 1, folder)
    return parts, on_file, folder


def assert_complete(row: dict, *, zero: tuple[str, ...] = ("peak_gib", "extra_gib", "memory_ratio")) -> None:
    assert "error" not in row and "skipped" not in row, row
    for name, value in row.items():
        if isinstance(value, float):
            assert math.isfinite(value) and (value > 0 or name in zero), (name, row)


def test_ceilings_of_every_kind_and_shape(measured):
    rows = measured[0]["ceilings"]
    assert len(rows) == 4 * 5 + 1
    assert [row["size"] for row in rows[:-1:4]] == [f"{p} x {q} x {r}" for p, q, r in (
        (64, 64, 64), (32, 128, 64), (32, 64, 64), (32, 192, 64), (32, 64, 96)
    )]  # fmt: skip
    for row in rows:
        if row["kind"] == "bf16":
            assert_complete(row)
            m, n, k = map(int, row["size"].split(" x "))
            assert row["tflops"] == pytest.approx(2 * m * n * k / row["ms"] / 1e9)
        elif row["kind"] != "copy":
            assert "tflops" in row or "error" in row  # whether a CPU multiplies FP8 is PyTorch's affair
    assert_complete(rows[-1])
    assert rows[-1]["gb_per_second"] == pytest.approx(2 * 2**20 / rows[-1]["ms"] / 1e6)


def test_layers_in_each_precision_and_errors_as_rows(measured):
    bf16, tensorwise, fp32 = measured[0]["layers"]
    for row in (bf16, fp32):
        assert_complete(row)
        assert {"tflops", "share_of_bf16_ceiling", "speed_over_bf16", "peak_gib"} <= set(row)
    assert bf16["speed_over_bf16"] == 1
    weights = 2 * (64 * 128 + 64 * 64 + 3 * 64 * 96)
    attention = 2 * 4 * 4 * 16 * 16 / 2  # two layers, four heads of width 16, half of the 16 positions
    assert bf16["tflops"] * bf16["ms"] * 1e9 == pytest.approx(32 * (6 * weights + 3 * attention))
    assert set(tensorwise) == {"precision", "error"}
    assert re.match("OptionError: precision.fp8.recipe=tensorwise: needs an NVIDIA GPU", tensorwise["error"])


def test_loss_in_all_forms(measured):
    rows = measured[0]["loss"]
    forms = [(8, "dense"), (8, "fused"), ("all", "dense"), ("all", "fused"), ("all", "liger")]
    assert [(r["tokens"], r["top_k"], r["loss"]) for r in rows] == [(num, *form) for num in (12, 24) for form in forms]
    for dense, fused in zip(rows[0::5] + rows[2::5], rows[1::5] + rows[3::5], strict=True):
        assert_complete(dense)
        assert_complete(fused)
        assert fused["divergence"] == pytest.approx(dense["divergence"], rel=1e-4)
        assert {"time_ratio", "memory_ratio"} <= set(fused)
    for row in rows[4::5]:
        assert "error" in row and "\n" not in row["error"]  # not installed, or it needs a GPU


def test_sampling_gives_every_token(measured):
    rows = measured[0]["decode"]
    assert [(r["responses"], r["prompts"], r["n"]) for r in rows] == [(4, 2, 2), (4, 4, 1)]
    for row in rows:
        assert_complete(row, zero=("peak_gib", "ms_per_step"))
        assert row["tokens"] == 4 * 5 and row["prefill_ms"] > 0


def test_a_step_has_all_phases(measured):
    (row,) = measured[0]["step"]
    assert_complete(row, zero=("peak_gib",))
    phases = sum(row[f"{name}_ms"] for name in ("teacher", "student", "optimizer", "average"))
    assert row["step_ms"] == pytest.approx(phases)
    assert row["tokens"] == 6 * (12 + 7) and row["response_tokens"] == 6 * 7
    assert row["microbatches"] == 3  # both responses to a prompt, 38 tokens, and no room for two more in 64
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["step_ms"] * 1e3)
    assert row["student_tflops"] / row["student_share_of_bf16_ceiling"] == pytest.approx(
        max(r["tflops"] for r in measured[0]["ceilings"] if r["kind"] == "bf16")
    )


def test_files_hold_what_is_known_at_any_time(measured):
    parts, on_file, folder = measured
    assert list(on_file) == [*PARTS, "alive"]
    for number, name in enumerate(PARTS):
        assert on_file[name]["parts"] == {done: parts[done] for done in PARTS[:number]}
        assert list(on_file[name]["seconds"]) == PARTS[:number]
    whole, page = json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()
    assert whole["parts"] == parts and {"date", "gpu", "driver", "cuda", "versions", "implementations"} <= set(whole)
    assert re.findall("^## (.*)$", page, re.MULTILINE) == PARTS
    assert all(f"| {row['kind']} | {row['size']} |" in page for row in parts["ceilings"])
    assert sorted(path.name for path in folder.iterdir()) == ["gpu.json", "gpu.md"]


def test_errors_are_rows_and_the_end_of_time_is_told(tmp_path, monkeypatch):
    bench = Bench({"gpu": "none"}, 100.0, 1, str(tmp_path / "deep" / "out.json"))
    held = []

    def fails():
        held.append(torch.zeros(3))
        raise torch.OutOfMemoryError("CUDA out of memory.\n Tried | to allocate")

    def rows():
        bench.record({"row": 1}, fails)
        bench.record({"row": 2}, lambda: [{"a": 1.0}, {"a": 2.0}])
        assert json.loads((tmp_path / "deep" / "out.json").read_text())["parts"]["first"][-1] == {"row": 2, "a": 2.0}
        monkeypatch.setattr(bench, "budget", -1.0)
        bench.record({"row": 3}, fails)
        raise RuntimeError("no more")

    bench.part("first", rows)
    bench.part("second", rows)
    error = "OutOfMemoryError: CUDA out of memory. Tried / to allocate"
    first = [{"row": 1, "error": error}, {"row": 2, "a": 1.0}, {"row": 2, "a": 2.0}]
    first += [{"row": 3, "skipped": "the -1 s were over"}, {"error": "RuntimeError: no more"}]
    assert bench.parts == {"first": first, "second": [{"skipped": "the -1 s were over"}]}
    assert json.loads((tmp_path / "deep" / "out.json").read_text())["parts"] == bench.parts
    assert f"| 1 | {error} |" in (tmp_path / "deep" / "out.md").read_text()


def test_models_are_gone_when_their_part_is_over(measured):
    assert measured[1]["alive"] == 0


def test_an_unusable_gpu_gets_a_new_process(tmp_path, monkeypatch):
    output, started = tmp_path / "gpu.json", []
    monkeypatch.setattr(Bench, "is_broken", lambda bench: "ceilings" in bench.parts)
    monkeypatch.setattr(gpu.os, "execv", lambda file, words: started.append((file, words)))
    monkeypatch.setattr(gpu, "ceilings", lambda bench, _: bench.record({"size": 1}, lambda: {"ms": 2.0}))
    monkeypatch.setattr(sys, "argv", ["recipes/benchmark.py", "part=gpu", "gpu.parts=[ceilings,loss]"])
    options = {**SIZES, "budget_seconds": 50.0, "repeats": 1, "output": str(output)}
    gpu.run(tiny_config(), parts=["ceilings", "loss"], resume=False, **options)
    (file, words), *_ = started
    assert len(started) == 1 and file == words[0] == sys.executable and words[1:4] == sys.argv
    assert words[4] == "gpu.parts=[loss]" and words[6] == "gpu.resume=true"
    assert re.fullmatch(r"gpu\.budget_seconds=[34]\d\.\d+", words[5])

    monkeypatch.undo()
    bench = gpu.run(tiny_config(), parts=["loss"], resume=True, **options)
    assert bench.parts["ceilings"] == [{"size": 1, "ms": 2.0}] and len(bench.parts["loss"]) == 10
    assert json.loads(output.read_text())["parts"] == bench.parts
    again = Bench({}, 50.0, 1, str(output), resume=True)
    again.part("ceilings", lambda: again.record({"size": 3}, lambda: {"ms": 4.0}))
    assert again.parts == {"ceilings": [{"size": 3, "ms": 4.0}], "loss": bench.parts["loss"]}
    bench = gpu.run(tiny_config(), parts=["loss"], resume=False, **options)
    assert list(bench.parts) == ["loss"]


def test_a_step_that_does_not_fit_is_tried_smaller(monkeypatch):
    tried = []

    def step(bench, config, sizes, rollouts, groups):
        tried.append(
            (sizes["num_hidden_layers"], config.trainer.max_tokens_per_microbatch, config.precision.fp8.recipe)
        )
        if tried[-1][0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"step_ms": 1.0}

    monkeypatch.setattr(steps, "_step", step)
    monkeypatch.setattr(steps.parallel, "initialize", lambda *args, **options: None)
    bench = Bench({}, 100.0, 1)
    bench.parts["layers"] = [{"precision": "fp8_tensorwise", "ms": 1.0}]
    sizes = {"num_sequences": 2, "prompt_tokens": 12, "response_tokens": 3, "microbatch_tokens": 64}
    bench.part("step", lambda: steps.gpu_step(bench, tiny_config(), tiny(), **sizes))
    assert tried == [(2, 64, None), (2, 32, None), (1, 64, None), (1, 64, "tensorwise")]
    assert ["error" in row for row in bench.parts["step"]] == [True, True, False, False]


def test_a_step_that_cannot_fit_is_not_tried(monkeypatch):
    sizes = models.architecture("qwen2_5_vl_3b")
    assert models.num_parameters(sizes) == pytest.approx(3.75e9, rel=0.03)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for memory, fits in ((80, False), (141, True)):
        properties = SimpleNamespace(total_memory=memory * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        assert steps._may_fit(sizes) == fits
        assert steps._may_fit({**sizes, "num_hidden_layers": 18})


def test_run_takes_the_options_of_the_recipe(tmp_path, capsys):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
    try:
        from benchmark import GpuBenchmark, GpuPart  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    assert [part.name for part in GpuPart] == PARTS
    options = {**dataclasses.asdict(GpuBenchmark()), "parts": PARTS}
    assert options["vocab_size"] == models.architecture("qwen2_5_vl_72b")["vocab_size"]
    bench = gpu.run(tiny_config(), repeats=1, output=None, **{**options, "budget_seconds": -1.0})
    assert bench.parts == {name: [{"skipped": "the -1 s were over"}] for name in PARTS}
    output = str(tmp_path / "run.json")
    tiny_loss = {**options, **SIZES, "parts": ["loss"]}
    bench = gpu.run(tiny_config(), repeats=1, output=output, **tiny_loss)
    written = json.loads(Path(output).read_text())
    assert len(bench.parts["loss"]) == 10 and written["parts"] == bench.parts and written["sizes"] == SIZES
    assert "| tokens | top_k | loss |" in capsys.readouterr().out


def test_measure_calls_as_often_as_it_says():
    calls = []
    measured = measure(lambda: calls.append(0) or len(calls), 3, warmup=2, before=lambda: calls.append(1))
    assert len(calls) == 2 + 3 * 2 and measured.result == 8 and measured.seconds > 0
    assert (measured.peak_gib, measured.extra_gib) == (0, 0)


def test_without_a_gpu_one_line_says_so(tmp_path):
    # given twice, as a process that starts itself again does
    options = ["gpu.parts=[ceilings,step]", "gpu.parts=[step]", "gpu.resume=true", "gpu.budget_seconds=12.5"]
    done = run_recipe("recipes/benchmark.py", "gpu", f"output={tmp_path}/gpu.json", *options)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: part=gpu: needs an NVIDIA GPU, and this machine has none; say benchmark.py loss")
    done = run_recipe("recipes/benchmark.py", "gpu", "gpu.parts=[losses]")
    assert done.returncode == 2 and "gpu.parts" in done.stderr and "Traceback" not in done.stderr
