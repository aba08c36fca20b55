"""Records with images to an Energon data set: crude WebDataset shards, their index, a manifest and a data card.

Chunks of the source become shards independently of each other, in a folder beside the output that is continued after
an interruption; the output appears in the end, whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemo_vopd.data.blend import write_blend
from nemo_vopd.data.records import BOX_FORMATS
from nemo_vopd.errors import OptionError, RunError
from nemo_vopd.tools.prepare.card import write_card
from nemo_vopd.tools.prepare.index import META, load_energon, write_index, write_manifest
from nemo_vopd.tools.prepare.intake import RecordOptions
from nemo_vopd.tools.prepare.partial import partial_folder
from nemo_vopd.tools.prepare.rows import Chunk, Plan, Source
from nemo_vopd.tools.prepare.shards import ShardJob, note_is_good, note_path
from nemo_vopd.tools.prepare.sources import open_sources
from nemo_vopd.tools.prepare.statistics import Statistics, gather, total
from nemo_vopd.tools.prepare.worker import write_chunks
from nemo_vopd.views import MAX_IMAGE_PIXELS


@dataclass
class _Part:
    """One source on its way into the output."""

    source: Source
    name: str
    """Its folder in the output; "" when it is the only one."""
    plan: Plan = field(default_factory=Plan)
    statistics: Statistics = field(default_factory=Statistics)
    weight: float | None = None


def prepare(
    source: Path | Sequence[Path],
    output: Path,
    *,
    shard_size: int = 1000,
    workers: int = 4,
    overwrite: bool = False,
    progress: bool = True,
    split: str | None = None,
    image_root: Path | None = None,
    weights: Sequence[float] | None = None,
    crop: dict[str, Any] | None = None,
    **record_options: Any,
) -> dict:
    """Convert `source` (forms: nemo_vopd/tools/prepare/sources.py) into the Energon data set `output`.

    Unusable records are dropped. `shard_size` is in records of the source, `workers` in processes or, where there is
    one shard, threads. With validation_fraction `output` holds two data sets, train and validation; several sources
    become data sets of their own and `blend.yaml`, which mixes them by `weights` (default: their sizes).
    `record_options` are fields of `RecordOptions`; `crop` is for the data card only. What was interrupted continues
    when the same arguments are given again, and ends in the same bytes.

    Returns {"kept": int, "dropped": {reason: count}} and prints it. Raises OptionError when `source` is missing,
    `output` exists (unless `overwrite`), an option is out of range, or nothing is left; RunError when writing fails.
    """
    sources = [Path(path) for path in ([source] if isinstance(source, str | Path) else source)]
    output, options = Path(output), RecordOptions(**record_options)
    check_options(options, sources, weights, shard_size=shard_size, workers=workers)
    _check_output(output, overwrite)
    parts = [
        _Part(opened, name if len(sources) > 1 else "")
        for opened, name in zip(open_sources(sources, split, image_root), _names(sources), strict=True)
    ]
    chosen = _chosen(parts, options, weights, shard_size, split, image_root)
    with partial_folder(output, chosen, discard=overwrite) as folder:
        if output.exists() and not overwrite:
            raise OptionError("output", output, "was made by another process meanwhile", "use that one")
        try:
            for part in parts:
                part.plan = plan_source(part.source, shard_size, options, progress)
            _write(parts, options, folder, workers, progress)
            for part in parts:
                part.statistics = gather(note_path(_notes(folder, part), c.index) for c in part.plan.chunks)
                _check_kept(part, options)
            _finish(parts, options, weights, chosen, crop, folder / "result", progress)
            _publish(folder, output)
        except OSError as error:
            why = f"{output} cannot be written ({error.strerror or error})"
            raise RunError(f"{why}; make room and give the same command again to continue") from None
    return _report(parts, options, output)


def check_options(
    options: RecordOptions, sources: Sequence[Path], weights: Sequence[float] | None, *, shard_size: int, workers: int
) -> None:
    """Check ranges and choices. Raises OptionError."""
    if not sources:
        raise OptionError("source", "[]", "names nothing", "give a file or folder, or a list of them")
    counts = (("shard_size", shard_size), ("max_image_pixels", options.max_image_pixels), ("workers", workers))
    for option, value in counts:
        if value < 1:
            raise OptionError(option, value, "must be at least 1", f"set {option}=1 or more")
    if options.max_image_pixels > MAX_IMAGE_PIXELS:
        rule = f"must be at most {MAX_IMAGE_PIXELS}: larger images are dropped when they are loaded"
        raise OptionError("max_image_pixels", options.max_image_pixels, rule, "lower it and scale the images down")
    choices = {
        "bbox_format": BOX_FORMATS,
        "bbox_frame": ("upright", "stored"),
        "hint": ("keep", "remove"),
        "split_by": ("id", "image"),
    }
    for option, known in choices.items():
        value = getattr(options, option)
        if value not in known:
            raise OptionError(option, value, f"must be one of {', '.join(known)}", f"set {option}={known[0]}")
    fraction = options.validation_fraction
    if not 0 <= fraction < 1:
        raise OptionError("validation_fraction", fraction, "must lie in [0, 1)", "set it to 0.02")
    if not options.hint_text:
        raise OptionError("hint_text", "''", "is empty", "give the sentence, or hint=keep")
    if weights is not None and len(weights) != len(sources):
        rule = f"must be one number for each of the {len(sources)} sources"
        raise OptionError("weights", list(weights), rule, "give as many, or null for the sizes of the sources")
    if weights is not None and (len(sources) == 1 or not all(0 < weight < float("inf") for weight in weights)):
        rule = "must be positive numbers, of several sources"
        raise OptionError("weights", list(weights), rule, "leave out what is not wanted, or set weights=null")


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise OptionError("output", output, "exists", "choose another directory or set overwrite=true")
    if output.exists() and not (output / META).is_dir() and not (output / "data_card.json").is_file():
        raise OptionError("output", output, "exists and is no prepared data set", "choose another directory")


def _names(sources: Sequence[Path]) -> list[str]:
    """A folder name for each source, all different."""
    names: list[str] = []
    for path in sources:
        stem = path.resolve().name if path.is_dir() else path.stem
        name = base = re.sub(r"[^\w.-]+", "_", stem).strip("._") or "source"
        number = 1
        while name in names or name in ("train", "validation"):
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return names


def _chosen(
    parts: list[_Part],
    options: RecordOptions,
    weights: Sequence[float] | None,
    shard_size: int,
    split: str | None,
    image_root: Path | None,
) -> dict[str, object]:
    """Everything that the output depends on, as JSON values."""
    files = [file for part in parts for file in part.source.files()]
    state = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return {
        "source": [str(part.source.path) for part in parts],
        "files": state,
        "weights": weights and list(weights),
        "shard_size": shard_size,
        "split": split,
        "image_root": image_root and str(image_root),
        **dataclasses.asdict(options),
    }


def plan_source(source: Source, chunk_size: int, options: RecordOptions, progress: bool) -> Plan:
    """The first pass over `source`. Raises OptionError (source, columns.*)."""
    with tqdm(
        total=source.total(),
        unit="B" if source.unit == "line" else "row",
        unit_scale=True,
        desc="records",
        disable=not progress,
        leave=False,
    ) as bar:
        plan = source.plan(chunk_size, options.columns, bar.update)
    if plan.columns:
        options.columns.check(source.path, plan.columns, plan.given)
    return plan


def _splits(options: RecordOptions) -> dict[str, str]:
    """Split -> folder of its data set within that of the source."""
    return {"train": "train", "validation": "validation"} if options.validation_fraction else {"train": ""}


def _notes(folder: Path, part: _Part) -> Path:
    return folder / "notes" / (part.name or "all")


def _write(parts: list[_Part], options: RecordOptions, folder: Path, workers: int, progress: bool) -> None:
    """Write the shards that are not there yet."""
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed run had begun
    scratch.mkdir()
    jobs: list[tuple[Source, str, dict[str, Path], Path, Chunk]] = []
    done = 0
    for part in parts:
        folders = {split: folder / "result" / part.name / name for split, name in _splits(options).items()}
        for path in [*folders.values(), _notes(folder, part)]:
            path.mkdir(parents=True, exist_ok=True)
        prefix = f"{part.name}/" if part.name else ""
        for chunk in part.plan.chunks:
            if note_is_good(_notes(folder, part), chunk.index, folders):
                done += chunk.count
            else:
                jobs.append((part.source, prefix, folders, _notes(folder, part), chunk))
    num_records = sum(part.plan.num_records for part in parts)
    if done:
        print(f"continues what was interrupted: {done} of {num_records} records are done", flush=True)
    if not jobs:
        return
    # one shard, or one worker: threads of this process do as well as a process that would have to be started
    processes = min(workers, len(jobs))
    in_process = processes == 1
    threads = max(1, workers // processes)
    if not in_process:
        threading.Thread(target=load_energon, daemon=True).start()  # this process has nothing else to do meanwhile
    with tqdm(total=num_records, initial=done, unit="record", desc="prepare", disable=not progress) as bar:
        work = (
            (ShardJob(s, options, prefix, to, notes, scratch, threads), chunk) for s, prefix, to, notes, chunk in jobs
        )
        write_chunks(work, processes, bar.update, in_process)


def _check_kept(part: _Part, options: RecordOptions) -> None:
    statistics = part.statistics
    if not statistics.kept:
        reasons = ", ".join(f"{reason} {count}" for reason, count in statistics.dropped.most_common()) or "it is empty"
        rule = f"no record can be used ({reasons})"
        for reason, _ in statistics.dropped.most_common(1):
            rule += f", first: {' '.join(statistics.examples[reason].split())}"
        raise OptionError("source", part.source.path, rule, "check its format and paths")
    for split in _splits(options):
        if not statistics.splits().get(split):
            rule = f"leaves no record of {part.source.path} for {split}: it has {statistics.kept}"
            raise OptionError("validation_fraction", options.validation_fraction, rule, "set another, or 0")


def _finish(
    parts: list[_Part],
    options: RecordOptions,
    weights: Sequence[float] | None,
    chosen: dict[str, object],
    crop: dict[str, Any] | None,
    result: Path,
    progress: bool,
) -> None:
    """Indexes, manifests, blends and the card of all shards in `result`."""
    data_sets: list[str] = []
    for number, part in enumerate(parts):
        for split, name in _splits(options).items():
            folder = result / part.name / name
            write_index(folder, progress=progress)
            write_manifest(folder, part.statistics.shards[split], str(part.source.path))
            data_sets.append(folder.relative_to(result).as_posix())
        if len(parts) > 1:
            part.weight = float(weights[number] if weights else part.statistics.splits()["train"])
    if len(parts) > 1:
        for split, name in _splits(options).items():
            entries = [(f"{part.name}/{name}".rstrip("/"), part.weight or 1.0) for part in parts]
            write_blend(result / ("blend.yaml" if split == "train" else f"{split}.yaml"), entries)
    whole = total([part.statistics for part in parts])
    sources = [
        {
            "path": str(part.source.path),
            "layout": part.source.layout,
            "kept": part.statistics.kept,
            "dropped": sum(part.statistics.dropped.values()),
            "weight": part.weight,
        }
        for part in parts
    ]
    told = {name: value for name, value in chosen.items() if name not in ("source", "files", "weights")}
    copies = list(_splits(options).values()) if len(parts) == 1 and options.validation_fraction else []
    write_card(result, whole, sources, data_sets, told, crop or {}, copies)


def _publish(folder: Path, output: Path) -> None:
    """Give the finished result its name; what has it goes away with `folder`."""
    if output.exists():
        shutil.rmtree(folder / "replaced", ignore_errors=True)
        os.rename(output, folder / "replaced")
    os.rename(folder / "result", output)


def _report(parts: list[_Part], options: RecordOptions, output: Path) -> dict:
    whole = total([part.statistics for part in parts])
    dropped = dict(whole.dropped.most_common())
    print(f"kept {whole.kept} records in {output}, dropped {sum(dropped.values())}")
    for reason, count in dropped.items():
        print(f"  dropped {count}: {reason} (first: {whole.examples[reason]})")
    for part in parts if len(parts) > 1 else ():
        rest = sum(part.statistics.dropped.values())
        print(f"  {part.source.path}: kept {part.statistics.kept}, dropped {rest}, weight {part.weight:g}")
    if options.validation_fraction:
        print("  " + ", ".join(f"{name}: {count} records" for name, count in whole.splits().items()))
    if whole.with_hint:
        what = "kept; hint=remove takes it out" if options.hint == "keep" else "taken out; hint=keep leaves it"
        print(f'  {whole.with_hint} questions carry the hint "{options.hint_text}" ({what})')
    if whole.rotated:
        other, frame = ("stored", "upright image") if options.bbox_frame == "upright" else ("upright", "stored pixels")
        print(f"  {whole.rotated} images are turned by EXIF; boxes are taken in the {frame} (else bbox_frame={other})")
    if whole.flat:
        print(f"  {whole.flat} images have one colour: look at them with preview=sheet.png")
    if whole.with_box and whole.largest_coordinate <= 1 and options.bbox_format == "xyxy":
        print("  every box lies within the first pixel: if they are fractions, set bbox_format=xyxy_unit")
    return {"kept": whole.kept, "dropped": dropped}


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """End the process in order on Ctrl-C, with one line on how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit("interrupted; give the same command again to continue") from None
