"""Answers that survive an interruption, judges, servers with faults, comparisons, and the numbers themselves."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nemo_vopd.config import DataConfig
from nemo_vopd.data.dataset import iterate_records
from nemo_vopd.data.encoder import parse_meta
from nemo_vopd.data.processor import Processor
from nemo_vopd.errors import OptionError, RunError
from nemo_vopd.images import UnusableSample
from nemo_vopd.tools.evaluation import evaluate as module
from nemo_vopd.tools.evaluation.asking import Answer, AnswersFile, read_answers
from nemo_vopd.tools.evaluation.chat_server import read_verdict
from nemo_vopd.tools.evaluation.evaluate import evaluate, weights_fingerprint
from nemo_vopd.tools.evaluation.evaluate_options import check
from nemo_vopd.tools.evaluation.questions import Question, classify, option_letter, parse_options
from nemo_vopd.tools.evaluation.results import by_evidence_size, compare, grade_all, interval, summarise, wilson
from nemo_vopd.tools.prepare.prepare import prepare
from tests.distributed import HANG, ROOT, run_distributed, run_recipe
from tests.helpers import read_lines
from tests.test_recipes import PYTHON
from tests.tools.evaluation.published import NUM, PUBLISHED, RIGHT, Server, png, reply, which
from tests.tools.evaluation.test_benchmarks import configured, served


@pytest.fixture
def vstar(tmp_path):
    PUBLISHED["vstar"]["parquet"](tmp_path / "vstar")
    return tmp_path / "vstar"


def replying(name="vstar"):
    return Server(lambda text, image: reply(name, *which(image))).running()


def test_an_interrupted_evaluation_goes_on(vstar, tmp_path):
    with replying() as server:
        options = ["benchmark=vstar", f"data.path={vstar}", f"output={tmp_path}/whole/out.json", "batch_size=2"]
        whole = evaluate(served(server.url, *options))
        answers = tmp_path / "whole" / "out.vstar.answers.jsonl"
        assert len(read_lines(answers)) == 1 + NUM and len(server.requests) == NUM
        # killed in the middle of its fourth line
        lines = answers.read_text().splitlines(keepends=True)
        answers.write_text("".join(lines[:4]) + lines[4][:30])
        again = evaluate(served(server.url, *options))
        assert again == whole and len(server.requests) == NUM + 3
        assert sorted(map(str, read_lines(answers))) == sorted(map(str, map(json.loads, lines)))
        assert json.loads((tmp_path / "whole" / "out.json").read_text()) == json.loads(json.dumps(whole))
        fewer = evaluate(served(server.url, *options, "limit=2"))["results"]["vstar"]
        assert fewer["num_samples"] == 2 and fewer["accuracy"] == 1 and len(server.requests) == NUM + 3
        for changed, words in (
            ("rollout.max_response_length=9", "holds answers with max_response_length=128, asked for is 9"),
            ("server.model=other", "holds answers with model=m at"),
        ):
            with pytest.raises(OptionError, match=words):
                evaluate(served(server.url, *options, changed))
        answers.write_text("nonsense\n")
        with pytest.raises(OptionError, match="is no answers file"):
            evaluate(served(server.url, *options))


def test_a_killed_command_goes_on(vstar, tmp_path):
    """SIGKILL while a slow server answers; the same command asks only what is missing."""

    def slow(text, image):
        time.sleep(0.6 if server.slow else 0)
        return reply("vstar", *which(image))

    with Server(slow).running() as server:
        server.slow = True
        command = ["recipes/evaluate.py", "engine=server", f"server.url={server.url}", "server.model=m", "batch_size=1"]
        command += ["benchmark=vstar", f"data.path={vstar}", f"output={tmp_path}/out.json"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([*PYTHON, *command], cwd=ROOT, env=environment, **pipes)
        answers, deadline = tmp_path / "out.vstar.answers.jsonl", time.monotonic() + HANG
        while not answers.exists() or len(answers.read_text().splitlines()) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait(HANG)
        kept, server.slow = len(read_lines(answers)) - 1, False
        asked = len(server.requests)
        done = run_recipe(*command)
        assert done.returncode == 0, done.stderr[-2000:]
        assert 2 <= kept < NUM and len(server.requests) - asked == NUM - kept
        assert json.loads((tmp_path / "out.json").read_text())["results"]["vstar"]["accuracy"] == pytest.approx(4 / 6)
        assert f"{kept} answers were there already" in done.stdout and "66.7%" in done.stdout


def test_faults_of_a_server(vstar, tmp_path, monkeypatch):
    options = ["benchmark=vstar", f"data.path={vstar}", "server.api_key_variable=THE_KEY", "server.retries=2"]
    monkeypatch.setenv("THE_KEY", "secret")
    with replying() as server:
        server.failures = 2
        body = "server.extra_body={chat_template_kwargs:{enable_thinking:false}}"
        assert evaluate(served(server.url, *options, body))["results"]["vstar"]["accuracy"] == pytest.approx(4 / 6)
        assert len(server.requests) == NUM + 2
        assert all(key == "Bearer secret" for _, key in server.requests)
        assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body, _ in server.requests)
        with pytest.raises(RunError, match="server.url=.* refuses a request .HTTP 404.*no such model"):
            evaluate(served(server.url, *options, "server.model=unknown"))
    with pytest.raises(RunError, match="server.url=.* does not answer"):
        evaluate(served(server.url, *options, "server.retries=0"))
    with pytest.raises(OptionError, match="server.url=None: is needed"):
        evaluate(configured("engine=server", "model.hf_path=m", "benchmark=vstar", f"data.path={vstar}"))


@pytest.mark.parametrize(
    "raw,words",
    [
        ((200, b"<html>"), "sent what is no chat completion"),
        ((200, [1]), "sent what is no chat completion"),
        ((200, {"choices": []}), "sent what is no chat completion"),
        ((200, {"choices": [{"message": {"role": "assistant", "content": [1]}}]}), "is no text"),
        ((401, {"error": {"message": "who?"}}), "refuses a request .HTTP 401.*the key is read from OPENAI_API_KEY"),
        ((500, b"oops"), "does not answer .HTTP 500.*the same command goes on"),
    ],
)
def test_servers_that_speak_otherwise(raw, words, vstar):
    with replying() as server:
        server.raw = raw
        retries = 0 if raw[0] == 500 else 9  # the others are told at once
        with pytest.raises(RunError, match=words):
            evaluate(served(server.url, "benchmark=vstar", f"data.path={vstar}", f"server.retries={retries}"))
        assert len(server.requests) <= NUM


def test_what_one_request_loses_does_not_lose_the_others(vstar, tmp_path, capsys):
    """A question that the server refuses is left out; after a fault everything answered before it is kept."""

    def answer(text, image):
        index, view = which(image)
        return answers.get(index, reply("vstar", index, view))

    options = ["benchmark=vstar", f"data.path={vstar}", f"output={tmp_path}/out.json", "server.retries=0"]
    options.append("server.max_concurrent_requests=1")
    with Server(answer).running() as server:
        answers = {4: 500}
        with pytest.raises(RunError, match="HTTP 500"):
            evaluate(served(server.url, *options))
        _, kept = read_answers(tmp_path / "out.vstar.answers.jsonl", "output")
        assert len(kept) == 4
        # line ends of Unicode, half a surrogate pair and an empty reply can be kept and read again
        answers, asked = {4: 400, 5: "B\u2028\x85\ud800"}, len(server.requests)
        result = evaluate(served(server.url, *options))["results"]["vstar"]
        assert len(server.requests) == asked + 2
        assert result["num_samples"] == NUM - 1 and result["num_unusable"] == 1
        assert "view: refused (HTTP 400: " in capsys.readouterr().out
        answers = {4: ""}
        result = evaluate(served(server.url, *options))["results"]["vstar"]
        assert result["num_samples"] == NUM and result["full"]["num_empty"] == 1
        assert "empty replies among them" in capsys.readouterr().out
    with Server(lambda text, image: 400).running() as server:
        with pytest.raises((RunError, OptionError), match="HTTP 400"):
            evaluate(served(server.url, "benchmark=vstar", f"data.path={vstar}", "server.retries=0"))


def test_places_that_cannot_be_written(vstar, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "out.verdicts.jsonl").write_text("{}\n")
    options = ["benchmark=vstar", f"data.path={vstar}"]
    with replying() as server:
        for more, words in (
            ([f"output={tmp_path}/file/out.json"], "output=.*cannot be written"),
            ([f"output={tmp_path}/out.json", f"judge.url={server.url}", "judge.model=j"], "is no file of verdicts"),
            ([f"output={tmp_path}/new.json", f"baseline={tmp_path}/typo.json"], "baseline=.*typo.*has no answers"),
            (["views=[crop]"], "has neither a box nor a crop.*set views=.full"),
        ):
            with pytest.raises(OptionError, match=words):
                evaluate(served(server.url, *options, *more))
        assert len(server.requests) == 0
    with pytest.raises(OptionError, match="output=.*is a folder"):
        check(configured("model.hf_path=m", *options, f"output={tmp_path}"))


def test_a_judge_decides_what_rules_leave_open(tmp_path):
    PUBLISHED["visualprobe"]["json"](tmp_path / "probe")
    verdicts = {0: "Yes.", 1: "<think>no, well</think>Yes", 2: "No", 3: "Perhaps", 4: "no"}

    def answer(text, image):
        if image is not None:
            index, _ = which(image)
            # same words, other words (five kinds)
            return f"Exit {index}" if index == 5 else f"The sign with number {index} leads out"
        assert "Reference answer: Exit" in text and text.startswith("A question about an image")
        return verdicts[int(text.split("with number ")[1][0])]

    options = ["benchmark=visualprobe", f"data.path={tmp_path}/probe", f"output={tmp_path}/out.json"]
    with Server(answer).running() as server:
        alone = evaluate(served(server.url, *options))["results"]["visualprobe"]
        assert alone["full"]["num_undecided"] == 5 and alone["categories"]["Hard"]["full"] == 0.5
        asked = len(server.requests)
        judged = [*options, f"judge.url={server.url}", "judge.model=j"]
        result = evaluate(served(server.url, *judged))["results"]["visualprobe"]
        assert len(server.requests) == asked + 5
        assert result["full"]["num_undecided"] == 1 and result["categories"]["Easy"]["full"] == 0.5
        assert result["categories"]["Hard"]["full"] == 0.5 and result["accuracy"] == 0.5
        # verdicts are kept, but the one that was none
        assert evaluate(served(server.url, *judged))["results"]["visualprobe"] == result
        assert len(server.requests) == asked + 6 and len(read_lines(tmp_path / "out.verdicts.jsonl")) == 4


def test_what_changed_is_asked_again_and_new_keys_count(vstar, tmp_path):
    """Another image or prompt under the same id is another question; a corrected key needs no new reply."""
    table = pq.read_table(vstar / "data" / "test-00000-of-00001.parquet").to_pydict()
    with replying() as server:
        options = ["benchmark=vstar", f"data.path={vstar}", f"output={tmp_path}/out.json"]
        evaluate(served(server.url, *options))
        table["image"][1] = {"bytes": png(1, "crop"), "path": None}
        table["text"][2] = "Another question\n" + table["text"][2]
        table["label"][3] = "D"  # what was said
        pq.write_table(pa.table(table), vstar / "data" / "test-00000-of-00001.parquet")
        again = evaluate(served(server.url, *options))["results"]["vstar"]
        assert len(server.requests) == NUM + 2 and again["accuracy"] == pytest.approx(5 / 6)


def test_weights_are_told_apart(assets, tmp_path):
    shutil.copytree(assets / "tiny-vlm", tmp_path / "a")
    shutil.copytree(assets / "tiny-vlm", tmp_path / "b")
    weights = load_file(tmp_path / "b" / "model.safetensors")
    save_file({name: weight * 1.001 for name, weight in weights.items()}, tmp_path / "b" / "model.safetensors")
    names = [weights_fingerprint(folder) for folder in (assets / "tiny-vlm", tmp_path / "a", tmp_path / "b")]
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize(
    "reply,right",
    [("Yes", True), ("**No**", False), ("<think>yes or no?</think> Yes, it is.", True), ("maybe", None), ("", None),
     ("Yes and no", None), ("Noted", None), ("The reply is right: yes", True)],
)  # fmt: skip
def test_verdicts(reply, right):
    assert read_verdict(reply) is right


def test_two_models_are_compared_question_by_question(tmp_path, vstar):
    better = Server(lambda text, image: reply("vstar", which(image)[0], "crop")).running()
    with replying() as server, better as strong:
        options = ["benchmark=vstar", f"data.path={vstar}", "server.model=same"]
        evaluate(served(server.url, *options, f"output={tmp_path}/base.json"))
        config = served(strong.url, *options, f"output={tmp_path}/new.json", f"baseline={tmp_path}/base.json")
        found = evaluate(config)["comparison"]["vstar"]
        assert found["difference"] == pytest.approx(2 / 6) and found["num_samples"] == NUM
        assert 0 <= found["interval"][0] < 2 / 6 < found["interval"][1] <= 1
        with pytest.raises(OptionError, match="baseline=.*has no answers to vstar beside it .none.vstar.answers"):
            evaluate(served(strong.url, *options, f"output={tmp_path}/new.json", f"baseline={tmp_path}/none.json"))


def made_up(rng, num, accuracy, category=""):
    replies = ["A" if right else "B" for right in rng.random(num) < accuracy]
    options = {"A": "", "B": ""}
    return [Answer(str(i), "full", r, "A", "option", options, category=category) for i, r in enumerate(replies)]


def test_the_paired_interval_covers_the_truth_and_pairing_narrows_it():
    """Over 60 made-up comparisons with a true difference of 10 points the 95% interval misses it a few times."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        base = made_up(rng, 300, 0.6)
        # the better model repairs a quarter of the wrong answers and spoils nothing: +10 points on average
        ours = [a if a.reply == "A" or rng.random() > 0.25 else Answer(**{**vars(a), "reply": "A"}) for a in base]
        found = compare(ours, grade_all(ours), base, grade_all(base), seed=trial)
        low, high = found["interval"]
        covered += low <= 0.1 <= high
    assert 52 <= covered <= 60
    alone = interval(ours, [float(a.reply == "A") for a in ours], False, 0)
    assert high - low < 0.8 * (alone[1] - alone[0])


