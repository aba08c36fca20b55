"""The data card: what a prepared data set holds, as JSON for programs and as one HTML page for people."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_vopd.tools.prepare.shards import Statistics
from nemo_vopd.tools.report.numbers import file_size, format_area
from nemo_vopd.tools.report.page import templates
from nemo_vopd.tools.report.parts import Cell, Counts, Facts, Table

_MEGAPIXEL_EDGES = (0, 0.01, 0.03, 0.1, 0.3, 1, 2, 4, 8, 16, 32, 100)
_AREA_EDGES = (0, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
_PARTS = ("answer", "box", "crop", "hint")
_WORDS = {
    "malformed_record": "not of the form that is expected",
    "duplicate_id": "an earlier record has the same id",
    "missing_crop": "no crop image, or neither box nor crop",
    "several_images": "a question about several images",
    "path_outside_folder": "its image lies outside the folder of the source",
}


def write_card(
    folder: Path,
    whole: Statistics,
    sources: list[dict],
    parts: list[str],
    options: dict[str, object],
    crop: dict[str, Any],
) -> None:
    """Write data_card.json and data_card.html to `folder`, and where it holds parts of one source, to these as well.

    `sources` are {"path", "layout", "kept", "dropped", "weight"}, `parts` the data sets in `folder`.
    """
    card = {
        "sources": sources,
        "kept": whole.kept,
        "dropped": dict(whole.dropped.most_common()),
        "examples": whole.examples,
        "bytes": sum(entry["bytes"] for entries in whole.shards.values() for entry in entries),
        "shards": sum(len(entries) for entries in whole.shards.values()),
        "splits": whole.splits(),
        "parts": parts,
        **{f"with_{name}" if name in _PARTS else name: count for name, count in whole.having.items()},
        "image_megapixels": _binned(whole.megapixels, _MEGAPIXEL_EDGES),
        "relative_box_area": _binned(whole.relative_area, _AREA_EDGES),
        "crop": crop,
        "options": options,
    }
    page = data_card_page(card)
    cards = {folder: card}
    if len(sources) == 1:
        cards |= {folder / part: {**card, "parts": ["."]} for part in parts if part != "."}
    for place, own in cards.items():
        (place / "data_card.json").write_text(json.dumps(own, indent=1, ensure_ascii=False) + "\n")
        (place / "data_card.html").write_text(page)


def data_card_page(card: dict) -> str:
    """The page, which works from one file, offline. `card`: contents of data_card.json."""
    numbers = [("records", f"{card['kept']:,}"), ("dropped", f"{sum(card['dropped'].values()):,}")]
    numbers.append(("on disk", file_size(card["bytes"])))
    if (area := card["relative_box_area"]["median"]) is not None:
        numbers.append(("median share of the image that a box covers", format_area(area)))
    dropped = [
        [Cell(reason, code=True), _WORDS.get(reason, reason.replace("_", " ")), f"{count:,}", card["examples"][reason]]
        for reason, count in card["dropped"].items()
    ]
    options = {**card["options"], **{f"crop.{key}": value for key, value in card["crop"].items()}}
    page = templates().get_template("data_card.html.j2")
    return page.render(
        names=", ".join(Path(source["path"]).name for source in card["sources"]),
        numbers=numbers,
        sources=_sources(card["sources"]),
        contents=_contents(card),
        histograms=[
            *_histogram("Image size in megapixels", card["image_megapixels"], "{:.3g}".format),
            *_histogram("Box area over image area", card["relative_box_area"], format_area),
        ],
        dropped=Table(["reason", "meaning", "records", "first"], dropped),
        options=Facts("", [(name, _option(value)) for name, value in options.items()]),
    )


def _sources(sources: list[dict]) -> Table:
    heads = ["source", "layout", "kept", "dropped"]
    rows = [[one["path"], one["layout"], f"{one['kept']:,}", f"{one['dropped']:,}"] for one in sources]
    if len(sources) > 1:
        heads.append("share of the blend")
        whole = sum(one["weight"] for one in sources)
        rows = [[*row, format_area(one["weight"] / whole)] for row, one in zip(rows, sources, strict=True)]
    return Table(heads, rows)


def _contents(card: dict) -> Table:
    splits = {f"in {name}": count for name, count in card["splits"].items()} if len(card["splits"]) > 1 else {}
    hint = f" ({card['options']['hint']})" if card["with_hint"] else ""
    counts = {
        **splits,
        "with a reference answer": card["with_answer"],
        "with an evidence box": card["with_box"],
        "with a crop image": card["with_crop"],
        f"whose question carries the red-box hint{hint}": card["with_hint"],
        "whose image is turned by EXIF": card["rotated"],
        "whose image has one colour": card["flat"],
        "whose image is nearly black": card["dark"],
        "whose box reaches beyond the image": card["leaving"],
        "whose box has no number above 1": card["fraction"],
        "whose crop is enlarged more than twice": card["upscaled"],
        "with several boxes, taken together": card["several_boxes"],
        "with several questions, of which the first is taken": card["several_questions"],
    }
    rows = [[words, f"{count:,}", format_area(count / card["kept"])] for words, count in counts.items()]
    return Table(["", "records", "share"], rows)


def _histogram(title: str, data: dict, as_text: Callable[[float], str]) -> list[tuple[Counts, str]]:
    """A bar for each range, and the median; none where there are no values."""
    if not data["counts"]:
        return []
    edges = [as_text(edge) for edge in data["edges"]]
    ranges = [f"{low} to {high}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    return [(Counts(list(zip(ranges, map(float, data["counts"]), strict=True)), title), as_text(data["median"]))]


def _binned(values: Sequence[float], edges: Sequence[float]) -> dict:
    """{"edges": [n + 1], "counts": [n], "median": number or null}; empty bins at both ends are left out."""
    if not values:
        return {"edges": [], "counts": [], "median": None}
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), np.array(edges, dtype=float))
    used = np.flatnonzero(counts)
    low, high = int(used[0]), int(used[-1]) + 1
    median = float(f"{np.median(values):.6g}")
    return {"edges": list(edges[low : high + 1]), "counts": counts[low:high].tolist(), "median": median}


def _option(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items() if item is not None) or "known names"
    return "null" if value is None else str(value)
