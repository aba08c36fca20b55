"""The command lines: what users type, what they get, and how their mistakes end.

What depends on the process itself (signals, torchrun, another folder, the first import) starts real ones; the others
run in processes that have the imports already (`tests.distributed.run_recipe`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from nemo_vopd.config import PixelConfig
from nemo_vopd.data.processor import Processor
from tests.distributed import HANG, ROOT, run_recipe
from tests.helpers import read_lines
from tests.reference import response_logits

PYTHON = [sys.executable, "-W", "ignore"]


def launch(*command: str, cwd: Path = ROOT, timeout: float = HANG, **env: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def trained(assets, tmp_path_factory):
    """`train_vopd.py --config-name tiny`, alone, with its rollouts dumped; run from another folder."""
    folder = tmp_path_factory.mktemp("trained")
    dump = folder / "rollouts.jsonl"
    arguments = [f"rollout.dump_path={dump}", f"exp_manager.exp_dir={folder / 'run'}", "trainer.max_steps=3"]
    done = launch(
        *PYTHON,
        str(ROOT / "recipes/train_vopd.py"),
        "--config-name",
        "tiny",
        *arguments,
        cwd=folder,
        NEMO_VOPD_TINY=str(assets),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


KEYS = {
    "step",
    "loss",
    "grad_norm",
    "lr",
    "num_response_tokens",
    "num_dropped_samples",
    "teacher_topk_mass",
    "student_topk_mass",
    "importance_weight_mean",
    "entropy",
    "seconds_rollout",
    "seconds_teacher",
    "seconds_student",
    "seconds_optimizer",
    "tokens_per_second",
}


def test_a_run_writes_metrics_and_tensorboard_and_says_what_serves_it(trained):
    folder, done = trained
    metrics = read_lines(folder / "run" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert all(set(line) >= KEYS for line in metrics)
    # the same engine and weights: rollout and trainer agree, so the weights are one
    assert all(abs(line["importance_weight_mean"] - 1) < 1e-5 and 0 < line["loss"] < 0.7 for line in metrics)
    assert all(line["mismatch_mean"] <= line["mismatch_max"] < 1e-4 and line["mismatch_share"] == 0 for line in metrics)
    assert [line["lr"] for line in metrics] == pytest.approx([2e-7, 4e-7, 6e-7])
    assert list((folder / "run" / "logs").glob("events.out.tfevents*"))
    assert "attention: torch scaled_dot_product_attention" in done.stdout and "megatron-core 0.19" in done.stdout
    assert "mean_response_length=" in done.stdout and "tokens_per_second=" in done.stdout


def test_torchrun_with_tensor_parallelism_replays_to_the_same_numbers(trained, assets):
    folder, _ = trained
    done = launch(
        *PYTHON,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "recipes/train_vopd.py",
        "--config-name",
        "tiny",
        "parallel.tensor=2",
        "rollout=replay",
        f"rollout.path={folder / 'rollouts.jsonl'}",
        f"exp_manager.exp_dir={folder / 'tp2'}",
        "trainer.max_steps=3",
        NEMO_VOPD_TINY=str(assets),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone, split = read_lines(folder / "run" / "metrics.jsonl"), read_lines(folder / "tp2" / "metrics.jsonl")
    for one, two in zip(alone, split, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        assert two["num_response_tokens"] == one["num_response_tokens"]


def test_srun_variables_alone_make_a_distributed_run(trained, assets, tmp_path):
    """What srun sets for two tasks on one node, without torchrun's variables."""
    folder, _ = trained
    arguments = ["rollout=replay", f"rollout.path={folder / 'rollouts.jsonl'}", f"exp_manager.exp_dir={tmp_path}"]

    def task(rank: int):
        slurm = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": "2"}
        slurm |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
        command = ["recipes/train_vopd.py", "--config-name", "tiny", *arguments, "trainer.max_steps=2"]
        return run_recipe(*command, NEMO_VOPD_TINY=str(assets), **slurm)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(task, range(2)):
            assert done.returncode == 0, done.stderr[-2000:]
    alone, split = read_lines(folder / "run" / "metrics.jsonl"), read_lines(tmp_path / "metrics.jsonl")
    assert [line["loss"] for line in split] == pytest.approx([line["loss"] for line in alone[:2]], rel=1e-5)


