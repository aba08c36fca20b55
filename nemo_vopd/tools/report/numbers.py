"""Numbers as people read them: in the unit that a metric's name tells, rounded, with a true minus sign."""

from __future__ import annotations

import math
from numbers import Real

NAN = float("nan")
ABSURD = 1e100
"""Numbers beyond it are damage, not measurements."""
MINUS, DASH, INFINITE = "\u2212", "\u2013", "\u221e"
Interval = tuple[float, float]
_EXPONENT_FROM = 1e15
_LABELS = {
    "full_accuracy_before": "Full-view accuracy before",
    "full_accuracy_after": "Full-view accuracy after",
    "crop_accuracy_before": "Crop-view accuracy before",
    "crop_accuracy_after": "Crop-view accuracy after",
    "full_accuracy": "Full-view accuracy",
    "crop_accuracy": "Crop-view accuracy",
    "wall_seconds": "Wall-clock time",
    "num_parameters": "Parameters",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "distinct_2": "Distinct neighbouring pairs",
    "student_topk_mass": "Top-k mass of the student",
    "teacher_topk_mass": "Top-k mass of the teacher",
    "mismatch_mean": "Mismatch, mean",
    "mismatch_max": "Mismatch, largest",
    "mismatch_share": "Mismatch, share of tokens far off",
    "importance_weight_mean": "Importance weight, mean",
    "mean_response_length": "Response length, mean",
}


def as_float(value: object) -> float:
    """`value` as a float; NaN for anything that is no number or an absurd one, so that a hole stays a hole.

    Sizes beyond ABSURD count as missing and their inverses as zero: no sum, range or ratio of the rest overflows.
    """
    # JSON may hold integers beyond the range of floats
    if not isinstance(value, Real) or (isinstance(value, int) and value.bit_length() > 1000):
        return NAN
    number = float(value)
    if not abs(number) <= ABSURD:
        return NAN
    return number if abs(number) >= 1 / ABSURD else 0.0


def as_interval(value: object) -> Interval:
    """The two ends of an interval in a file; NaN where there is none."""
    pair = value if isinstance(value, list | tuple) and len(value) == 2 else (NAN, NAN)
    return as_float(pair[0]), as_float(pair[1])


def format_number(value: float, decimals: int | None = None) -> str:
    """A number for people: three or four significant digits, thousands separated."""
    if not math.isfinite(value):
        return "n/a"
    size = abs(value)
    if size >= _EXPONENT_FROM:
        text = f"{value:.3g}".replace("e+", "e")
    elif decimals is not None:
        text = f"{value:,.{decimals}f}"
    elif value == int(value):
        text = f"{int(value):,}"
    elif size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    else:
        text = f"{value:,.{max(0, 2 - math.floor(math.log10(size)))}f}"
        text = text.rstrip("0") if size < 0.1 else text
    return text.replace("-", MINUS)


def format_percent(fraction: float, decimals: int = 1) -> str:
    """A fraction as a percentage."""
    return f"{format_number(100 * fraction, decimals)}%" if math.isfinite(fraction) else "n/a"


def format_area(fraction: float) -> str:
    """A share of the image's area, without digits that say nothing."""
    return f"{fraction * 100:.3g}%" if math.isfinite(fraction) else "n/a"


def format_interval(interval: Interval) -> str:
    """`[low, high]` in percent, empty if it is not known."""
    low, high = interval
    known = math.isfinite(low) and math.isfinite(high)
    return f"[{format_number(100 * low, 1)}, {format_number(100 * high, 1)}]" if known else ""


def points(fraction: float) -> str:
    """A difference of accuracies in percentage points."""
    return format_number(100 * fraction, 1)


def signed(value: float, decimals: int | None = None) -> str:
    """A number with its sign, also when it is positive."""
    return ("+" if value > 0 else "") + format_number(value, decimals)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if not 60 <= seconds < 1e12:
        return f"{format_number(seconds)} s" if math.isfinite(seconds) else "n/a"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def file_size(num_bytes: float) -> str:
    """Bytes in the largest unit that leaves a whole."""
    units = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}
    unit = next((name for name, scale in units.items() if num_bytes >= scale), "B")
    return f"{format_number(num_bytes / units.get(unit, 1.0))} {unit}"


def label(key: str) -> str:
    """What people call the metric or fact `key`."""
    if key in _LABELS:
        return _LABELS[key]
    words = key.removesuffix("_gib").removesuffix("_seconds").removeprefix("seconds_").replace("_", " ")
    words = words.removeprefix("num ")
    return words[:1].upper() + words[1:]


def fact(key: str, value: object) -> str:
    """`value` as text, in the unit that its key names."""
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(fact(key, item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{name}: {fact(key, one)}" for name, one in value.items() if one is not None) or "n/a"
    # A seed is a name, not a quantity.
    if not isinstance(value, Real) or key == "seed":
        return str(value)
    number = as_float(value)
    if "accuracy" in key or key == "gap_closed":
        return format_percent(number)
    if "seconds" in key:
        return duration(number)
    return f"{format_number(number)} GiB" if key.endswith("_gib") else format_number(number)