def test_questions_about_one_image_are_drawn_together():
    rng = np.random.default_rng(1)
    single = made_up(rng, 100, 0.5)
    four = [Answer(**{**vars(a), "id": f"{a.id}/{k}", "cluster": a.id}) for a in single for k in range(4)]
    alone, together = (interval(part, [float(a.reply == "A") for a in part], False, 0) for part in (single, four))
    assert together == pytest.approx(alone)
    free = interval(
        [Answer(**{**vars(a), "cluster": ""}) for a in four], [float(a.reply == "A") for a in four], False, 0
    )
    assert free[1] - free[0] < 0.6 * (together[1] - together[0])


def test_the_share_of_the_gap_that_is_closed():
    options = {"A": "", "B": ""}

    def answers(full, crop):
        views = (("full", full), ("crop", crop))
        return [Answer(str(i), v, r, "A", "option", options) for v, replies in views for i, r in enumerate(replies)]

    base, ours = answers("AABBBBBBBB", "AAAAAAAAAB"), answers("AAAAAABBBB", "AAAAAAAABB")
    found = compare(ours, grade_all(ours), base, grade_all(base))
    assert found["difference"] == pytest.approx(0.4) and found["gap_closed"] == pytest.approx(0.4 / 0.7)
    full = [answer for answer in base if answer.view == "full"]
    assert "gap_closed" not in compare(ours, grade_all(ours), full, grade_all(full))