def start(*arguments: str, assets: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NEMO_VOPD_TINY": str(assets)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*PYTHON, *arguments], cwd=ROOT, env=environment, text=True, **pipes)


def wait_for_steps(folder: Path, num: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + HANG
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < num:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-2000:]
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_in_order_and_the_same_command_resumes_it(number, assets, tmp_path):
    command = ["recipes/train_vopd.py", "--config-name", "tiny", f"exp_manager.exp_dir={tmp_path}"]
    process = start(*command, "trainer.max_steps=100000", assets=assets)
    wait_for_steps(tmp_path, 2, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=HANG)
    assert process.returncode == 0, output[-2000:]
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["reason"] == number.name and status["finished"] is False and status["step"] >= 2
    assert ("interrupted: the run ends and is saved after this step" in output) == (number == signal.SIGINT)
    assert "the same command resumes it" in output
    done = run_recipe(*command, f"trainer.max_steps={status['step'] + 2}", NEMO_VOPD_TINY=str(assets))
    assert done.returncode == 0 and f"resuming after step {status['step']} from" in done.stdout
    assert json.loads((tmp_path / "status.json").read_text())["finished"] is True
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == list(range(status["step"] + 2))


def test_a_second_interrupt_ends_a_run_at_once(assets, tmp_path):
    command = ["recipes/train_vopd.py", "--config-name", "tiny", f"exp_manager.exp_dir={tmp_path}"]
    # a sampled token takes a while, and a step many
    process = start(*command, "trainer.max_steps=100000", "rollout.max_response_length=2000", assets=assets)
    wait_for_steps(tmp_path, 2, process)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    output, _ = process.communicate(timeout=HANG)
    assert process.returncode == 130 and "Traceback" not in output, output[-2000:]
    assert output.strip().splitlines()[-1] == "interrupted: ended at once"
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["reason"] == "running" and status["step"] >= 1


def test_a_signal_while_loading_is_not_lost(assets, tmp_path):
    process = start("recipes/train_vopd.py", "--config-name", "tiny", f"exp_manager.exp_dir={tmp_path}", assets=assets)
    listening = 1 << (signal.SIGUSR1 - 1)
    while not int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1], 16) & listening:
        time.sleep(0.01)
    assert not (tmp_path / "status.json").exists()  # Megatron is not even loaded
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=HANG)
    assert process.returncode == 0, output[-2000:]
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["reason"] == "SIGUSR1" and status["step"] == 0 and status["finished"] is False


