"""What only a GPU shows: Transformer Engine's kernels against the float32 oracle, FP8 runs, packing, FP8 state.

`pytest -m gpu tests/gpu`, in an image with Transformer Engine; one GPU is enough, FP8 wants an H100 or later.
The bounds on FP8 are those of its 3 bits of mantissa: each product rounds its factors by up to 2^-4, at random, which
some ten products in sequence and the difference of two passes make a few tens of per cent of a small divergence. On the
simulated GPU four seeds for the rollouts gave up to 15% in the first step and 21% after it, in bf16 1.4% and 16%.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from nemo_vopd.batch import collate
from nemo_vopd.mcore import fp8, parallel
from nemo_vopd.mcore.pipeline_passes import teacher_pass
from nemo_vopd.vlm.build import build_vlm
from tests.distributed import ROOT, run_distributed
from tests.helpers import made_up_rollouts, read_lines, tiny_config, write_rollouts
from tests.reference import ReferenceOptions, run_reference
from tests.test_step import train_and_collect
from tests.training.test_resume import configure, numbers, train_until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.timeout(600),
]
RECIPES = ["fp8_delayed", "fp8_tensorwise", "fp8_blockwise"]
STEPS, LR = 3, 1e-3
BF16 = {"first": 0.02, "loss": 0.2, "grad_norm": 0.35}
FP8 = {"first": 0.25, "loss": 0.4, "grad_norm": 0.4}


@pytest.fixture(scope="module")
def oracle(assets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    rollouts = made_up_rollouts(tiny_config(assets, folder), STEPS)
    write_rollouts(folder / "rollouts.jsonl", rollouts)
    return folder / "rollouts.jsonl", run_reference(assets / "tiny-vlm", rollouts, ReferenceOptions(lr=LR))


def check_near(metrics, expected, *, first, loss, grad_norm):
    """Compare with the oracle; `first` bounds loss and gradient norm of the step that no update precedes."""
    for k, (line, oracle_loss, oracle_norm) in enumerate(
        zip(metrics, expected.losses, expected.grad_norms, strict=True)
    ):
        print(k, line["loss"] / oracle_loss, line["grad_norm"] / oracle_norm)
        assert line["loss"] == pytest.approx(oracle_loss, rel=loss if k else first)
        assert line["grad_norm"] == pytest.approx(oracle_norm, rel=grad_norm if k else first)


@pytest.mark.parametrize("precision,bounds", [("bf16", BF16), *[(recipe, FP8) for recipe in RECIPES]])
def test_losses_and_gradients_stay_near_the_float32_oracle(precision, bounds, oracle, assets, tmp_path):
    rollouts, expected = oracle
    options = "rollout=replay", f"rollout.path={rollouts}", f"trainer.max_steps={STEPS}", f"optimizer.lr={LR}"
    config = tiny_config(assets, tmp_path, f"precision={precision}", *options)
    run_distributed(train_and_collect, 1, config, timeout=300)
    check_near(read_lines(tmp_path / "metrics.jsonl"), expected, **bounds)


def hidden_states(config):
    """Response rows of all made-up rollouts: packed together, and each in a microbatch of its own."""
    groups = parallel.initialize(config.parallel, seed=1)
    model = build_vlm(config, groups)
    (rollouts,) = made_up_rollouts(config, 1)
    views, multiple = [r.sample.student for r in rollouts], fp8.token_multiple(model.config)
    device = next(model.parameters()).device
    alone = [collate([r], [v], 0, multiple).to(device) for r, v in zip(rollouts, views, strict=True)]
    (packed,) = teacher_pass(model, [collate(rollouts, views, 0, multiple).to(device)], groups)
    return packed.float().cpu(), torch.cat(teacher_pass(model, alone, groups)).float().cpu()


@pytest.mark.parametrize("spec,precision", [("transformer_engine", "bf16"), ("local", "bf16"), ("local", "fp32")])
def test_packed_sequences_equal_each_alone(spec, precision, assets, tmp_path):
    config = tiny_config(assets, tmp_path, f"model.layer_spec={spec}", f"precision={precision}")
    ((packed, alone),) = run_distributed(hidden_states, 1, config, timeout=300)
    difference = (packed - alone).norm() / alone.norm()
    print(spec, precision, difference.item())
    assert difference < (1e-5 if precision == "fp32" else 2**-7)


@pytest.mark.parametrize("precision", ["fp8_delayed", "fp8_tensorwise"])
def test_a_resumed_fp8_run_goes_on_as_if_never_stopped(precision, assets, tmp_path):
    """Atomic sums in backward kernels differ from run to run, so not bit for bit; a lost scale would differ by far."""
    whole = configure(assets, tmp_path / "whole", f"precision={precision}")
    run_distributed(train_until, 1, whole, None, timeout=300)
    for stop_after in (3, None):
        run_distributed(
            train_until, 1, configure(assets, tmp_path / "cut", f"precision={precision}"), stop_after, timeout=300
        )
    for expected, line in zip(numbers(tmp_path / "whole"), numbers(tmp_path / "cut"), strict=True):
        assert line["num_response_tokens"] == expected["num_response_tokens"]
        assert line["loss"] == pytest.approx(expected["loss"], rel=0.02)


def scaling_after(config, stop_after):
    """The scaling state at the end of a run."""
    from nemo_vopd.model import VisionOPDModel

    states, original = [], VisionOPDModel.state

    def noted(self):
        states.append(fp8.gather(self._scaling(), self.groups))
        return original(self)

    VisionOPDModel.state = noted  # in this process, which ends with the run
    restored, original_restore = [], VisionOPDModel.restore

    def noted_restore(self, state):
        original_restore(self, state)
        restored.append(fp8.gather(self._scaling(), self.groups))

    VisionOPDModel.restore = noted_restore
    train_until(config, stop_after)
    return states, restored


def check_scaling(saved, restored):
    """What a run restores is what the one before saved."""
    assert restored.keys() == saved.keys() and len(restored) >= 2 * 3 * 4 * 4
    assert all(torch.equal(restored[name], saved[name]) for name in restored)
    for who in ("student", "teacher"):  # the teacher's scales move though its passes have no gradient
        scales = [t for name, t in restored.items() if name.startswith(who) and name.endswith("scale_fwd")]
        assert any((scale != 1).any() for scale in scales), who


def test_fp8_scaling_state_survives_a_restart(assets, tmp_path):
    config = configure(assets, tmp_path, "precision=fp8_delayed")
    ((saved, _),) = run_distributed(scaling_after, 1, config, 3, timeout=300)
    ((_, (restored,)),) = run_distributed(scaling_after, 1, config, None, timeout=300)
    check_scaling(saved[-1], restored)


@pytest.mark.parametrize("precision", ["bf16", "fp8_tensorwise"])
def test_the_quickstart_closes_the_gap(precision, tmp_path):
    command = [sys.executable, "-W", "ignore", "recipes/quickstart.py", f"exp_manager.exp_dir={tmp_path}/run"]
    done = subprocess.run(
        [*command, f"precision={precision}"], cwd=ROOT, timeout=580, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    print(precision, summary)
    assert summary["crop_accuracy_before"] - summary["full_accuracy_before"] > 0.1 and summary["gap_closed"] > 0.5