def test_an_interval_holds_its_accuracy():
    """A model that always says A: equal accuracy in every cluster, so every draw is the same."""
    answers = [
        Answer(f"{i}/{k}", "full", "A", "AB"[k % 2], "option", {"A": "", "B": ""}, cluster=str(i))
        for i in range(10)
        for k in range(4)
    ]
    result = summarise(answers, grade_all(answers))["full"]
    assert result["accuracy"] == 0.5 and result["interval"] == [0.5, 0.5]


def test_only_the_same_questions_are_compared():
    options = {"A": "", "B": ""}
    ours = [Answer("1", "full", "A", "A", "option", options, question="a?", cluster="x")]
    for other in ({"question": "b?"}, {"cluster": "y"}):
        theirs = [Answer(**{**vars(ours[0]), **other})]
        assert compare(ours, grade_all(ours), theirs, grade_all(theirs)) is None
    assert compare(ours, grade_all(ours), ours, grade_all(ours))["difference"] == 0


def test_wilson_interval():
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20
    for right, num, expected in ((81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611))):
        assert wilson(right, num) == pytest.approx(expected, abs=1e-4)


def test_the_gap_by_size_of_the_evidence():
    rng = np.random.default_rng(2)
    sizes = rng.permutation(np.logspace(-4, -1, 50))
    full, crop = [], []
    for i, size in enumerate(sizes):
        # evidence below a hundredth is seen in crops only
        full.append(
            Answer(str(i), "full", "A" if size > 1e-2 else "B", "A", "option", {"A": "", "B": ""}, evidence=size)
        )
        crop.append(Answer(str(i), "crop", "A", "A", "option", {"A": "", "B": ""}, evidence=size))
    grades = grade_all([*full, *crop])
    bins = by_evidence_size(full, crop, grades)
    assert [b["num_samples"] for b in bins] == [10] * 5
    assert all(a["high"] < b["low"] for a, b in zip(bins, bins[1:], strict=False))
    assert [b["full"] for b in bins] == [0, 0, 0, pytest.approx(0.7, abs=0.4), 1] and all(b["crop"] == 1 for b in bins)
    assert bins[0]["full_interval"] == pytest.approx(list(wilson(0, 10)))
    result = summarise([*full, *crop], grades)
    assert result["by_evidence_size"] == bins
    assert result["gap"] == pytest.approx(1 - result["full"]["accuracy"]) and result["num_both_views"] == 50
    assert result["crop"]["interval"] == pytest.approx(list(wilson(50, 50)))
    # no size, no groups; a few samples, no groups
    assert by_evidence_size([Answer(**{**vars(a), "evidence": None}) for a in full], crop, grades) == []
    assert by_evidence_size(full[:5], crop, grades) == []
    # equal sizes stay together, and one size alone is no group
    same, two = (
        [Answer(**{**vars(a), "evidence": f(i)}) for i, a in enumerate(full)]
        for f in (lambda i: 0.1, lambda i: 0.1 + i % 2)
    )
    assert by_evidence_size(same, crop, grades) == []
    assert [(b["low"], b["num_samples"]) for b in by_evidence_size(two, crop, grades)] == [(0.1, 25), (1.1, 25)]