def test_a_killed_rank_ends_the_job(assets, tmp_path):
    process = start(
        *["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "recipes/train_vopd.py"],
        *["--config-name", "tiny", f"exp_manager.exp_dir={tmp_path}", "trainer.max_steps=100000"],
        assets=assets,
    )
    wait_for_steps(tmp_path, 1, process)
    ranks = [child for child in psutil.Process(process.pid).children() if "recipes/train_vopd.py" in child.cmdline()]
    assert len(ranks) == 2
    family = [descendant for rank in ranks for descendant in [rank, *rank.children(recursive=True)]]
    ranks[1].kill()
    process.communicate(timeout=HANG)
    assert process.returncode != 0
    _, alive = psutil.wait_procs(family, timeout=HANG)
    assert not alive, "ranks or their children survived"


MISTAKES = {
    "unknown key": (["rollout.nn=3"], "rollout.nn=3: no such option"),
    "wrong type": (["rollout.n=many"], "rollout.n=many"),
    "negative n": (["rollout.n=-1"], "rollout.n=-1: must be at least 1; set rollout.n=1 or more"),
    "no data": (["data.path=/nowhere/data"], "data.path=/nowhere/data"),
    "no model": (["model.hf_path=/nowhere/model"], "model.hf_path=/nowhere/model"),
    "support too large": (["distill.top_k=1000"], "distill.top_k=1000: must not exceed the vocabulary size, 128"),
    "heads": (["parallel.tensor=3"], "parallel.tensor=3: must divide the 4 attention heads; use 1 or 2"),
    "world": (["parallel.tensor=2"], "must divide the number of processes, 1"),
    "two virtual stages": (
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
        "parallel.virtual_pipeline=2: the interleaved schedule needs at least 3 stages",
    ),
    "unknown group": (["rollout=telepathy"], "rollout=telepathy: there is no conf/rollout/telepathy.yaml"),
    "no rollouts": (
        ["rollout=replay", "rollout.path=/nowhere/r.jsonl"],
        "rollout.path=/nowhere/r.jsonl: is not a file",
    ),
    "not an option": (["faster"], "faster: is not of the form option=value"),
    "accuracy without data": (
        ["evaluation.every_n_steps=2", "evaluation.path=/nowhere/e"],
        "evaluation.path=/nowhere/e: is not an Energon data set",
    ),
    "control characters": (
        ["rollout=replay", "rollout.path='/no/\x1b[2J\u202ex'"],
        "rollout.path=/no/?[2J?x: is not a file",
    ),
    "batch": (["data.batch_size=0"], "data.batch_size=0: must be at least 1"),
}


def test_mistakes_end_with_one_line_and_code_2(assets, tmp_path):
    for name, (arguments, words) in MISTAKES.items():
        folder = f"exp_manager.exp_dir={tmp_path / name.replace(' ', '_')}"
        command = ["recipes/train_vopd.py", "--config-name", "tiny", folder, *arguments]
        run = run_recipe if name != "unknown key" else partial(launch, *PYTHON)  # one as a user starts it
        done = run(*command, NEMO_VOPD_TINY=str(assets))
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2, f"{name}: code {done.returncode}\n{done.stderr[-2000:]}"
        assert len(errors) == 1 and words in errors[0] and "; " in errors[0], f"{name}: {errors}"
        assert "Traceback" not in done.stderr, name


def test_other_loggers_offline(assets, tmp_path):
    tiny = ["recipes/train_vopd.py", "--config-name", "tiny", "trainer.max_steps=2"]
    options = ["exp_manager.create_wandb_logger=true", "exp_manager.create_mlflow_logger=true"]
    variables = {"NEMO_VOPD_TINY": str(assets), "WANDB_MODE": "offline", "MLFLOW_ALLOW_FILE_STORE": "true"}
    variables["MLFLOW_TRACKING_URI"] = f"file:{tmp_path}/mlruns"
    done = run_recipe(*tiny, f"exp_manager.exp_dir={tmp_path}/named", *options, **variables)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [line["loss"] for line in read_lines(tmp_path / "named" / "metrics.jsonl")]
    (logged,) = (tmp_path / "mlruns").glob("*/*/metrics/loss")
    written = [line.split() for line in logged.read_text().splitlines()]  # time, value, step
    assert [float(value) for _, value, _ in written] == pytest.approx(losses) and [s for *_, s in written] == ["0", "1"]
    assert (logged.parents[1] / "tags" / "mlflow.runName").read_text() == "named"
    (binary,) = (tmp_path / "named" / "logs" / "wandb").glob("offline-run-*/*.wandb")
    assert b"nemo_vopd" in binary.read_bytes() and b"mean_response_length" in binary.read_bytes()
    for option, words in {
        "exp_manager.create_wandb_loger=true": "no such option of NeMo's exp_manager; did you mean create_wandb_logger",
        "exp_manager.create_wandb_logger=true": "create_wandb_logger=True: cannot start (No API key configured",
    }.items():
        done = run_recipe(*tiny, f"exp_manager.exp_dir={tmp_path}/no", option, NEMO_VOPD_TINY=str(assets))
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(errors) == 1 and words in errors[0], done.stderr[-1000:]


def test_what_is_given_in_the_place_of_a_model_or_a_checkpoint_is_named(assets, tmp_path):
    run, model = tmp_path / "run", f"{assets}/tiny-vlm"
    command = ["recipes/train_vopd.py", "--config-name", "tiny", f"exp_manager.exp_dir={run}", "trainer.max_steps=1"]
    assert run_recipe(*command, "checkpoint.every_n_steps=1", NEMO_VOPD_TINY=str(assets)).returncode == 0
    export, evaluate = ["recipes/convert_checkpoint.py", "export", f"output={tmp_path}/out"], ["recipes/evaluate.py"]
    evaluate += [f"data.path={assets}/tiny-digits", "precision.dtype=fp32"]
    last = run / "checkpoints" / "last"
    for given, words in {
        f"model.hf_path={last}": "is a checkpoint of a run; python recipes/convert_checkpoint.py export",
        f"model.hf_path={run}": f"is the folder of a run; python recipes/convert_checkpoint.py export checkpoint={run}",
        "model.hf_path=Qwen/Qwen2.5-VL-7B-Instruct": "is no directory, and nothing is downloaded; hf download Qwen/",
        f"model.hf_path={tmp_path}/nowhere": "does not exist; give the directory",
        f"model.hf_path={run}/status.json": "is not a directory; give the directory",
        f"model.hf_path={assets}/tiny-digits": "is a data set; give the directory",
        f"model.hf_path={tmp_path}": "has no config.json; give the directory",
        f"checkpoint={run}": f"is the folder of a run; give checkpoint={last}",
        f"checkpoint={run}/checkpoints": f"is the folder of all checkpoints; give checkpoint={last}",
        f"checkpoint={model}": "is a model directory, which needs no export",
        f"checkpoint={assets}/tiny-digits": "is not a checkpoint of this program",
    }.items():
        done = run_recipe(*(export if given.startswith("checkpoint") else evaluate), given)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(errors) == 1 and words in errors[0], (given, done.stderr[-1000:])
    assert not (tmp_path / "out").exists()


def test_options_may_stand_before_flags_and_help_helps():
    done = run_recipe("recipes/train_vopd.py", "rollout.n=-3", "--config-name", "tiny")
    assert done.returncode == 2 and "rollout.n=-3" in done.stderr
    done = run_recipe("recipes/train_vopd.py", "--help")
    assert done.returncode == 0 and "teacher_view" in done.stdout


def test_benchmark_takes_its_part_as_a_word(tmp_path):
    sizes = ["loss.num_tokens=[48]", "loss.vocab_size=1000", "loss.hidden_size=64", "repeats=1"]
    done = run_recipe("recipes/benchmark.py", "loss", *sizes, f"output={tmp_path}/loss.json")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "loss.json").read_text())["rows"]
    assert [row["loss"] for row in rows] == ["dense", "fused"] and all(row["ms"] > 0 for row in rows)
    done = run_recipe("recipes/benchmark.py", "lost")
    assert done.returncode == 2 and "part=lost: must be one of loss, rollout, step" in done.stderr


