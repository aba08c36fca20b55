"""Preparation in processes: the same bytes whatever the number of workers, and after a kill at any moment."""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from nemo_vopd.config import CropConfig, PixelConfig
from nemo_vopd.errors import OptionError, RunError
from nemo_vopd.tools.prepare import folders, shards
from nemo_vopd.tools.prepare.folders import partial_path
from nemo_vopd.tools.prepare.prepare import prepare
from tests.distributed import HANG, ROOT

NUM_RECORDS, SHARD_SIZE = 60, 5
CROP = {**vars(CropConfig()), "min_pixels": PixelConfig().min_pixels}
"""What the recipe judges crops by."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Records of half a megapixel, every tenth unusable."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    lines = []
    for index in range(NUM_RECORDS):
        small = rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(small).resize((800, 600)).save(folder / f"{index}.jpg", quality=90)
        box = [5, 5, 5, 9] if index % 10 == 9 else [index, 20, index + 60, 90]
        record = {"id": f"p{index}", "image": f"{index}.jpg", "question": f"what is {index}?", "bbox": box}
        lines.append(json.dumps(record))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out"
    result = prepare(
        source, output, shard_size=SHARD_SIZE, workers=1, progress=False, validation_fraction=0.3, crop=CROP
    )
    assert result == {"kept": 54, "dropped": {"empty_box": 6}}
    return output


def begin(source, output, *overrides):
    command = [sys.executable, str(ROOT / "recipes" / "prepare_data.py"), f"source={source}", f"output={output}"]
    command += [f"shard_size={SHARD_SIZE}", "workers=2", "validation_fraction=0.3", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # a shell's background job ignores SIGINT, and its children would, too
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, preexec_fn=listen, **pipes)


def interrupt(source, output, count, number):
    """Send signal `number` to a preparation once `count` chunks are done; what it wrote to standard error.

    On a busy machine it may get to its end before the signal: then the same is tried again.
    """
    notes = partial_path(output) / "notes" / "all"
    for _ in range(50):
        process = begin(source, output)
        workers = []
        while process.poll() is None and len(list(notes.glob("*.json"))) < count:
            with contextlib.suppress(psutil.NoSuchProcess):
                workers = psutil.Process(process.pid).children()
            time.sleep(0.002)
        process.send_signal(number)
        _, err = process.communicate(timeout=HANG)
        assert not psutil.wait_procs(workers, timeout=HANG)[1], "a worker outlives its parent"
        if process.returncode != 0:
            assert not output.exists() and partial_path(output).is_dir(), err
            return process.returncode, err
        shutil.rmtree(output)
    pytest.fail("it was always faster than the signal")


def without_crop(files):
    """The recipe knows a crop policy, `prepare` alone does not."""
    return {name: data for name, data in files.items() if not name.endswith(("data_card.json", "data_card.html"))}


def test_killed_at_any_moment_it_continues_to_the_same_bytes(source, whole, tmp_path):
    untouched, output = tmp_path / "untouched", tmp_path / "out"
    assert begin(source, untouched).wait(HANG) == 0
    assert without_crop(tree(untouched)) == without_crop(tree(whole))
    for count in (2, NUM_RECORDS // SHARD_SIZE):  # in the middle, and while the index is made
        interrupt(source, output, count, signal.SIGKILL)
    last = begin(source, output)
    out, err = last.communicate(timeout=HANG)
    assert last.returncode == 0 and "continues what was interrupted: 60 of 60" in out, (out, err)
    assert tree(output) == tree(untouched)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "untouched"]


def test_interrupted_it_says_how_to_continue(source, whole, tmp_path):
    output = tmp_path / "out"
    returncode, err = interrupt(source, output, 2, signal.SIGINT)
    assert returncode == 1 and "Traceback" not in err
    assert err.strip().splitlines()[-1] == "interrupted; give the same command again to continue"
    # with other options: refused, and what is done stays
    with pytest.raises(OptionError, match="shard_size=6: the unfinished preparation .* was begun with 5"):
        prepare(source, output, shard_size=6, validation_fraction=0.3, progress=False, crop=CROP)
    notes = len(list((partial_path(output) / "notes" / "all").iterdir()))
    assert notes >= 2
    prepare(source, output, shard_size=SHARD_SIZE, validation_fraction=0.3, workers=3, progress=False, crop=CROP)
    assert without_crop(tree(output)) == without_crop(tree(whole))


def test_begun_anew_only_when_asked(source, whole, tmp_path, capsys):
    output, copy = tmp_path / "out", tmp_path / "in"
    shutil.copytree(source.parent, copy)
    interrupt(copy / "data.jsonl", output, 1, signal.SIGKILL)
    with open(copy / "data.jsonl", "a") as lines:
        lines.write("\n" + json.dumps({"image": "0.jpg", "question": "q", "bbox": [1, 2, 30, 40]}))
    options = {"shard_size": SHARD_SIZE, "validation_fraction": 0.3, "progress": False, "crop": CROP}
    with pytest.raises(OptionError, match="^source=.* has changed since"):
        prepare(copy / "data.jsonl", output, **options)
    assert prepare(copy / "data.jsonl", output, overwrite=True, **options)["kept"] == 55
    assert "begins anew" in capsys.readouterr().out


def test_a_shard_cut_off_is_written_again(source, whole, tmp_path):
    output = tmp_path / "out"
    interrupt(source, output, 4, signal.SIGKILL)
    shard = sorted((partial_path(output) / "result" / "train").glob("*.tar"))[0]
    os.truncate(shard, shard.stat().st_size // 2)
    prepare(source, output, shard_size=SHARD_SIZE, validation_fraction=0.3, workers=2, progress=False, crop=CROP)
    assert without_crop(tree(output)) == without_crop(tree(whole))


def test_a_full_disk_ends_with_one_line_and_keeps_the_work(source, tmp_path):
    """The limit on file sizes stands in for the disk."""
    process = begin(source, tmp_path / "out", "shard_size=20")
    resource = psutil.Process(process.pid)
    resource.rlimit(psutil.RLIMIT_FSIZE, (300_000, psutil.RLIM_INFINITY))
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 1 and "cannot be written" in err and "Traceback" not in err, err
    assert not (tmp_path / "out").exists() and partial_path(tmp_path / "out").is_dir()


def test_a_worker_that_dies_is_told(source, tmp_path):
    process = begin(source, tmp_path / "out", "shard_size=20")
    parent = psutil.Process(process.pid)
    while not (workers := [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]):
        time.sleep(0.005)
    workers[0].kill()
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 1 and "a process that writes shards ended" in err, err
    assert not (tmp_path / "out").exists()


def behave(job, _threads, advance):
    """In place of `write_chunk`: what the job says."""
    advance(1)
    if job == "refuses":
        raise OptionError("source", "f", "cannot be read", "copy it")
    if job == "finds no room":
        raise OSError(28, "No space left on device")
    if job.startswith("dies"):
        time.sleep(2 if job == "dies late" else 0)
        os._exit(7)
    time.sleep(HANG)


@pytest.mark.parametrize(
    ("jobs", "expected"),
    [
        (("waits", "refuses"), (OptionError, "source=f: cannot be read; copy it")),
        (("waits", "finds no room", "waits"), (OSError, "No space left")),
        (("waits", "dies"), (RunError, "a process that writes shards ended")),
        (("waits", "dies late"), (RunError, "a process that writes shards ended")),
    ],
)
def test_the_first_failure_is_told(jobs, expected):
    """Not that of the others, which end because of it, at once."""
    (kind, words), told, start = expected, [], time.monotonic()
    with pytest.raises(kind, match=words):
        shards.write_chunks([*jobs, "waits"], 3, told.append, write=behave)
    assert 0 < sum(told) <= len(jobs) + 1 and time.monotonic() - start < HANG


def test_a_place_where_no_folder_can_be_made(source, monkeypatch):
    """/proc says that a new folder is not found, while its parent is there."""
    monkeypatch.setattr(folders, "_TRIES", 3)
    for output in ("/proc/zz", "/proc/zz/deep"):
        with pytest.raises(OptionError, match=f"output={output}: cannot be written"):
            prepare(source, Path(output), progress=False)
