"""Bounds of options: every bounded field refuses what lies outside, by name, and takes its default."""

import math
from typing import Any

import pytest

from nemo_vopd.bounds import Bounds, bounded_options, check_bounds
from nemo_vopd.config import Config
from nemo_vopd.errors import OptionError
from nemo_vopd.tools.evaluation.evaluate_options import EvaluateConfig
from nemo_vopd.tools.planning.assumptions import PlanConfig
from nemo_vopd.validation import validate
from recipes.generate import GenerateConfig
from recipes.launch import LaunchConfig
from recipes.prepare_data import PrepareConfig
from recipes.quickstart import QuickstartConfig

OPTIONS = {option: (bounds, optional) for option, _, bounds, optional in bounded_options(EvaluateConfig())}


def set_option(config: Any, option: str, value: Any) -> None:
    *path, name = option.split(".")
    for part in path:
        config = getattr(config, part)
    setattr(config, name, value)


def outside(bounds: Bounds) -> list[Any]:
    if bounds.one_of:
        return ["no such choice", ""]
    low = [bounds.at_least - 1e-6] if bounds.at_least is not None else [bounds.above, bounds.above - 1]
    high = [bounds.at_most + 1e-6] if bounds.at_most is not None else [bounds.below] if bounds.below is not None else []
    return [*low, *high, math.nan, math.inf, -math.inf]


def test_defaults_lie_within_their_bounds():
    for schema in (EvaluateConfig, GenerateConfig, LaunchConfig, PlanConfig, PrepareConfig, QuickstartConfig):
        assert list(bounded_options(schema()))
        check_bounds(schema())
    validate(Config())
    assert len(OPTIONS) > 55


@pytest.mark.parametrize("option", OPTIONS)
def test_what_lies_outside_is_refused_by_name(option):
    bounds, optional = OPTIONS[option]
    for value in outside(bounds):
        config = EvaluateConfig()
        set_option(config, option, value)
        with pytest.raises(OptionError) as refused:
            check_bounds(config)
        line = str(refused.value)
        rule = "must be a finite number" if isinstance(value, float) and not math.isfinite(value) else bounds.rule
        assert line.startswith(f"{option}={value}: {rule}") and ("; set " in line), line
        assert ("or null" in line) == (optional and rule == bounds.rule), line
    config = EvaluateConfig()
    edges = [*bounds.one_of, *(x for x in (bounds.at_least, bounds.at_most) if x is not None)]
    for value in [*edges, *([None] if optional else [])]:
        set_option(config, option, value)
        check_bounds(config)


@pytest.mark.parametrize(
    "bounds,rule",
    [
        (Bounds(at_least=1), "must be at least 1"),
        (Bounds(above=0), "must be positive"),
        (Bounds(above=0, at_most=1), "must lie in (0, 1]"),
        (Bounds(at_least=0, below=1), "must lie in [0, 1)"),
    ],
)
def test_the_rule_in_words_is_the_rule(bounds, rule):
    allowed = {0: rule.endswith("[0, 1)"), 0.5: bounds.at_least != 1, 1: not rule.endswith("[0, 1)"), -0.5: False}
    assert bounds.rule == rule and {value: bounds.allow(value) for value in allowed} == allowed
