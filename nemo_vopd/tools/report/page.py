"""The report of a run, or of two side by side: one self-contained HTML page made from the files of a run."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from nemo_vopd.tools.report.cards import examples_section, tokens_section
from nemo_vopd.tools.report.config import config_section, facts_section
from nemo_vopd.tools.report.curves import accuracy_section, curves_section, warmup_section
from nemo_vopd.tools.report.data import data_section, drops_section
from nemo_vopd.tools.report.header import gap_figure_svg, header
from nemo_vopd.tools.report.results import benchmarks_section, evidence_section
from nemo_vopd.tools.report.run_files import Results, Run
from nemo_vopd.tools.report.style import SCRIPT, STYLE

__all__ = ["gap_figure_svg", "write_report"]

# The policy makes the promise of a self-contained page one that the browser keeps.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_report(path: Path, run: Run, other: Run | None = None, baseline: Sequence[Results] = ()) -> None:
    """Write the page of `run` to `path`; a section that has nothing to show is left out.

    `other` is a second run to compare with. Benchmarks are compared with the results in `baseline`, else with those
    of `other`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    page = _page(run, other, list(baseline) or (other.results if other else []))
    partial.write_text(page, encoding="utf-8", errors="replace")  # JSON and file names may hold lone surrogates
    partial.replace(path)


def _page(run: Run, other: Run | None, baseline: list[Results]) -> str:
    examples = run.examples
    sections = [
        ("accuracy", "Accuracy over steps", accuracy_section(run, other)),
        ("evidence", "The gap by evidence size", evidence_section(run.results, baseline)),
        ("benchmarks", "Benchmarks", benchmarks_section(run.results, baseline)),
        ("curves", "Training", curves_section(run, other)),
        ("warmup", "Warm-up", warmup_section(run)),
        ("examples", "Examples", examples_section(examples.examples)),
        ("tokens", "Token by token", tokens_section(examples.traces, examples.note)),
        ("drops", "Dropped", drops_section(run)),
        ("data", "Data", data_section(run.data_card)),
        ("config", "Options", config_section(run, other)),
        ("facts", "Run facts", facts_section(run)),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name, _ in shown)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{name}</h2>{content}</section>'
        for key, name, content in shown
    )
    title = f"Vision-OPD: {run.name}" + (f" and {other.name}" if other else "")
    navigation = f'<nav aria-label="Sections">{links}</nav>' if links else ""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"{header(title, run, other)}{navigation}<main>{body}</main>"
        "<footer>Vision-OPD: on-policy self-distillation of a vision-language model (arXiv 2605.18740).</footer>"
        f'<div id="tip" hidden></div><script>{SCRIPT}</script></body></html>\n'
    )
