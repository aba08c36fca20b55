"""Megatron-Core on a machine without CUDA."""

import subprocess
import sys

import pytest

from nemo_vopd.mcore import cpu
from tests.distributed import HANG


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_cuda_requests_land_on_the_cpu():
    cpu.activate()
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA: the module stays out of the way")
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(1).cuda().to("cuda").to(device="cuda:0").device.type == "cpu"
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).type("torch.DoubleTensor").dtype == torch.float64
    assert torch.ones(1).to(torch.bfloat16).dtype == torch.bfloat16
    assert torch.cuda.current_device() == torch.device("cpu")
    with torch.device("meta"):
        assert torch.arange(3).is_meta and torch.zeros(2).is_meta


def test_nothing_changes_where_cuda_is_available():
    code = """
import torch
torch.cuda.is_available = lambda: True
before = torch.zeros, torch.Tensor.type, torch.cuda.current_device
from nemo_vopd.mcore import cpu
from tests.distributed import HANG
cpu.activate()
print(before == (torch.zeros, torch.Tensor.type, torch.cuda.current_device))
"""
    assert run(code) == "True"


def test_swiglu_is_megatrons_without_a_compiler():
    """The same values as Megatron's formulas, and of the layer's the backward pass keeps the input alone."""
    code = """
import torch
torch._dynamo.config.disable = True  # Megatron's formulas as they stand
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from nemo_vopd.mcore import cpu

def run():
    x = torch.randn(5, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = bias_swiglu_impl(x, None)
    (y ** 3).sum().backward()
    return y.detach(), x.grad, [t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in kept]

theirs, formulas = run(), bias_swiglu_impl.__globals__["swiglu_back"]
torch.cuda.is_available = lambda: False
cpu.activate()
ours = run()
assert bias_swiglu_impl.__globals__["swiglu_back"] is not formulas
for a, b in zip(ours[:2], theirs[:2]):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
print(ours[2], theirs[2])
"""
    assert run(code) == "[True] [True]"


def test_unchecked_megatron_versions_are_refused():
    code = """
import importlib.metadata, torch
torch.cuda.is_available = lambda: False
importlib.metadata.version = lambda name: "0.99.0"
from nemo_vopd.mcore import cpu
from tests.distributed import HANG
try:
    cpu.activate()
except RuntimeError as error:
    print(error)
"""
    assert "megatron-core=0.99.0" in run(code)
