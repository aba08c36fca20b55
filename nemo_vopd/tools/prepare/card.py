"""The data card: what a prepared data set holds, as JSON for programs and as one HTML page for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_vopd.tools.prepare.statistics import AREA_EDGES, MEGAPIXEL_EDGES, Statistics, histogram
from nemo_vopd.tools.report.numbers import file_size, format_area
from nemo_vopd.tools.report.page import templates
from nemo_vopd.tools.report.parts import Cell, Counts, Facts, Table

_WORDS = {
    "malformed_record": "not of the form that is expected",
    "duplicate_id": "an earlier record has the same id",
    "missing_crop": "no crop image, or neither box nor crop",
    "path_outside_folder": "its image lies outside the folder of the source",
}


def write_card(
    folder: Path,
    whole: Statistics,
    sources: list[dict],
    parts: list[str],
    options: dict[str, object],
    crop: dict[str, Any],
    copies: Sequence[str] = (),
) -> None:
    """Write data_card.json and data_card.html to `folder`, and both again to its folders `copies`.

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
        "with_answer": whole.with_answer,
        "with_box": whole.with_box,
        "with_crop": whole.with_crop,
        "with_hint": whole.with_hint,
        "rotated": whole.rotated,
        "flat": whole.flat,
        "image_megapixels": histogram(whole.megapixels, MEGAPIXEL_EDGES),
        "relative_box_area": histogram(whole.relative_area, AREA_EDGES),
        "crop": crop,
        "options": options,
    }
    page = card_page(card)
    for place in (folder, *(folder / name for name in copies)):
        own = {**card, "parts": ["."]} if place != folder else card
        (place / "data_card.json").write_text(json.dumps(own, indent=1, ensure_ascii=False) + "\n")
        (place / "data_card.html").write_text(page)


def card_page(card: dict) -> str:
    """The page, which works from one file, offline. `card`: contents of data_card.json."""
    numbers = [("records", f"{card['kept']:,}"), ("dropped", f"{sum(card['dropped'].values()):,}")]
    numbers.append(("on disk", file_size(card["bytes"])))
    if (area := card["relative_box_area"]["median"]) is not None:
        numbers.append(("median share of the image that a box covers", format_area(area)))
    rows = [
        [
            Cell(reason, code=True),
            _WORDS.get(reason, reason.replace("_", " ")),
            f"{count:,}",
            card["examples"].get(reason, ""),
        ]
        for reason, count in card["dropped"].items()
    ]
    crop = {f"crop.{key}": value for key, value in card["crop"].items()}
    made_with = [(name, _option(value)) for name, value in {**card["options"], **crop}.items()]
    return (
        templates()
        .get_template("data_card.html.j2")
        .render(
            names=", ".join(Path(source["path"]).name for source in card["sources"]),
            numbers=numbers,
            sources=_sources(card["sources"]),
            contents=_contents(card),
            histograms=_histograms(card),
            dropped=Table(["reason", "meaning", "records", "first"], rows),
            options=Facts("", made_with),
        )
    )


def _sources(sources: list[dict]) -> Table:
    weights = [source["weight"] for source in sources if source["weight"] is not None]
    blended = len(weights) == len(sources) and len(sources) > 1
    rows = []
    for source in sources:
        row = [source["path"], source["layout"], f"{source['kept']:,}", f"{source['dropped']:,}"]
        rows.append([*row, format_area(source["weight"] / sum(weights))] if blended else row)
    return Table(["source", "layout", "kept", "dropped"] + ["share of the blend"] * blended, rows)


def _contents(card: dict) -> Table:
    splits = {f"in {name}": count for name, count in card["splits"].items()} if len(card["splits"]) > 1 else {}
    hint = f"whose question carries the red-box hint ({card['options'].get('hint', 'keep')})"
    counts = {
        **splits,
        "with a reference answer": card["with_answer"],
        "with an evidence box": card["with_box"],
        "with a crop image": card["with_crop"],
        hint if card["with_hint"] else "whose question carries the red-box hint": card["with_hint"],
        "whose image is turned by EXIF": card["rotated"],
        "whose image has one colour": card["flat"],
    }
    rows = [[words, f"{count:,}", format_area(count / card["kept"])] for words, count in counts.items()]
    return Table(["", "records", "share"], rows)


def _histograms(card: dict) -> list[tuple[Counts, str]]:
    """Image sizes and box areas: a bar for each range, and the median."""
    found = []
    for key, title, as_text in (
        ("image_megapixels", "Image size in megapixels", "{:.3g}".format),
        ("relative_box_area", "Box area over image area", format_area),
    ):
        data = card[key]
        edges = [as_text(edge) for edge in data["edges"]]
        ranges = [f"{low} to {high}" for low, high in zip(edges, edges[1:], strict=False)]
        if ranges:
            rows = list(zip(ranges, map(float, data["counts"]), strict=True))
            found.append((Counts(rows, title), as_text(data["median"])))
    return found


def _option(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items() if item is not None) or "known names"
    return "null" if value is None else str(value)