def test_a_question_with_one_view_does_not_enter_the_gap():
    full = [Answer(str(i), "full", "A", "A", "option", {"A": "", "B": ""}) for i in range(4)]
    crop = [Answer("0", "crop", "B", "A", "option", {"A": "", "B": ""})]
    result = summarise([*full, *crop], grade_all([*full, *crop]))
    assert result["gap"] == -1 and result["num_both_views"] == 1 and result["full"]["accuracy"] == 1


def test_a_small_category_that_is_not_drawn_leaves_a_finite_interval():
    answers = made_up(np.random.default_rng(3), 2, 0.5, "small") + made_up(np.random.default_rng(4), 40, 0.5, "large")
    answers = [Answer(**{**vars(a), "id": f"{a.category}{a.id}"}) for a in answers]
    low, high = interval(answers, [float(a.reply == "A") for a in answers], True, 0)
    assert math.isfinite(low) and low < high


@pytest.fixture(scope="module")
def boxed(tmp_path_factory):
    """An Energon data set of six questions: boxes of growing size, a given crop, an unreadable record."""
    folder = tmp_path_factory.mktemp("boxed")
    records = []
    for i in range(NUM):
        (folder / f"{i}.png").write_bytes(png(i))
        record = {"id": f"r{i}", "image": f"{i}.png", "question": "Which?\n(A) red\n(B) blue", "answer": "(B)"}
        records.append({**record, "bbox": [0, 0, 4 * (i + 1), 14]})
    (folder / "crop.png").write_bytes(png(0, "crop"))
    records[0]["crop_image"] = "crop.png"
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    prepare(folder / "data.jsonl", folder / "data", workers=1, progress=False)
    return folder / "data"


