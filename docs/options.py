"""Writes the bounds of all options into docs/troubleshooting.md: `python docs/options.py` updates it."""

from __future__ import annotations

from pathlib import Path

from nemo_vopd.bounds import bounded_options
from nemo_vopd.tools.evaluation.evaluate_options import EvaluateConfig

DOCUMENT = Path(__file__).with_name("troubleshooting.md")
FIRST, LAST = "| `OPTION=???: has no default`", "| `data.full.min_pixels=N: must lie between"
"""Rows of the table before and after those written here."""


def rows() -> str:
    """A row for each rule, with the options that it bounds."""
    by_rule: dict[str, list[str]] = {}
    for option, _, bounds, optional in bounded_options(EvaluateConfig()):
        rule = "must be one of ..." if bounds.one_of else bounds.rule
        by_rule.setdefault(rule, []).append(f"`{option}`" + " (or `null`)" * optional)
    number = " (or `must be a finite number`)"
    return "".join(
        f"| `OPTION=VALUE: {rule}`{'' if rule.endswith('...') else number} | {', '.join(options)} |\n"
        for rule, options in sorted(by_rule.items())
    )


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    start, end = text.index("\n", text.index(FIRST)) + 1, text.index(LAST)
    DOCUMENT.write_text(text[:start] + rows() + text[end:])
