"""Cards of the report page that show single answers: examples before and after, and responses token by token."""

from __future__ import annotations

import math
from html import escape

from nemo_vopd.tools.report.examples_file import Answer, Box, Example, Picture, TokenTrace
from nemo_vopd.tools.report.svg import as_float, format_number, format_percent

LN2 = math.log(2)


def legend(entries: list[tuple[str, str]] | None, other: str = "") -> str:
    """Names and CSS colours of what a chart shows; `other` names the run whose curves are dashed."""
    names = [f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in entries or []]
    if other:
        names.append(f'<span><i class="dashed"></i>{escape(other)}</span>')
    return f'<div class="legend">{"".join(names)}</div>'


def _image(picture: Picture, alt: str, bbox: Box | None = None) -> str:
    """The picture with the evidence box drawn over it in the image's own pixel coordinates."""
    width, height = picture.width, picture.height
    overlay = ""
    if bbox is not None and all(math.isfinite(as_float(edge)) for edge in bbox):
        left, top, right, bottom = bbox
        place = f'x="{left:g}" y="{top:g}" width="{max(right - left, 0):g}" height="{max(bottom - top, 0):g}"'
        overlay = (
            f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect class="halo" {place}/><rect class="box" {place}/></svg>'
        )
    # Tiny synthetic images are shown pixel by pixel; photographs are left to the browser's filter.
    small = ' class="small"' if max(width, height) <= 256 else ""
    return (
        f'<div class="shot"><img{small} src="{escape(picture.uri)}" width="{width}" height="{height}" '
        f'alt="{escape(alt)}">{overlay}</div>'
    )


def _views(image: Picture | None, crop: Picture | None, bbox: Box | None = None) -> str:
    figures = []
    if image is not None:
        figures.append(f"<figure>{_image(image, 'Full image', bbox)}<figcaption>Full view</figcaption></figure>")
    if crop is not None:
        name = "Crop around the evidence"
        figures.append(f"<figure>{_image(crop, name)}<figcaption>Crop view</figcaption></figure>")
    return f'<div class="shots">{"".join(figures)}</div>' if figures else ""


def _answer(given: Answer | None) -> str:
    if given is None:
        return '<td class="note">not asked</td>'
    text = f"<span>{escape(given.text.strip()) or '(empty)'}</span>"
    if given.right is None:
        return f'<td><span class="mark">{text}</span></td>'
    name, stroke = ("right", "M2 8.5L6.2 13L14 3.5") if given.right else ("wrong", "M3 3L13 13M13 3L3 13")
    return (
        f'<td><span class="mark {name}"><svg viewBox="0 0 16 16" aria-hidden="true"><path d="{stroke}"/></svg>'
        f'<span class="hidden">{name}:</span>{text}</span></td>'
    )


def _card(example: Example) -> str:
    moments = {
        "Before": (example.full_before, example.crop_before),
        "After": (example.full_after, example.crop_after),
    }
    moments = {name: pair for name, pair in moments.items() if pair != (None, None)}
    rows = "".join(
        f'<tr><th scope="row">{view}</th>' + "".join(_answer(pair[i]) for pair in moments.values()) + "</tr>"
        for i, view in enumerate(("Full view", "Crop view"))
    )
    heads = "".join(f"<th>{name}</th>" for name in moments)
    table = f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table>" if moments else ""
    answer = f"<p>Answer: <b>{escape(example.answer)}</b></p>" if example.answer is not None else ""
    return (
        f'<article class="card">{_views(example.image, example.crop, example.bbox)}'
        f'<p class="question">{escape(example.question)}</p>{answer}{table}</article>'
    )


def examples_section(examples: list[Example]) -> str:
    """A grid of questions with both views and the answers before and after; empty without examples."""
    if not examples:
        return ""
    return (
        '<p class="note">The box marks the evidence; this page draws it, for the reader. A tick '
        "means an answer that counts as right, a cross one that counts as wrong.</p>"
        f'<div class="examples">{"".join(map(_card, examples))}</div>'
    )


def _visible(token: str) -> str:
    """Token text with its white space made visible."""
    return escape(token.replace(" ", "\u00b7").replace("\n", "\u21b5").replace("\t", "\u21e5") or "(empty)")