def test_a_data_set_with_boxes_through_a_server(boxed):
    shown = []

    def answer(text, image):
        shown.append(image.size)
        index, view = which(image)
        return "blue" if RIGHT[index] or image.size != (84, 56) else "A"

    with Server(answer).running() as server:
        output = evaluate(served(server.url, f"data.path={boxed}", "data.crop.min_side=8"))
    assert output["num_samples"] == NUM and output["full_accuracy"] == pytest.approx(4 / 6)
    assert output["crop_accuracy"] == 1 and output["gap"] == pytest.approx(2 / 6)
    # full images, the given crop, and crops cut by data.crop: twice the longer side of the box
    assert shown.count((84, 56)) == NUM and (28, 28) in shown and (48, 48) in shown


def test_images_reach_a_server_as_they_are_stored_or_as_png():
    photo, turned, grey = io.BytesIO(), io.BytesIO(), io.BytesIO()
    image = Image.new("RGB", (40, 20), (200, 30, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter; boxes mean the stored pixels
    image.save(photo, "JPEG")
    image.save(turned, "JPEG", exif=exif)
    image.convert("L").save(grey, "PNG")
    data = DataConfig()

    def question(full, **fields):
        return Question("q", "?", "a", "text", full.getvalue(), **fields)

    assert question(photo).file("full", data) == ("image/jpeg", photo.getvalue())
    for stored, size in ((turned, (20, 40)), (grey, (40, 20))):
        media, file = question(stored).file("full", data)
        with Image.open(io.BytesIO(file)) as shown:
            assert media == "image/png" and shown.size == size and shown.mode == "RGB"
    boxed = question(photo, bbox=[0, 0, 10, 10])
    assert boxed.file("crop", data)[0] == "image/png" and boxed.evidence_size() == pytest.approx(100 / 800)
    assert question(photo, bbox=[5, 5, 5, 5]).evidence_size() is None
    with pytest.raises(UnusableSample):
        question(io.BytesIO(photo.getvalue()[:300])).file("full", data)


def test_native_evaluation_alone_and_over_two_ranks(assets, tmp_path):
    options = [f"model.hf_path={assets}/tiny-vlm", f"data.path={assets}/tiny-digits", "precision.dtype=fp32"]
    options += ["data.full.max_pixels=12544", "data.crop_pixels.max_pixels=3136", "rollout.max_response_length=4"]
    options += ["limit=21", "batch_size=4"]
    alone = run_recipe("recipes/evaluate.py", *options, f"output={tmp_path}/alone.json")
    shared = run_recipe("recipes/evaluate.py", *options, f"output={tmp_path}/shared.json", nproc=2)
    assert alone.returncode == 0 and shared.returncode == 0, alone.stderr[-2000:] + shared.stderr[-2000:]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "shared"))
    assert one == two and one["num_samples"] == 21
    assert one["results"]["gap"]["by_evidence_size"] == []  # all boxes have one size
    replies = [
        {(a.id, a.view): a.reply for a in read_answers(tmp_path / f"{name}.gap.answers.jsonl", "output")[1]}
        for name in ("alone", "shared")
    ]
    assert replies[0] == replies[1] and len(replies[0]) == 42
    assert (
        "full_accuracy" in alone.stdout and "crop_accuracy" in alone.stdout and "gap (crop less full)" in alone.stdout
    )


