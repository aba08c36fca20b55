"""One run at a time in a folder, whoever holds the lock and however it ended."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time

import psutil
import pytest

from nemo_vopd.errors import OptionError
from nemo_vopd.training import run_lock
from nemo_vopd.training.run_lock import RunLock
from tests.distributed import HANG, run_distributed, start_distributed
from tests.helpers import read_lines
from tests.training.test_faults import configure, run


def hold(folder, taken, end):
    lock = RunLock(folder)
    try:
        lock.acquire()
    except OptionError as error:
        taken.put(str(error))
        return
    taken.put("taken")
    end.wait(HANG)
    if end.is_set():
        lock.release()


def holder(folder):
    """A process that holds the lock of `folder`, what it says, and the event that lets it go."""
    context = multiprocessing.get_context("spawn")
    taken, end = context.Queue(), context.Event()
    process = context.Process(target=hold, args=(folder, taken, end))
    process.start()
    return process, taken.get(timeout=HANG), end


def test_a_living_holder_keeps_it_and_a_dead_one_does_not(tmp_path):
    process, said, end = holder(tmp_path)
    assert said == "taken"
    with pytest.raises(OptionError, match=rf"is in use by another run \(process {process.pid} on \S+\); wait for"):
        RunLock(tmp_path).acquire()
    psutil.Process(process.pid).suspend()  # it may wake up and go on writing
    with pytest.raises(OptionError, match="is in use by another run"):
        RunLock(tmp_path).acquire()
    process.kill()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    mine = RunLock(tmp_path)  # at once, also while nobody has collected the dead process
    mine.acquire()
    process.join(HANG)
    mine.release()
    assert not list(tmp_path.iterdir())


def test_a_lock_given_back_is_free(tmp_path):
    process, said, end = holder(tmp_path)
    end.set()
    process.join(HANG)
    assert said == "taken" and not list(tmp_path.iterdir())
    # a lock that somebody else has taken meanwhile is not given back
    mine = RunLock(tmp_path)
    mine.acquire()
    (tmp_path / "run.lock").write_text(json.dumps({"token": "another"}))
    mine.release()
    assert (tmp_path / "run.lock").exists()


def elsewhere(folder, **changes):
    """A lock of another machine."""
    lock = {**run_lock._process(), "boot": "another", "host": "node7", "job": "12", "token": "t", **changes}
    (folder / "run.lock").write_text(json.dumps(lock))
    return folder / "run.lock"


def test_a_holder_on_another_machine_is_alive_while_it_shows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "DEAD_SECONDS", 1.0)
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.2)
    file, over = elsewhere(tmp_path), threading.Event()

    def beat():
        while not over.wait(0.1):
            os.utime(file)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(OptionError, match=r"is in use by another run \(process \d+ on node7, job 12\)"):
            RunLock(tmp_path).acquire()
    finally:
        over.set()
        thread.join()
    start = time.monotonic()
    mine = RunLock(tmp_path)
    mine.acquire()  # silent for long enough
    assert 1 <= time.monotonic() - start
    # and it shows that it is alive itself
    first = file.stat().st_mtime_ns
    deadline = time.monotonic() + HANG
    while file.stat().st_mtime_ns == first:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    mine.release()


@pytest.mark.parametrize("content", ["", "[1]", "{", "7", '{"pid": "x", "started": null}'])
def test_what_is_no_lock_is_taken_over(content, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "DEAD_SECONDS", 0.1)
    (tmp_path / "run.lock").write_text(content)
    RunLock(tmp_path).acquire()


def test_only_one_of_many_takes_a_dead_lock(tmp_path):
    for _ in range(5):
        (tmp_path / "run.lock").write_text(json.dumps({**run_lock._process(), "pid": 2**22 + 1, "token": "dead"}))
        taken = []

        def take(taken=taken):
            lock = RunLock(tmp_path)
            try:
                lock.acquire()
                taken.append(lock)
            except OptionError:
                pass

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG)
        assert len(taken) == 1
        taken[0].release()


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(assets, tmp_path):
    config = configure(assets, tmp_path, "trainer.max_steps=100000")
    (first,) = start_distributed(run, 1, config)
    try:
        deadline = time.monotonic() + HANG
        while not (tmp_path / "checkpoints" / "last").exists():
            assert first.is_alive() and time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(RuntimeError, match=rf"exp_manager.exp_dir=\S+: is in use.*process {first.pid} on"):
            run_distributed(run, 1, config)
        steps = len(read_lines(tmp_path / "metrics.jsonl"))
        while len(read_lines(tmp_path / "metrics.jsonl")) < steps + 2:
            assert first.is_alive() and time.monotonic() < deadline
            time.sleep(0.05)
        assert read_lines(tmp_path / "status.json")[0]["reason"] == "running"
    finally:
        first.kill()
        first.join(HANG)
    steps = read_lines(tmp_path / "status.json")[0]["step"]
    assert run_distributed(run, 1, configure(assets, tmp_path, f"trainer.max_steps={steps + 2}")) == [steps + 2]
    assert not (tmp_path / "run.lock").exists()
