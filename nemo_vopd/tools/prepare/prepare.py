"""Records with images to an Energon data set: crude WebDataset shards, their index, a manifest and a data card.

Chunks of the source become shards independently of each other, in a folder beside the output that is continued after
an interruption; the output appears in the end, whole.
"""

from __future__ import annotations

import dataclasses
import json
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
from nemo_vopd.data.record_fields import BOX_FORMATS
from nemo_vopd.errors import OptionError, RunError, printable
from nemo_vopd.tools.prepare.card import write_card
from nemo_vopd.tools.prepare.folders import partial_folder
from nemo_vopd.tools.prepare.index import META, load_energon, write_index, write_manifest
from nemo_vopd.tools.prepare.options import PrepareOptions
from nemo_vopd.tools.prepare.rows import Chunk, Source, plan_chunks
from nemo_vopd.tools.prepare.shards import ShardJob, Statistics, total, write_chunks
from nemo_vopd.tools.prepare.sources import open_sources

DROPPED = "dropped.jsonl"
_ENOUGH = 20
_ODD = {
    "flat": "images have one colour: --preview shows some records",
    "dark": "images are nearly black, as when 12 bits are stored in 16: look at --preview, and store them in 8 bits",
    "several_questions": "conversations ask more than once: the first question is taken, and its answer",
    "several_boxes": "records have several boxes: the evidence is the smallest box around all of them",
    "upscaled": "crops are enlarged more than twice: (data.)crop.max_upscale=2 widens them, here and in training",
    "extreme_crop": "crops are too elongated to be used: (data.)crop.max_aspect=4 widens them, here and in training",
}


@dataclass
class _Part:
    """One source on its way into the output."""

    source: Source
    name: str
    """Its folder in the output; "" when it is the only one."""
    jobs: list[ShardJob] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)
    weight: float | None = None

    def summary(self) -> dict[str, Any]:
        """What the data card tells of the source."""
        kept, dropped = self.statistics.kept, self.statistics.dropped.total()
        named = {"path": str(self.source.path), "layout": self.source.layout}
        return {**named, "kept": kept, "dropped": dropped, "weight": self.weight}


def prepare(
    source: Path | Sequence[Path],
    output: Path,
    *,
    workers: int = 4,
    overwrite: bool = False,
    progress: bool = True,
    crop: dict[str, Any] | None = None,
    **options: Any,
) -> dict:
    """Convert `source` (forms: nemo_vopd/tools/prepare/sources.py) into the Energon data set `output`.

    Unusable records are dropped. `options` are the fields of `PrepareOptions`; `workers` are processes or, where there
    is one shard, threads. With validation_fraction `output` holds two data sets, train and validation; several sources
    become data sets of their own and `blend.yaml`, which mixes them by `weights` (default: their sizes). `crop` are the
    options of `crop_box`, by which crops are judged for the data card. What was interrupted continues when the same
    arguments are given again, and ends in the same bytes.

    Returns {"kept": int, "dropped": {reason: count}} and prints it. Raises OptionError when `source` is missing,
    `output` exists (unless `overwrite`), an option is out of range, or nothing is left; RunError when writing fails.
    """
    paths = [Path(path) for path in ([source] if isinstance(source, str | Path) else source)]
    output, chosen = Path(output), PrepareOptions(**options)
    chosen.check(len(paths))
    if output.exists() and not overwrite:
        raise OptionError("output", output, "exists", "choose another directory or set overwrite=true")
    if output.exists() and not (output / META).is_dir() and not (output / "data_card.json").is_file():
        raise OptionError("output", output, "exists and is no prepared data set", "choose another directory")
    sources = open_sources(paths, chosen.split, chosen.image_root)
    parts = [_Part(*named) for named in zip(sources, _names(paths), strict=True)]
    depends_on = _depends_on(sources, chosen, crop)
    with partial_folder(output, depends_on, discard=overwrite) as folder:
        if output.exists() and not overwrite:
            raise OptionError("output", output, "was made by another process meanwhile", "use that one")
        try:
            for part in parts:
                chunks = plan_chunks(part.source, chosen.shard_size, chosen.columns, progress)
                part.jobs = _jobs(part, chunks, chosen, crop, folder)
            _write([job for part in parts for job in part.jobs], workers, progress)
            for part in parts:
                part.statistics = total(Statistics(**json.loads(job.note.read_bytes())) for job in part.jobs)
                _check_kept(part, chosen)
            data_sets = _write_indexes(parts, chosen, folder / "result", progress)
            whole = total(part.statistics for part in parts)
            _write_dropped([job for part in parts for job in part.jobs], folder / "result")
            hidden = ("source", "files", "weights", "crop")
            told = {name: value for name, value in depends_on.items() if name not in hidden}
            summaries = [part.summary() for part in parts]
            write_card(folder / "result", whole, summaries, data_sets, told, crop or {})
            if output.exists():  # it goes away with the folder
                shutil.rmtree(folder / "replaced", ignore_errors=True)
                os.rename(output, folder / "replaced")
            os.rename(folder / "result", output)
        except OSError as error:
            why = f"{output} cannot be written ({error.strerror or error})"
            raise RunError(f"{why}; make room and give the same command again to continue") from None
    _report(parts, whole, chosen, output)
    return {"kept": whole.kept, "dropped": dict(whole.dropped.most_common())}