def as_published(model, folder, *overrides):
    """(size of the image in pixels, length of the reply) of every question that the native engine is asked."""
    asked = []

    class Recorder:
        def __init__(self, *_):
            pass

        def __call__(self, views, ids, params):
            processor = Processor.from_pretrained(model)
            side = processor.image_processor.patch_size
            asked.extend((int(view.grid_thw.prod()) * side**2, params.max_response_length) for view in views)
            return [[(torch.tensor(processor.encode_answer("B")), torch.zeros(2))] for _ in views]

    module.Decoder = Recorder
    names = ["vstar", "visualprobe"]
    options = [f"benchmark=[{','.join(names)}]", f"data.path={folder}", "views=[full]", "precision.dtype=fp32"]
    output = evaluate(configured(f"model.hf_path={model}", *options, *overrides))
    return asked, [output["settings"][name] for name in names]


def test_published_numbers_have_their_own_sizes_and_lengths(assets, boxed, tmp_path, capsys):
    """As its authors ran each benchmark, and none of a data set that nobody has published numbers of."""
    for name, form in {"vstar": "parquet", "visualprobe": "json"}.items():
        (tmp_path / name).mkdir()
        PUBLISHED[name][form](tmp_path / name)
    # a model whose own processor allows more than training shows by default
    model = tmp_path / "model"
    shutil.copytree(f"{assets}/tiny-vlm", model)
    file = model / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"min_pixels": 31360, "max_pixels": 12845056}))
    published = run_distributed(as_published, 1, model, tmp_path, "protocol=published")[0]
    training = run_distributed(as_published, 1, model, tmp_path, "rollout.max_response_length=7")[0]
    assert {length for _, length in published[0][:NUM]} == {32768} and {n for _, n in published[0][NUM:]} == {8192}
    assert all(size >= 31360 for size, _ in published[0][:NUM])  # images of 84 by 56, enlarged
    assert all(40_000 <= size < 2_000_000 for size, _ in published[0][NUM:])
    assert set(training[0]) == {(84 * 56, 7)}
    assert [each["pixels"]["full"] for each in published[1]] == [[31360, 12845056], [40_000, 2_000_000]]

    with Server(lambda text, image: "B").running() as server:
        options = ["protocol=published", f"data.path={tmp_path}", f"output={tmp_path}/out.json"]
        evaluate(served(server.url, "benchmark=vstar", *options))
        with pytest.raises(
            OptionError, match=r"shows VisualProbe at its own size.*mm_processor_kwargs:{min_pixels:40000"
        ):
            evaluate(served(server.url, "benchmark=visualprobe", *options))
        told = "server.extra_body={mm_processor_kwargs:{min_pixels:40000,max_pixels:2000000}}"
        evaluate(served(server.url, "benchmark=visualprobe", told, *options))
        assert [body["max_tokens"] for body, _ in server.requests] == NUM * [32768] + NUM * [8192]
        with pytest.raises(OptionError, match="protocol=published: is for public benchmarks"):
            evaluate(served(server.url, "protocol=published", f"data.path={boxed}"))
        other = ["benchmark=vstar", f"data.path={tmp_path}", f"output={tmp_path}/other.json"]
        evaluate(served(server.url, *other, f"baseline={tmp_path}/out.json"))
        assert "note: max_response_length was 32768 for the baseline, and is 128 here" in capsys.readouterr().out


