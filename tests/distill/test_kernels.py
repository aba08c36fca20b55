"""The Triton kernels of the loss, interpreted on a CPU, against the same passes in PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.distributed import ROOT

pytest.importorskip("triton")
ROWS, WIDTH = 5, 1003
ALPHAS = (0.0, 0.3, 1.0)


def close(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def compare(sharpness: float) -> None:
    """Every pass of `logit_passes.py` with the kernels and without them, on the same logits."""
    from nemo_vopd.distill import kernels, logit_passes
    from nemo_vopd.distill.vocabulary import Vocabulary

    kernels._BLOCK = 256  # several blocks in a row, the last one short
    generator = torch.Generator().manual_seed(0)
    student, teacher = (sharpness * torch.randn(ROWS, WIDTH, generator=generator) + 30 for _ in range(2))
    student[:, -7:] = teacher[:, -7:] = -1e30  # the padding of a vocabulary
    student[1], student[0, 3] = torch.nan, 60 + 30 * sharpness
    vocabulary, factor = Vocabulary(None, WIDTH), torch.tensor([0.5, 0.0, -2.0, 0.0, 1.0])

    def passes() -> list:
        found = []
        of_student, entropy = logit_passes.normalise(student, vocabulary)
        of_teacher, _ = logit_passes.normalise(teacher, vocabulary)
        sound = [0, 2, 3, 4]
        found.append([part[sound] for part in (*of_student, *of_teacher, entropy)])
        found.append([logit_passes.softmax_times_(student.clone(), of_student, factor)])
        for alpha in ALPHAS:
            sums = logit_passes.divergence_sums(student, of_student, teacher, of_teacher, alpha)
            found.append([part[sound] for part in sums])
            arguments = student.clone(), of_student, teacher, of_teacher, alpha, sums[1], factor
            found.append([logit_passes.divergence_gradient_(*arguments)])
        return found

    expected = passes()
    logit_passes._kernels = lambda logits: kernels
    for got, one in zip(passes(), expected, strict=True):
        close(got, one)
        assert all(torch.isfinite(part).all() for part in got)
    assert expected[1][0][1].eq(0).all() and expected[1][0][0].abs().sum() > 0.4


def test_kernels_equal_pytorch():
    # Triton decides when it is imported whether it interprets
    command = [sys.executable, "-c", "from tests.distill.test_kernels import compare; compare(1.0); compare(20.0)"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=300, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
