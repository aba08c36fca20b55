"""The metrics file: each step once, also after a restart; JSON whatever the numbers are."""

import json
import logging
import math

from nemo.utils import logging as nemo_logging

from nemo_vopd.batch import DroppedSample, PromptBatch
from nemo_vopd.training.metrics import MetricsFile, Reporter, Timers
from tests.helpers import read_lines


def test_a_restart_takes_its_own_steps_out_and_keeps_the_earlier_ones(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in range(4):
        first.write({"step": step, "loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a crash
    again = MetricsFile(path, 2)
    again.write({"step": 2, "loss": 2.0})
    assert [(m["step"], m["loss"]) for m in read_lines(path)] == [(0, 1.0), (1, 1.0), (2, 2.0)]
    MetricsFile(path, 0)
    assert read_lines(path) == []


def test_non_finite_numbers_are_null(tmp_path):
    MetricsFile(tmp_path / "m.jsonl", 0).write({"step": 0, "loss": math.nan, "grad_norm": math.inf, "lr": 0.5})
    line = (tmp_path / "m.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda c: 1 / 0) == {"step": 0, "loss": None, "grad_norm": None, "lr": 0.5}


def test_timers_add_up_and_start_again():
    timers = Timers()
    for _ in range(2):
        with timers("rollout"):
            pass
    seconds = timers.pop()
    assert 0 < seconds["seconds_rollout"] <= seconds["seconds_step"]
    assert set(timers.pop()) == {"seconds_step"}


def test_ids_of_dropped_samples_cannot_write_to_a_terminal(groups, tmp_path):
    reporter = Reporter(tmp_path, groups, 1.0, None)
    reporter.open(0)
    dropped = [DroppedSample("a\x1b[2J\n\u202eb", "empty_question", "\x9b31m")]
    reporter.dropped["empty_question"] = 1
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    nemo_logging._logger.addHandler(handler)
    try:
        metrics = {"num_dropped_samples": 1, "num_dropped_responses": 0, "dropped_by_reason": {"empty_question": 1}}
        reporter.tell_dropped(0, metrics, PromptBatch([], dropped), [])
    finally:
        nemo_logging._logger.removeHandler(handler)
    assert told == ["dropped sample a?[2J ?b: empty_question (?31m)"]
    assert read_lines(tmp_path / "dropped.jsonl")[0]["id"] == dropped[0].id  # the file has it as it is
