"""What can go wrong in the night: killed ranks, full disks, damaged checkpoints, gradients that are not finite."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_vopd.tools.prepare.tiny_model import write_tiny_model
from nemo_vopd.training import checkpoint
from nemo_vopd.training.manifest import CheckpointFolder, read_manifest
from tests.distributed import HANG, run_distributed, start_distributed
from tests.helpers import made_up_rollouts, read_lines, tiny_config, write_rollouts
from tests.training.test_resume import numbers

KILLS = 20


def run(config):
    from nemo_vopd.training.run import train

    train(config)
    torch.distributed.barrier()  # rank 0 has written it
    (status,) = read_lines(Path(config.exp_manager["exp_dir"]) / "status.json")
    return status["step"]


def configure(assets, folder: Path, *overrides: str):
    return tiny_config(assets, folder, "optimizer.lr=1e-3", "checkpoint.every_n_steps=1", *overrides)


def test_twenty_kills_at_random_moments_lose_nothing(assets, tmp_path):
    """SIGKILL one of two ranks, often while they save (every other time in the background); the other ends too."""
    folder = tmp_path / "run"
    background = [f"checkpoint.asynchronous={value}" for value in ("false", "true")]
    configs = [configure(assets, folder, "trainer.max_steps=100000", option) for option in background]
    chance, checkpoints = random.Random(7), CheckpointFolder(folder / "checkpoints", 2)
    during_save, reached, metrics = 0, 0, folder / "metrics.jsonl"
    for attempt in range(KILLS):
        before = metrics.stat().st_ino if metrics.exists() else None
        ranks = start_distributed(run, 2, configs[attempt % 2])
        deadline = time.monotonic() + HANG
        while time.monotonic() < deadline:  # until this start has written a step into a file of its own
            if metrics.exists() and metrics.stat().st_ino != before and len(metrics.read_text().splitlines()) > reached:
                break
            assert all(rank.is_alive() for rank in ranks), "ended by itself"
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.6))
        during_save += any(p.name.startswith(".partial") for p in checkpoints.path.iterdir())
        os.kill(ranks[chance.randrange(2)].pid, signal.SIGKILL)
        for rank in ranks:
            rank.join(timeout=HANG)
            survived = rank.is_alive()
            rank.kill()
            assert not survived, "a rank survived the other's death"
        manifests = [read_manifest(checkpoint) for checkpoint in checkpoints.complete()]
        step = manifests[-1]["step"] if manifests else 0
        assert step >= reached, "a complete checkpoint was lost"
        reached = step
    assert during_save >= 3, "the moments were badly chosen"
    last = configure(assets, folder, f"trainer.max_steps={reached + 1}")
    assert run_distributed(run, 2, last) == [reached + 1] * 2
    whole = configure(assets, tmp_path / "whole", f"trainer.max_steps={reached + 1}", "checkpoint.every_n_steps=0")
    run_distributed(run, 2, whole)
    assert numbers(folder) == numbers(tmp_path / "whole")
    assert not [p for p in checkpoints.path.iterdir() if p.name.startswith(".partial")], "leftovers were not removed"


def limited(config):
    """Train with files limited to 100 kB: the weights do not fit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return run(config)


def test_a_disk_that_fills_while_saving_leaves_the_last_checkpoint_intact(assets, tmp_path):
    run_distributed(run, 2, configure(assets, tmp_path, "trainer.max_steps=1"))
    with pytest.raises(RuntimeError, match=r"the checkpoint of step 2 could not be written to .*step-00000001 is comp"):
        run_distributed(limited, 2, configure(assets, tmp_path, "trainer.max_steps=3"))
    folder = CheckpointFolder(tmp_path / "checkpoints", 2)
    assert [p.name for p in folder.complete()] == ["step-00000001"]
    assert run_distributed(run, 2, configure(assets, tmp_path, "trainer.max_steps=3")) == [3, 3]


def without_room(config):
    """Train on a disk that says it is full."""

    usage = shutil.disk_usage(".")
    checkpoint.shutil.disk_usage = lambda path: usage._replace(free=1000)
    return run(config)