def test_parts_of_a_blend_may_share_ids_and_other_data_are_refused(boxed, tmp_path):
    parts = "".join(f"      - weight: 1\n        path: {part}\n" for part in (boxed, boxed))
    head = "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    blend:\n"
    (tmp_path / "blend.yaml").write_text(head + parts)
    with Server(lambda text, image: "B").running() as server:
        options = [f"output={tmp_path}/out.json", "views=[full]"]
        output = evaluate(served(server.url, f"data.path={tmp_path}/blend.yaml", *options))
        assert output["num_samples"] == 2 * NUM and output["full_accuracy"] == 1
        with pytest.raises(OptionError, match="holds answers with data="):
            evaluate(served(server.url, f"data.path={boxed}", *options))


def test_records_come_in_stored_order_and_undecoded(assets):
    records = list(iterate_records(assets / "tiny-digits", 5))
    assert len(records) == 5 and all(record.image.startswith(b"\x89PNG") for record in records)
    names = [parse_meta(record.meta)["id"] for record in records]
    assert names == [f"digits-1-{i:06d}" for i in range(5)]


@pytest.mark.parametrize(
    "text,options",
    [
        ("What?\n(A) red\n(B) dark red\nAnswer with a letter.", {"A": "red", "B": "dark red"}),
        ("What?\nOptions: A: in the bed., B: under it, C: 3", {"A": "in the bed.", "B": "under it", "C": "3"}),
        ("(a) Open (b) Closed", {"A": "Open", "B": "Closed"}),
        ("Who?\nA. Mr. A. Smith\nB. Dr. B. Jones", {"A": "Mr. A. Smith", "B": "Dr. B. Jones"}),
        ("Plan A: go. Which?\nA. x\nB. y", {"A": "x", "B": "y"}),
        ("颜色？\n（A）红色\n（B）蓝色", {"A": "红色", "B": "蓝色"}),
        ("What digit is red?", {}),
        ("Is vitamin C in it? A. Smith says so.", {}),
        ("(B) only\n(C) these", {}),
    ],
)  # fmt: skip
def test_options_in_a_question(text, options):
    assert parse_options(text) == options