def _names(paths: Sequence[Path]) -> list[str]:
    """A folder name for each source, all different; none where it is the only one."""
    if len(paths) == 1:
        return [""]
    names: list[str] = []
    for path in paths:
        stem = path.resolve().name if path.is_dir() else path.stem
        name = base = re.sub(r"[^\w.-]+", "_", stem).strip("._") or "source"
        number = 1
        while name in names or name in ("train", "validation"):
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return names


def _depends_on(sources: Sequence[Source], options: PrepareOptions, crop: dict | None) -> dict[str, Any]:
    """Everything that the output depends on, as JSON values."""
    files = [file for source in sources for file in source.files]
    state = [(file.resolve(), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    all_of_it = {"source": [source.path for source in sources], "files": state, **dataclasses.asdict(options)}
    all_of_it["crop"] = crop
    return json.loads(json.dumps(all_of_it, default=str))


def _jobs(
    part: _Part, chunks: Sequence[Chunk], options: PrepareOptions, crop: dict | None, folder: Path
) -> list[ShardJob]:
    """A job for each chunk; the folders that they write to are made, below the unfinished preparation `folder`."""
    targets = {split: folder / "result" / part.name / name for split, name in options.splits().items()}
    notes, scratch = folder / "notes" / (part.name or "all"), folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed run had begun
    for path in [*targets.values(), notes, scratch]:
        path.mkdir(parents=True, exist_ok=True)
    prefix = f"{part.name}/" if part.name else ""
    return [ShardJob(part.source, chunk, options, prefix, targets, notes, scratch, crop) for chunk in chunks]


def _write(jobs: Sequence[ShardJob], workers: int, progress: bool) -> None:
    """Write the shards that are not there yet."""
    left = [job for job in jobs if not job.is_done()]
    num_records = sum(job.chunk.count for job in jobs)
    done = num_records - sum(job.chunk.count for job in left)
    if done:
        print(f"continues what was interrupted: {done} of {num_records} records are done", flush=True)
    if min(workers, len(left)) > 1:  # this process has nothing else to do meanwhile
        threading.Thread(target=load_energon, daemon=True).start()
    with tqdm(total=num_records, initial=done, unit="record", desc="prepare", disable=not progress or not left) as bar:
        write_chunks(left, workers, bar.update)


def _write_dropped(jobs: Sequence[ShardJob], result: Path) -> None:
    """Write dropped.jsonl, a line for each dropped record with its place and reason; no file where there is none."""
    if not any(job.dropped.stat().st_size for job in jobs):
        return
    with (result / DROPPED).open("wb") as file:
        for job in jobs:
            file.write(job.dropped.read_bytes())


def _check_kept(part: _Part, options: PrepareOptions) -> None:
    statistics = part.statistics
    dropped = statistics.dropped.most_common()
    if not statistics.kept:
        reasons = ", ".join(f"{reason} {count}" for reason, count in dropped) or "it is empty"
        first = f", first: {' '.join(statistics.examples[dropped[0][0]].split())}" if dropped else ""
        rule = f"no record can be used ({reasons}){first}"
        raise OptionError("source", part.source.path, rule, "check its format and paths")
    for split in options.splits():
        if not statistics.splits().get(split):
            rule = f"leaves no record of {part.source.path} for {split}: it has {statistics.kept}"
            raise OptionError("validation_fraction", options.validation_fraction, rule, "set another, or 0")


def _write_indexes(parts: Sequence[_Part], options: PrepareOptions, result: Path, progress: bool) -> list[str]:
    """Indexes, manifests and blends of all shards in `result`; the folders of the data sets."""
    data_sets: list[str] = []
    for number, part in enumerate(parts):
        for split, name in options.splits().items():
            folder = result / part.name / name
            write_index(folder, progress=progress)
            write_manifest(folder, part.statistics.shards[split], str(part.source.path))
            data_sets.append(folder.relative_to(result).as_posix())
        if len(parts) > 1:
            part.weight = float(options.weights[number] if options.weights else part.statistics.splits()["train"])
    if len(parts) > 1:
        for split, name in options.splits().items():
            entries = [((Path(part.name) / name).as_posix(), part.weight or 1.0) for part in parts]
            write_blend(result / ("blend.yaml" if split == "train" else f"{split}.yaml"), entries)
    return data_sets


def _report(parts: Sequence[_Part], whole: Statistics, options: PrepareOptions, output: Path) -> None:
    print(f"kept {whole.kept} records in {output}, dropped {whole.dropped.total()}")
    for reason, count in whole.dropped.most_common():
        print(f"  dropped {count}: {reason} (first: {printable(whole.examples[reason])})")
    for part in parts if len(parts) > 1 else ():
        told = part.summary()
        print("  {path}: kept {kept}, dropped {dropped}, weight {weight:g}".format(**told))
    if options.validation_fraction:
        print("  " + ", ".join(f"{name}: {count} records" for name, count in whole.splits().items()))
    if whole.having["hint"]:
        what = "kept; hint=remove takes it out" if options.hint == "keep" else "taken out; hint=keep leaves it"
        print(f'  {whole.having["hint"]} questions carry the hint "{options.hint_text}" ({what})')
    for line in _advice(whole, options):
        print(f"  {line}")
    if whole.dropped:
        print(f"  {output / DROPPED} lists every record that was dropped")


def _advice(whole: Statistics, options: PrepareOptions) -> Iterator[str]:
    """What looks odd, how often, and the option that mends it."""
    having, boxes = whole.having, whole.having["box"]
    if having["rotated"]:
        other, frame = ("stored", "upright image") if options.bbox_frame == "upright" else ("upright", "stored pixels")
        yield (
            f"{having['rotated']} images are turned by EXIF; boxes are taken in the {frame} (else bbox_frame={other})"
        )
    for trait, what in _ODD.items():
        if having[trait]:
            yield f"{having[trait]} {what}"
    outside = having["leaving"] + whole.dropped["box_outside_image"] + whole.dropped["empty_box"]
    if outside:
        others = " or ".join(name for name in BOX_FORMATS if name != options.bbox_format)
        yield (
            f"{outside} of {boxes + outside - having['leaving']} boxes reach beyond their image or have no area: "
            f"they are read as bbox_format={options.bbox_format}; look at --preview, and else set {others}"
        )
    if fractions := having["fraction"]:
        mend = "for fractions set bbox_format=xyxy_unit"
        if 2 * fractions <= boxes:
            mend = "where those are fractions, write all boxes in one form"
        yield f"{fractions} of {boxes} boxes have no number above 1: {mend}"
    for trait, limit, mend in (
        ("large_percent", 100, "for percent divide them by 100 and set bbox_format=xyxy_unit"),
        ("large_thousandths", 1000, "for thousandths set bbox_format=xyxy_1000"),
    ):
        small, large = having[trait], having["large"]
        if large >= _ENOUGH and small >= 0.95 * large:
            what = "boxes in images with a side above 1500 pixels have no number above"
            yield f"{small} of {large} {what} {limit}: {mend}"
            break