def test_a_full_disk_is_noticed_before_anything_is_written(assets, tmp_path):
    with pytest.raises(RuntimeError, match=r"the checkpoint of step 1 .* needed and 0.0 GiB are free; there is"):
        run_distributed(without_room, 1, configure(assets, tmp_path))
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_updates_that_are_not_finite_end_the_run_and_harm_nothing(assets, tmp_path):
    steps = made_up_rollouts(tiny_config(assets, tmp_path), 5)
    for rollouts in steps[1:]:
        rollouts[0].log_probs[0] = float("nan")
    write_rollouts(tmp_path / "r.jsonl", steps)
    options = ["rollout=replay", f"rollout.path={tmp_path}/r.jsonl", "trainer.max_steps=9"]
    options += ["trainer.max_skipped_updates=3"]
    with pytest.raises(RuntimeError, match=r"not finite in 3 updates in a row .*step-00000003, is intact"):
        run_distributed(run, 2, configure(assets, tmp_path / "run", *options))
    assert [line["num_skipped_updates"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 1, 1]


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.fixture(scope="module")
def finished(assets, tmp_path_factory) -> Path:
    """A run of two steps with its checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    run_distributed(run, 1, configure(assets, folder, "trainer.max_steps=2"))
    return folder


def cut_off(checkpoint: Path, ran: Path) -> None:
    shard = next(checkpoint.glob("*.distcp"))
    os.truncate(shard, 100)


def remove(checkpoint: Path, ran: Path) -> None:
    (checkpoint / ".metadata").unlink()


def foreign(checkpoint: Path, ran: Path) -> None:
    (checkpoint / "manifest.json").write_text('{"pytorch-lightning_version": "2.4.0"}')


def rewrite(checkpoint: Path, name: str, data: bytes) -> None:
    """Replace a file, and its size and digest in the manifest, as somebody with bad intentions would."""
    (checkpoint / name).write_bytes(data)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name], manifest["sha256"][name] = len(data), hashlib.sha256(data).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def flip(checkpoint: Path, ran: Path) -> None:
    shard = next(checkpoint.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[-40] ^= 1
    shard.write_bytes(data)


def exchange(checkpoint: Path, ran: Path) -> None:
    shard = next(checkpoint.glob("*.distcp"))
    shutil.copy(checkpoint.with_name("step-00000001") / shard.name, shard)


def lack(key: str, value: object = None):
    """Take `key` out of the manifest, or give it another value."""

    def damage(checkpoint: Path, ran: Path) -> None:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest[key] = value
        if value is None:
            del manifest[key]
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))

    return damage


def no_manifest(text: str):
    return lambda checkpoint, ran: (checkpoint / "manifest.json").write_text(text)


def evil_metadata(checkpoint: Path, ran: Path) -> None:
    rewrite(checkpoint, ".metadata", pickle.dumps(Payload(ran)))


def evil_state(checkpoint: Path, ran: Path) -> None:
    torch.save({"step": Payload(ran)}, checkpoint / "state.pt")
    rewrite(checkpoint, "state.pt", (checkpoint / "state.pt").read_bytes())


@pytest.mark.parametrize(
    "damage,message",
    [
        (cut_off, r"is damaged: \S+ has 100 bytes of \d+; take another"),
        (remove, "is damaged: .metadata is missing; take another"),
        (foreign, "is not a checkpoint of this program"),
        (evil_metadata, r"cannot be read \(_?io.open does not belong there\)"),
        (evil_state, "state.pt cannot be read"),
        (flip, r"is damaged: \S+\.distcp is not what was written; take another"),
        (exchange, r"is damaged: \S+\.distcp (is not what was written|has \d+ bytes of \d+); take another"),
        (lack("config"), "is damaged: manifest.json lacks 'config'"),
        (lack("data"), "is damaged: manifest.json lacks 'data'"),
        (lack("step", -5), "is not a checkpoint of this program .it is of step -5"),
        (lack("step", "two"), "is not a checkpoint of this program .'two' is no int"),
        (no_manifest("[1]"), "is not a checkpoint of this program"),
        (no_manifest(""), "is not a checkpoint of this program"),
    ],
)
def test_damaged_and_foreign_checkpoints_give_one_line(damage, message, finished, assets, tmp_path):
    folder, ran = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(finished, folder, symlinks=True)
    damage(folder / "checkpoints" / "step-00000002", ran)
    with pytest.raises(RuntimeError, match=rf"OptionError: checkpoint=\S+step-00000002: .*{message}"):
        run_distributed(run, 1, configure(assets, folder, "trainer.max_steps=3"))
    assert not ran.exists()
    # the remedy works: without it the run resumes from the one before
    shutil.rmtree(folder / "checkpoints" / "step-00000002")
    assert run_distributed(run, 1, configure(assets, folder, "trainer.max_steps=3")) == [3]


def test_a_checkpoint_of_version_0_1_is_resumed(finished, assets, tmp_path):
    """It holds the pickled state of Energon's loader, which is not read, in place of a number of prompts."""
    folder, ran = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(finished, folder, symlinks=True)
    checkpoint = folder / "checkpoints" / "step-00000002"
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    del state["prompts"]
    state["loader"] = torch.frombuffer(bytearray(pickle.dumps(Payload(ran))), dtype=torch.uint8)
    state["ahead"] = [("sample", 0, [1], [-1.0])]
    torch.save(state, checkpoint / "state.pt")
    rewrite(checkpoint, "state.pt", (checkpoint / "state.pt").read_bytes())
    assert run_distributed(run, 1, configure(assets, folder, "trainer.max_steps=3")) == [3]
    run_distributed(run, 1, configure(assets, tmp_path / "whole", "trainer.max_steps=3"))
    assert numbers(folder) == numbers(tmp_path / "whole") and not ran.exists()


@pytest.mark.parametrize(
    "override,message",
    [
        ("seed=5", "seed=5: the run to resume has 1, and the order"),
        ("model.hf_path={other}", "is another model than the checkpoint's, which has num_layers 3"),
    ],
)
def test_options_that_contradict_the_checkpoint_are_refused(override, message, finished, assets, tmp_path):
    write_tiny_model(tmp_path / "other", seed=1, num_hidden_layers=2)
    config = configure(assets, finished, "trainer.max_steps=3", override.format(other=tmp_path / "other"))
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(RuntimeError, match=message):
        run_distributed(run, 1, config)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_finished_run_stays_finished_and_keeps_two_checkpoints(finished, assets):
    before = (finished / "metrics.jsonl").read_bytes()
    assert run_distributed(run, 1, configure(assets, finished, "trainer.max_steps=2")) == [2]
    assert (finished / "metrics.jsonl").read_bytes() == before
    names = sorted(p.name for p in (finished / "checkpoints").iterdir())
    assert names == ["last", "step-00000001", "step-00000002"]
    assert os.readlink(finished / "checkpoints" / "last") == "step-00000002"


def test_a_run_that_fails_while_it_is_built_says_so(finished, assets, tmp_path):
    """And names the checkpoint that is there, not one of step 0."""
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    shutil.copytree(assets / "tiny-vlm", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, tmp_path / "model" / "model.safetensors")
    model = f"model.hf_path={tmp_path}/model"
    with pytest.raises(RuntimeError, match="which is not finite"):
        run_distributed(run, 1, configure(assets, tmp_path / "run", "trainer.max_steps=3", model))
    (status,) = read_lines(tmp_path / "run" / "status.json")
    assert (status["reason"], status["finished"], status["step"]) == ("error", False, 2)
    assert status["checkpoint"].endswith("step-00000002") and not (tmp_path / "run" / "run.lock").exists()


def test_metrics_that_are_no_lines_of_ours_do_not_stop_a_resume(finished, assets, tmp_path):
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b'[1]\n\xff\xfe\n{"step": null}\n7\n')
    assert run_distributed(run, 1, configure(assets, tmp_path / "run", "trainer.max_steps=3")) == [3]
    assert [line["step"] for line in read_lines(metrics)] == [0, 1, 2]


def test_a_folder_in_the_place_of_the_newest_checkpoints_link_is_told(finished, assets, tmp_path):
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    link = tmp_path / "run" / "checkpoints" / "last"
    link.unlink()
    link.mkdir()
    with pytest.raises(RuntimeError, match=r"OptionError: exp_manager.exp_dir=\S+/last: is a folder where the link"):
        run_distributed(run, 1, configure(assets, tmp_path / "run", "trainer.max_steps=3"))


def test_a_run_that_starts_anew_sets_earlier_checkpoints_aside(finished, assets, tmp_path):
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    anew = configure(assets, tmp_path / "run", "trainer.max_steps=1", "exp_manager.resume_if_exists=false")
    assert run_distributed(run, 1, anew) == [1]
    assert [p.name for p in CheckpointFolder(tmp_path / "run" / "checkpoints", 2).complete()] == ["step-00000001"]
    kept = CheckpointFolder(tmp_path / "run" / "checkpoints.previous-1", 2).complete()
    assert [p.name for p in kept] == ["step-00000001", "step-00000002"]
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl.previous")) == 2
