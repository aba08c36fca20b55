"""How fast recipes/prepare_data.py is, and how much memory all its processes take.

Reference: the same number of processes that read, decode and re-encode each image, and write nothing.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from nemo_vopd.errors import RunError

_RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "prepare_data.py"
_SIZE, _DETAIL, _QUALITY = (1920, 1440), 4, 86
_NUM_DIFFERENT = 16
_POLL_SECONDS = 0.2
"""Looking for the memory of all processes takes time itself."""


def data(num_images: int, larger: int, workers: int, shard_size: int, repeats: int) -> list[dict]:
    """Rows for `table`: the reference, preparation of `num_images` records, and of `larger` times as many.

    Each in turn `repeats` times (the last once); medians. Needs about (2 + 2 * larger) MB of disk for each image.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        megabytes = _write_images(folder, num_images)
        _write_records(folder / "small.jsonl", num_images, 1)
        _write_records(folder / "large.jsonl", num_images, larger)
        reference, small = [], []
        for number in range(repeats):
            reference.append(_reference(folder, num_images, workers))
            small.append(_prepare(folder / "small.jsonl", folder / f"out-{number}", workers, shard_size))
        large = [_prepare(folder / "large.jsonl", folder / "out-large", workers, shard_size)]
    rows: list[dict] = []
    measured = (
        ("read, decode, re-encode", 1, reference),
        ("prepare_data.py", 1, small),
        ("prepare_data.py", larger, large),
    )
    for what, times, runs in measured:
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        rows.append({"what": what, "records": times * num_images, **middle})
    for row in rows:
        row["samples_per_second"] = row["records"] / row["seconds"]
        row["ratio"] = row["samples_per_second"] / rows[0]["samples_per_second"]
        row["megabytes_per_image"] = megabytes
    return rows


def table(rows: list[dict]) -> str:
    """A Markdown table of what `data` returns."""
    lines = [
        "| what | records | seconds | CPU seconds | records/s | ratio | GiB while writing shards | GiB at most |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory = [f"{row[key]:.2f}" if key in row else "" for key in ("writing_gib", "peak_gib")]
        cells = [row["what"], str(row["records"]), f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}"]
        cells.append(f"{row['samples_per_second']:.1f}")
        lines.append("| " + " | ".join([*cells, f"{row['ratio']:.2f}", *memory]) + " |")
    return "\n".join(lines)


def _write_images(folder: Path, num_images: int) -> float:
    """`num_images` JPEG files, of _NUM_DIFFERENT contents; megabytes of one on average."""
    rng = np.random.default_rng(0)
    width, height = _SIZE
    contents = []
    for _ in range(min(_NUM_DIFFERENT, num_images)):
        noise = rng.integers(0, 255, (height // _DETAIL, width // _DETAIL, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).resize(_SIZE, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=_QUALITY)
        contents.append(buffer.getvalue())
    for index in range(num_images):
        (folder / f"{index}.jpg").write_bytes(contents[index % len(contents)])
    return sum(map(len, contents)) / len(contents) / 1e6


def _write_records(path: Path, num_images: int, times: int) -> None:
    with open(path, "w") as file:
        for index in range(num_images * times):
            record = {"image": f"{index % num_images}.jpg", "question": "what is it?", "bbox": [100, 100, 300, 260]}
            file.write(json.dumps({"id": str(index), **record}) + "\n")


def _reference(folder: Path, num_images: int, workers: int) -> dict[str, float]:
    """Seconds of the work alone: the processes are up before the clock starts."""
    paths = [str(folder / f"{index}.jpg") for index in range(num_images)]
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        list(pool.map(_re_encode, paths[: 2 * workers]))
        start = time.perf_counter()
        cpu_seconds = sum(pool.map(_re_encode, paths, chunksize=4))
        return {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds}


def _re_encode(path: str) -> float:
    """CPU seconds that it took."""
    start = time.process_time()
    with Image.open(path) as image:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=_QUALITY)
    return time.process_time() - start


def _prepare(source: Path, output: Path, workers: int, shard_size: int) -> dict[str, float]:
    """Seconds of the whole command, imports and index included, and resident GiB of all its processes together."""
    command = [sys.executable, str(_RECIPE), f"source={source}", f"output={output}"]
    command += [f"workers={workers}", f"shard_size={shard_size}"]
    num_chunks = -(-sum(1 for _ in open(source)) // shard_size)
    notes = output.with_name(f".{output.name}.partial") / "notes" / "all"
    start, cpu = time.perf_counter(), _cpu_seconds_of_children()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    writing = peak = 0
    while process.poll() is None:
        resident = _resident_bytes(process.pid)
        peak = max(peak, resident)
        if notes.is_dir() and len(list(notes.iterdir())) < num_chunks:
            writing = max(writing, resident)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_SECONDS)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RunError(f"recipes/prepare_data.py failed: {process.stdout.read()[-1000:] if process.stdout else ''}")
    cpu_seconds = _cpu_seconds_of_children() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "writing_gib": writing / 2**30, "peak_gib": peak / 2**30}


def _cpu_seconds_of_children() -> float:
    """Of those that have ended, and theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _resident_bytes(pid: int) -> int:
    """Of the process and its children; what they share is counted for each."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
    return total