def test_an_unknown_run_lists_the_known_ones():
    done = run_recipe("recipes/train_vopd.py", "--config-name", "nonsense")
    assert done.returncode == 2 and "choose one of tiny, train" in done.stderr and "evaluate" not in done.stderr


def test_a_mistake_that_only_one_rank_meets_is_told(trained, assets, tmp_path):
    folder, _ = trained
    lines = (folder / "rollouts.jsonl").read_text().splitlines()
    # the second prompt of the first batch belongs to rank 1
    second = next(line for line in lines if read_id(line) != read_id(lines[0]))
    some = tmp_path / "some.jsonl"
    some.write_text("".join(line + "\n" for line in lines if read_id(line) != read_id(second)))
    options = ["rollout=replay", f"rollout.path={some}", f"exp_manager.exp_dir={tmp_path / 'run'}"]
    command = ["recipes/train_vopd.py", "--config-name", "tiny", *options]
    done = run_recipe(*command, nproc=2, NEMO_VOPD_TINY=str(assets))
    assert done.returncode != 0 and f"has no response to sample {read_id(second)}" in done.stderr


def read_id(line: str) -> str:
    return json.loads(line)["sample_id"]


def test_the_quickstart_leaves_other_peoples_files_alone(tmp_path):
    precious = tmp_path / "data" / "precious"
    precious.parent.mkdir()
    precious.touch()
    done = run_recipe("recipes/quickstart.py", f"exp_manager.exp_dir={tmp_path}")
    assert done.returncode == 2 and "holds data, which this recipe did not make" in done.stderr
    assert precious.exists()