def _bar(probability: float, who: str) -> str:
    name = f'<span class="hidden">{"student" if who == "full" else "teacher"}</span>'
    if not math.isfinite(probability):
        return f'<div class="bar {who}">{name}<span class="absent">not among its top tokens</span></div>'
    share = min(max(probability, 0.0), 1.0)
    return f'<div class="bar {who}" style="--p:{share:.4f}">{name}<i></i><span>{format_percent(share)}</span></div>'


def _token_detail(token: str, position: str, student: float, teacher: float, divergence: float, tops: list) -> str:
    """What both policies thought at one position: the sampled token first, then every other top token."""
    others: dict[str, list[float]] = {}
    for who, top in enumerate(tops):
        for text, probability in top:
            if text != token and not math.isfinite(others.setdefault(text, [math.nan, math.nan])[who]):
                others[text][who] = as_float(probability)
    sampled = [math.exp(min(value, 0.0)) if math.isfinite(value) else math.nan for value in (student, teacher)]
    ranked = sorted(others.items(), key=lambda item: -max((p for p in item[1] if math.isfinite(p)), default=0.0))
    rows = "".join(
        f"<div class='pair'><div><code>{_visible(text)}</code>{'<br><em>sampled</em>' if i == 0 else ''}</div>"
        f"<div>{_bar(pair[0], 'full')}{_bar(pair[1], 'crop')}</div></div>"
        for i, (text, pair) in enumerate([(token, sampled), *ranked])
    )
    return (
        f'<div class="facts-line"><span>Token {position}: <code>{_visible(token)}</code></span>'
        f'<span class="full">Student log-prob <b>{format_number(student, 3)}</b></span>'
        f'<span class="crop">Teacher log-prob <b>{format_number(teacher, 3)}</b></span>'
        f"<span>Divergence <b>{format_number(divergence, 4)}</b> nats</span></div>{rows}"
    )


def _trace(number: int, trace: TokenTrace) -> str:
    length = len(trace.tokens)

    def column(values: list[float]) -> list[float]:
        return [as_float(values[j]) if j < len(values) else math.nan for j in range(length)]

    student, teacher = column(trace.student_log_probs), column(trace.teacher_log_probs)
    divergence = column(trace.divergence)
    # The page opens where the two policies disagree most.
    known = [value if math.isfinite(value) else -1.0 for value in divergence]
    chosen = known.index(max(known)) if known else 0
    chips, details = [], []
    for j, token in enumerate(trace.tokens):
        heat = math.sqrt(min(max(known[j], 0.0) / LN2, 1.0))
        name, on = f"trace{number}-{j}", j == chosen
        chips.append(
            f'<button role="tab" type="button" id="{name}" aria-controls="{name}-detail" '
            f'aria-selected="{str(on).lower()}" tabindex="{0 if on else -1}" style="--d:{heat:.3f}">'
            f"{_visible(token)}</button>"
        )
        tops = [top[j] if j < len(top) else [] for top in (trace.student_top, trace.teacher_top)]
        detail = _token_detail(token, f"{j + 1} of {length}", student[j], teacher[j], divergence[j], tops)
        details.append(
            f'<div role="tabpanel" id="{name}-detail" aria-labelledby="{name}"{"" if on else " hidden"}>{detail}</div>'
        )
    return (
        f'<article class="card trace"><div>{_views(trace.image, trace.crop)}</div>'
        f'<div><p class="question">{escape(trace.question)}</p>'
        f'<div class="tokens" role="tablist" aria-label="Response tokens">{"".join(chips)}</div>'
        f'<div class="detail">{"".join(details)}</div></div></article>'
    )


def tokens_section(traces: list[TokenTrace], note: str) -> str:
    """The token viewer: chips tinted by divergence, and what both policies thought at the chosen one.

    Empty without traces; `note` says which models they are of.
    """
    if not traces:
        return f'<p class="note">{escape(note)}</p>' if note else ""
    scale = "".join(f"<li>{label}</li>" for label in ("0", "0.04", "0.17", "0.39", "ln 2"))
    policies = [("student", "var(--full)"), ("teacher", "var(--crop)")]
    return (
        f"<p class='note'>{escape(note)} The stronger the colour of a "
        "token, the more the teacher disagrees there. Point at a token, or focus one and use the arrow keys, to see "
        f"what both would have written.</p>{legend(policies)}"
        '<div class="scale"><div></div>'
        f"<ol>{scale}</ol>Jensen-Shannon divergence, nats (square-root scale)</div>"
        + "".join(_trace(i, trace) for i, trace in enumerate(traces))
    )
