"""What a run was asked to do and what served it: its options, two runs' differences, versions and facts."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

import yaml

from nemo_vopd.tools.report.run_files import Run
from nemo_vopd.tools.report.text import fact, facts_table, label, numeric_table


def config_section(run: Run, other: Run | None) -> str:
    """The configuration, folded; with two runs the options that differ on top. Empty if it was not written."""
    differ = _differences(run, other) if other else ""
    runs = [one for one in (run, other) if one is not None and one.config]
    folded = "".join(
        f"<details><summary>Every option of {escape(one.name)}</summary>"
        f'<pre class="card">{escape(yaml.safe_dump(one.config, sort_keys=False, allow_unicode=True))}</pre></details>'
        for one in runs
    )
    return differ + folded


def _differences(run: Run, other: Run) -> str:
    if not (run.config and other.config):
        return ""
    ours, theirs = (dict(_flat({**one.config, **_versions(one)})) for one in (run, other))
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if not keys:
        return '<p class="note">Both runs have the same options and versions.</p>'
    rows = [[f"<code>{escape(key)}</code>", *(_value(one, key) for one in (ours, theirs))] for key in keys]
    return numeric_table(["Option", run.name, other.name], rows, "Options that differ")


def _versions(run: Run) -> dict[str, Any]:
    return {
        f"({key})": run.environment[key] for key in ("layout", "implementations", "versions") if key in run.environment
    }


def _value(options: dict[str, Any], key: str) -> str:
    return f"<code>{escape(str(options[key]))}</code>" if key in options else "\u2013"


def _flat(options: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values, as they are typed."""
    for key, value in options.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, "null" if value is None else str(value).lower() if isinstance(value, bool) else value


def facts_section(run: Run) -> str:
    """Summary, status, implementations and versions as tables; empty if there are none."""
    summary = {**run.summary, **({"status": run.status} if run.status else {}), **run.environment}
    flat = [(label(str(key)), fact(str(key), value)) for key, value in summary.items() if not isinstance(value, dict)]
    tables = [facts_table("Run", flat)] if flat else []
    for key, facts in summary.items():
        if isinstance(facts, dict) and facts:
            # Phases are seconds whatever their own names are.
            unit = " seconds" if "seconds" in str(key) or "phases" in str(key) else ""
            rows = [(str(name).replace("_", " "), fact(f"{name}{unit}", value)) for name, value in facts.items()]
            tables.append(facts_table(label(str(key)), rows))
    return f'<div class="facts">{"".join(tables)}</div>' if tables else ""