def test_answers_of_ones_own_data_are_classified():
    options = "Which?\n(A) red\n(B) blue"
    assert classify(options, ["(b)"])[:2] == ("option", ["B"]) and classify(options, ["blue"])[0] == "text"
    assert classify("How many?", ["<answer>0</answer>"])[1] == ["0"]
    assert classify(options, ["\\boxed{B}"])[:2] == ("option", ["B"])
    assert classify("Is it?", ["Yes."]) == ("yes_no", ["yes"], {}) and classify("What?", ["B"]) == ("text", ["B"], {})
    assert classify(options, ["A", "(b)"])[:2] == ("option", ["A", "B"]) and classify("What?", ["", " "])[1] == []
    assert classify(options, ["A", "dark red"])[:2] == ("text", ["A", "dark red"])
    assert [option_letter(t) for t in ("B", "(b)", "C: x", "A dog", "Blue", "")] == ["B", "B", "C", None, None, None]


def test_an_answers_file_keeps_the_last_word(tmp_path):
    path = tmp_path / "deep" / "a.jsonl"
    file = AnswersFile(path, {"model": "m"})
    answer = Answer("1", "full", "über", "x", "text")
    for kept in (answer, Answer("1", "crop", "y", "x", "text")):
        file.write(kept)
    file.close()
    again = AnswersFile(path, {"model": "m"})
    assert again.answers["1", "full"] == answer and len(again.answers) == 2
    again.close()
