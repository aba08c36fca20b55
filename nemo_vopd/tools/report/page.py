"""The report of a run, or of two side by side: one self-contained HTML page made from the files of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from nemo_vopd.tools.report.charts import Spec, vega_bundle
from nemo_vopd.tools.report.curves import accuracy_section, curves_section, warmup_section
from nemo_vopd.tools.report.facts import config_section, data_section, drops_section, facts_section
from nemo_vopd.tools.report.header import header
from nemo_vopd.tools.report.numbers import format_number, format_percent
from nemo_vopd.tools.report.results import benchmarks_section, evidence_section
from nemo_vopd.tools.report.run_files import Results, Run
from nemo_vopd.tools.report.tokens import shown_tokens

# The policy makes the promise of a self-contained page one that the browser keeps.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_TEMPLATES = Path(__file__).with_name("templates")


def _no_chart(spec: Spec) -> Markup:
    raise NotImplementedError("this page has no charts")


def templates(chart: Callable[[Spec], Markup] = _no_chart) -> jinja2.Environment:
    """The templates of this page and of others that look like it; `chart` makes the place of a chart."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {}  # the order of a row is that of its tooltip
    environment.filters |= {"chart": chart, "number": format_number, "percent": format_percent, "tokens": shown_tokens}
    environment.tests |= {"finite": math.isfinite, "long": lambda text: any(len(word) > 12 for word in text.split())}
    environment.globals["file"] = lambda name: Markup((_TEMPLATES / name).read_text(encoding="utf-8"))
    return environment


def write_report(path: Path, run: Run, other: Run | None = None, baseline: Sequence[Results] = ()) -> None:
    """Write the page of `run` to `path`; a section that has nothing to show is left out.

    `other` is a second run to compare with. Benchmarks are compared with the results in `baseline`, else with those
    of `other`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    page = _page(run, other, list(baseline))
    partial.write_text(page, encoding="utf-8", errors="replace")  # JSON and file names may hold lone surrogates
    partial.replace(path)


def _page(run: Run, other: Run | None, baseline: list[Results]) -> str:
    examples = run.examples
    files = ", ".join(dict.fromkeys(file.name for file in baseline))
    names = run.name, files or (other.name if other else "")
    baseline = baseline or (other.results if other else [])
    viewer = {"traces": examples.traces, "note": examples.note} if examples.traces or examples.note else {}
    sections: list[tuple[str, str, Any]] = [
        ("accuracy", "Accuracy over steps", accuracy_section(run, other)),
        ("evidence", "The gap by evidence size", evidence_section(run.results, baseline, names)),
        ("benchmarks", "Benchmarks", benchmarks_section(run.results, baseline, names)),
        ("curves", "Training", curves_section(run, other)),
        ("warmup", "Warm-up", warmup_section(run)),
        ("examples", "Examples", examples.examples),
        ("tokens", "Token by token", viewer),
        ("drops", "Dropped", drops_section(run)),
        ("data", "Data", data_section(run.data_card)),
        ("config", "Options", config_section(run, other)),
        ("facts", "Run facts", facts_section(run)),
    ]
    charts: list[Spec] = []

    def chart(spec: Spec) -> Markup:
        """The place of a chart, which the script fills with the specification at the end of the page."""
        charts.append(spec)
        return Markup('<div class="chart" id="chart{}"></div>').format(len(charts) - 1)

    return (
        templates(chart)
        .get_template("page.html.j2")
        .render(
            policy=_POLICY,
            title=f"Vision-OPD: {run.name}" + (f" and {other.name}" if other else ""),
            header=header(run, other),
            run=run,
            other=other,
            notes=[f"{one.name}: {note}" if other else note for one in (run, other) if one for note in one.notes],
            sections=[section for section in sections if section[2]],
            charts=lambda: charts,
            vega=lambda: Markup(vega_bundle()),
        )
    )
