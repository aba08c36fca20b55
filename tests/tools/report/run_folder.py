"""A made-up run folder with every file that the report reads."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from nemo_vopd.tools.report.examples_file import Answer, Example, Examples, TokenTrace, picture, write_examples

SUMMARY = {
    "full_accuracy_before": 0.5,
    "full_accuracy_after": 0.9,
    "crop_accuracy_before": 0.95,
    "crop_accuracy_after": 0.94,
    "gap_closed": 0.911,
    "num_test_samples": 1024,
    "wall_seconds": 521.3,
    "seed": 1234,
    "teacher_view": "crop",
    "num_parameters": 1832448,
    "seconds_by_phase": {"warmup": 200.0, "training": 300.0},
}
ENVIRONMENT = {
    "layout": {"processes": 8, "tensor": 4, "pipeline": 2, "data": 1, "sequence_parallel": True},
    "implementations": {"attention": "Transformer Engine", "device": "NVIDIA H100 80GB HBM3"},
    "versions": {"torch": "2.13.0", "megatron-core": "0.19.2"},
}


def image(size: tuple[int, int] = (12, 12), mode: str = "RGB") -> Image.Image:
    """A picture with something to see."""
    pixels = np.random.default_rng(sum(size)).integers(0, 255, (max(size[1] // 16, 1), max(size[0] // 16, 1), 3))
    return Image.fromarray(pixels.astype("uint8")).resize(size).convert(mode)


def example(**changes) -> Example:
    """A question answered wrong from the full image before, right after."""
    fields = dict(
        image=picture(image()), bbox=(2, 3, 7, 9), crop=picture(image((4, 4))), question="Which digit?", answer="7",
        full_before=Answer("1", False), full_after=Answer("7.", True), crop_before=Answer(" 7", True),
        crop_after=Answer("", False),
    )  # fmt: skip
    return Example(**(fields | changes))


def trace(**changes) -> TokenTrace:
    """Three tokens, the second the most disputed."""
    fields = dict(
        image=picture(image()), crop=picture(image((4, 4))), question="Which digit?",
        tokens=["The", " digit\n", "<eos>"],
        student_log_probs=[-0.1, -1.0, -0.01], teacher_log_probs=[-0.2, -4.0, -0.02], divergence=[0.01, 0.4, 0.0],
        student_top=[[("The", 0.9)], [(" digit\n", 0.37), (" mark", 0.3)], [("<eos>", 0.99)]],
        teacher_top=[[("The", 0.8)], [(" number", 0.9), (" mark", 0.05)], [("<eos>", 0.98)]],
    )  # fmt: skip
    return TokenTrace(**(fields | changes))


def step_metrics(step: int, rng: random.Random, scale: float = 1.0) -> dict:
    """One line of metrics.jsonl as a run writes it."""
    noise = rng.uniform(0.8, 1.25)
    return {
        "step": step, "loss": scale * noise * (0.02 + 0.2 * math.exp(-step / 200)), "grad_norm": 0.3 * noise,
        "num_response_tokens": 448 + rng.randrange(40), "num_responses": 64, "num_dropped_samples": step % 50 == 7,
        "num_dropped_responses": 0, "dropped_by_reason": {"unreadable_image": 1} if step % 50 == 7 else {},
        "mean_response_length": 7 + noise, "distinct_2": min(1.0, 0.9 * noise), "divergence": 0.02 * noise,
        "teacher_topk_mass": 0.999 - 0.01 * noise, "student_topk_mass": 0.998 - 0.01 * noise,
        "importance_weight_mean": 1 + 1e-3 * noise, "mismatch_mean": 1e-4 * noise, "mismatch_max": 1e-2 * noise**5,
        "mismatch_share": 1e-5 * noise, "entropy": 0.5 * noise, "lr": 2e-6, "num_skipped_updates": 0,
        "seconds_data": 0.03, "seconds_rollout": 0.7 * noise, "seconds_teacher": 0.25 * noise,
        "seconds_student": 1.3 * noise, "seconds_optimizer": 0.05, "seconds_step": 2.4 * noise,
        "tokens_per_second": 1600 / noise,
    }  # fmt: skip


def results(shift: float = 0.0, model: str = "student") -> dict:
    """What recipes/evaluate.py writes: a data set with both views, and two benchmarks."""
    bins = []
    for i, low in enumerate((3e-4, 1.2e-3, 4e-3, 0.012, 0.05)):
        full, crop = 0.45 + 0.09 * i + shift, 0.88 + 0.02 * i
        row = {"low": low, "high": 3 * low, "num_samples": 200 + i, "full": full, "crop": crop}
        bins.append(row | {"full_interval": [full - 0.07, full + 0.07], "crop_interval": [crop - 0.04, crop + 0.04]})
    views = {"full": {"accuracy": 0.63 + shift, "interval": [0.6 + shift, 0.66 + shift], "num_undecided": 2}}
    both = views | {"crop": {"accuracy": 0.92, "interval": [0.9, 0.94], "num_undecided": 0}}
    categories = {
        "direct_attributes": {"num_samples": 115, "full": 0.7 + shift, "crop": 0.93},
        "relative_position": {"num_samples": 76, "full": 0.5 + shift, "crop": 0.9},
    }
    metrics = {"f1": 0.87, "yes_ratio": 0.48}
    return {
        "model": model, "engine": "native",
        "results": {
            "gap": {"title": "Held-out questions", "num_samples": 1010, "accuracy": 0.63 + shift, **both,
                    "gap": 0.29 - shift, "categories": {}, "metrics": {}, "by_evidence_size": bins},
            "vstar": {"title": "V* Bench", "num_samples": 191, "accuracy": 0.7 + shift, **both, "gap": 0.22 - shift,
                      "categories": categories},
            "pope": {"title": "POPE", "num_samples": 9000, "accuracy": 0.88, **views, "metrics": metrics},
        },
    }  # fmt: skip


def data_card() -> dict:
    """What recipes/prepare_data.py writes beside a data set."""
    sources = [{"path": "photos/a.jsonl", "layout": "jsonl", "kept": 900, "dropped": {"empty_box": 12}, "weight": 1.0}]
    return {
        "sources": [*sources, {"path": "6k.parquet", "layout": "vision_opd_6k", "kept": 5100, "dropped": 3}],
        "kept": 6000, "dropped": {"empty_box": 12, "unreadable_image": 3}, "bytes": 4_300_000_000,
        "splits": {"train": 5400, "validation": 600},
        "with_answer": 5100, "with_box": 6000, "with_crop": 0, "with_hint": 17,
        "image_megapixels": {"edges": [0, 0.25, 0.5, 1, 2, 4, 8], "counts": [3, 80, 900, 3000, 1800, 217],
                             "median": 1.4},
        "relative_box_area": {"edges": [0, 1e-4, 1e-3, 1e-2, 0.1, 1], "counts": [12, 700, 3900, 1300, 88],
                              "median": 0.004},
        "crop": {"scale": 2.0, "min_side": 28, "square": True}, "options": {"shard_size": 1000},
    }  # fmt: skip


def wide_card() -> dict:
    """The card of a blend of two large sources, with the longest names and numbers that preparation writes."""
    path = (
        "/data/shared/projects/vision-opd/photographs-with-questions-about-their-smallest-parts/records_of_2026.jsonl"
    )
    source = {"path": path, "layout": "llama_factory", "kept": 1_234_567, "dropped": 123_456, "weight": 2.0}
    first = "line 1234567: images/0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef.jpg: not a file"
    reasons = ("path_outside_folder", "several_images", "malformed_record", "crop_has_no_pixels")
    counted = "with_answer with_box with_crop with_hint rotated flat dark leaving fraction upscaled"
    card = data_card() | dict.fromkeys([*counted.split(), "several_boxes", "several_questions"], 1_234_567)
    options = {"columns": {"image": "path_of_the_photograph", "question": "question"}, "split_by": None, "hint": "keep"}
    return card | {
        "sources": [source, source | {"weight": 1.0}], "kept": 2_469_134, "bytes": 4_300_000_000_000,
        "dropped": dict.fromkeys(reasons, 123_456), "examples": dict.fromkeys(reasons, first), "options": options,
    }  # fmt: skip


def write_lines(path: Path, rows: list[dict]) -> None:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(folder: Path, num_steps: int = 300, scale: float = 1.0, summary: dict | None = None) -> Path:
    """Every file of a run in `folder`, and its data set's card in `folder`/data."""
    rng = random.Random(num_steps)
    (folder / "results").mkdir(parents=True)
    (folder / "data").mkdir()
    write_lines(folder / "metrics.jsonl", [step_metrics(step, rng, scale) for step in range(num_steps)])
    measured = range(0, num_steps, 50)
    rows = [{"step": s, "full_accuracy": 0.5 + s / num_steps / 3, "crop_accuracy": 0.95} for s in measured]
    write_lines(folder / "evaluations.jsonl", rows)
    write_lines(folder / "warmup.jsonl", [{"step": i, "loss": 3 / (i + 1), "lr": 1e-3 * i} for i in range(60)])
    drops = [{"step": s, "id": f"photo-{s}", "reason": "unreadable_image", "detail": "truncated"} for s in (7, 57)]
    drops += [{"step": 9, "id": "q9", "reason": "overlong_prompt", "detail": "9000 tokens"}]
    write_lines(folder / "dropped.jsonl", drops)
    status = {"finished": True, "reason": "max_steps", "step": num_steps, "max_steps": num_steps, "checkpoint": None}
    config = {
        "seed": 1, "data": {"path": str(folder / "data"), "batch_size": 96}, "optimizer": {"lr": 2e-6 * scale},
        "distill": {"teacher_view": "crop", "teacher": {"kind": "ema", "rate": 0.05}},
        "model": {"hf_path": "/models/a-rather-long-name-of-a-folder/Qwen2.5-VL-7B-Instruct", "architecture": None},
    }  # fmt: skip
    objects = {
        "status.json": status, "environment.json": ENVIRONMENT, "results/student.json": results(0.12),
        "data/data_card.json": data_card(),
    }  # fmt: skip
    if summary is not None:
        objects["summary.json"] = summary
    for name, value in objects.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    photo, crop = picture(image((900, 600))), picture(image((200, 200)))
    question = "What is written on the small sign to the left of the red car at the far end of the street?"
    cards = [example(), example(image=photo, crop=crop, bbox=(400, 200, 460, 240), question=question)]
    cards.append(example(full_before=None, crop_before=None, bbox=(-6, 3, 30, 9)))  # as wide as both views
    long = trace(tokens=["Donaudampfschifffahrtsgesellschaft" * 3, *["a"] * 80], question=question)
    write_examples(folder / "examples.json", Examples(cards, [trace(), long], "Made-up responses."))
    return folder