def test_evaluate_prints_the_gap(assets, tmp_path):
    output = tmp_path / "gap.json"
    done = run_recipe(
        "recipes/evaluate.py",
        f"model.hf_path={assets}/tiny-vlm",
        f"data.path={assets}/tiny-digits",
        "data.full.max_pixels=12544",
        "data.crop_pixels.max_pixels=3136",
        "precision.dtype=fp32",
        "rollout.max_response_length=4",
        "limit=8",
        f"output={output}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "crop_accuracy" in done.stdout and '"num_samples": 8' in output.read_text()


def test_generate_answers_with_one_json_object(assets, tmp_path):
    """Alone and in four processes with tensor and pipeline parallelism: the same tokens, those of transformers."""
    image = Image.new("RGB", (84, 56), (200, 30, 60))
    image.save(tmp_path / "image.png")
    request = [f"model.hf_path={assets}/tiny-vlm", f"image={tmp_path}/image.png", "prompt='Which digit, please?'"]
    request += ["max_new_tokens=6"]
    alone = run_recipe("recipes/generate.py", *request)
    assert alone.returncode == 0, alone.stderr[-2000:]
    reply = json.loads(alone.stdout)
    assert set(reply) == {"text", "token_ids", "log_probs"} and len(reply["token_ids"]) == len(reply["log_probs"]) <= 6
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.pipeline_layout=[1,2]"]
    split = run_recipe("recipes/generate.py", *request, *layout, nproc=4)
    assert split.returncode == 0, split.stderr[-2000:]
    other = json.loads(split.stdout)
    assert other["token_ids"] == reply["token_ids"] and other["text"] == reply["text"]
    assert other["log_probs"] == pytest.approx(reply["log_probs"], abs=1e-5)
    processor = Processor.from_pretrained(assets / "tiny-vlm")
    view = processor.view([image], "Which digit, please?", [PixelConfig()])
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(assets / "tiny-vlm")
    logits = response_logits(model, view, torch.tensor(reply["token_ids"]))
    forbidden = torch.tensor(processor.forbidden_token_ids)
    assert logits.index_fill(-1, forbidden, -torch.inf).argmax(-1).tolist() == reply["token_ids"]
    expected = torch.log_softmax(logits, -1).gather(-1, torch.tensor(reply["token_ids"])[:, None]).squeeze(-1)
    assert reply["log_probs"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_convert_from_the_command_line(assets, tmp_path):
    model = f"model.hf_path={assets}/tiny-vlm"
    done = run_recipe("recipes/convert_checkpoint.py", "import", model, f"output={tmp_path}/checkpoint")
    assert done.returncode == 0, done.stderr[-2000:]
    export = ["recipes/convert_checkpoint.py", "export", f"checkpoint={tmp_path}/checkpoint", f"output={tmp_path}/hf"]
    done = run_recipe(*export, "weights=teacher")
    assert done.returncode == 0 and "wrote the teacher" in done.stdout, done.stderr[-2000:]
    original, exported = (load_file(folder / "model.safetensors") for folder in (assets / "tiny-vlm", tmp_path / "hf"))
    assert original.keys() == exported.keys() and all(torch.equal(original[n], exported[n]) for n in original)
    done = run_recipe(*export)
    assert done.returncode == 2 and "exists; choose another directory" in done.stderr
