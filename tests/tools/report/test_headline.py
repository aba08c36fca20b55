"""The headline of the report: changes are told from noise."""

from __future__ import annotations

import re

import numpy as np

from nemo_vopd.tools.report.estimates import accuracy, ends
from nemo_vopd.tools.report.header import headline
from nemo_vopd.tools.report.run_files import Curves, Run, read_run
from tests.tools.report.html_page import page_of
from tests.tools.report.run_folder import write_run


def losses(values: np.ndarray) -> Run:
    steps = np.arange(float(len(values)))
    return Run("a", metrics=Curves(steps, {"loss": values}))


def measured(full: list[float], crop: list[float], num: int) -> Run:
    columns = {"full_accuracy": np.array(full), "crop_accuracy": np.array(crop), "num_samples": np.full(len(full), num)}
    return Run("a", evaluations=Curves(np.arange(float(len(full))), columns))


def test_a_headline_tells_a_change_from_noise():
    noise = np.random.default_rng(4).normal(1.0, 0.1, 200)
    assert re.match(
        r"200 steps: no clear change of the loss, (0\.9|1\.0).* \u00b1 0\.0\d+ at first", headline(losses(noise))
    )
    spikes = noise.copy()
    spikes[[0, -1]] = 3.0, 0.1  # what two single steps say
    assert "no clear change" in headline(losses(spikes))
    assert "the loss rose from" in headline(losses(noise + np.linspace(0, 0.5, 200)))
    assert headline(losses(noise[:4])).startswith("4 steps, too few to tell a change of the loss: ")
    ups_and_downs = [0.5, 0.6, 0.58, 0.62, 0.55, 0.64, 0.6, 0.61]
    assert headline(measured(ups_and_downs, [0.75] * 8, 64)).startswith(
        "No clear change of the regional-to-global gap: 25.0"
    )
    assert "narrowed from 25.0 \u00b1 1.4 to 14.5 \u00b1 1.3 points" in headline(
        measured(ups_and_downs, [0.75] * 8, 9000)
    )
    unknown = headline(measured(ups_and_downs, [0.75] * 8, 0))
    assert "narrowed from 25.0 to 14.5 points: 42% of it is closed" in unknown


def test_noise_is_rarely_called_a_change():
    generator = np.random.default_rng(0)
    for num_steps in (6, 10, 60, 400):
        pairs = [ends(generator.normal(size=num_steps)) for _ in range(2000)]
        assert np.mean([not (last - first).is_noise for first, last in pairs]) < 0.06
    shares = generator.binomial(50, 0.9, (2000, 2)) / 50
    assert np.mean([not (accuracy(a, 50) - accuracy(b, 50)).is_noise for a, b in shares]) < 0.06


def test_without_a_summary_the_headline_is_the_gap_while_training_or_what_the_run_did(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    _, page = page_of(tmp_path / "a.html", run)
    assert "narrowed from 45.0 to 17.2 points" in page.text and "at step 0 and at step 250" in page.text
    run.evaluations = Run("").evaluations
    _, page = page_of(tmp_path / "b.html", run)
    assert re.search(r"300 steps: the loss fell from 0\.208 \u00b1 0\.011 to 0\.0725 \u00b1 0\.0037\.", page.text)
    assert "300 of 300" in page.text and "means over the first and the last tenth of the steps" in page.text
    assert "finished: all steps are done" in page.text
    run.status = {"reason": "running", "step": 20, "max_steps": 900, "finished": False}
    _, page = page_of(tmp_path / "c.html", run)
    assert "300 of 900" in page.text and "still running, or ended without a word" in page.text
    _, page = page_of(tmp_path / "d.html", Run("nothing"))
    assert "No training step on record." in page.text
