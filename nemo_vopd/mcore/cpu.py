"""Megatron-Core on a machine without CUDA: the few places that name the GPU answer with the CPU.

Megatron-Core 0.19 computes nothing that needs a GPU on our path, but it allocates with `device="cuda"`, asks
`torch.cuda.current_device()`, checks for `torch.cuda.FloatTensor` and compiles its SwiGLU. `activate` answers those
questions. It does nothing where CUDA is available, and refuses Megatron versions it was not checked with.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torch.utils._device
from torch import Tensor

CHECKED_MEGATRON = ("0.19",)
_FACTORIES = (
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
)
_active = False


def activate() -> None:
    """Make Megatron-Core usable on this machine; call before building anything. No-op when CUDA is available."""
    global _active
    if torch.cuda.is_available() or _active:
        return
    version = importlib.metadata.version("megatron-core")
    if not version.startswith(CHECKED_MEGATRON):
        raise RuntimeError(
            f"megatron-core={version}: running without CUDA was checked with {', '.join(CHECKED_MEGATRON)}.x only; "
            "install one of those or use a machine with a GPU"
        )
    _active = True
    # `with torch.device(...)` (transformers' meta-device loading) recognises factories by identity, in a list it
    # makes on first use: make it now, of the originals, which the replacements below call
    torch.utils._device._device_constructors()  # type: ignore[attr-defined]
    _patch_torch_cuda()
    for name in _FACTORIES:
        setattr(torch, name, _cuda_means_cpu(getattr(torch, name)))
    _patch_tensor()
    replace_swiglu()


def _is_cuda(device: object) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def _cuda_means_cpu(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)

    return wrapper


def _patch_torch_cuda() -> None:
    cpu = torch.device("cpu")
    cuda = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.synchronize = lambda device=None: None
    cuda.current_stream = lambda device=None: _InOrder()
    cuda.nvtx.range_push = lambda msg: 0
    cuda.nvtx.range_pop = lambda: 0
    # Megatron's CUDA RNG tracker (dropout, weight initialisation) then tracks the CPU generator.
    cuda.get_rng_state = lambda device="cuda": torch.random.get_rng_state()
    cuda.set_rng_state = lambda new_state, device="cuda": torch.random.set_rng_state(new_state)
    cuda.manual_seed = lambda seed: torch.random.manual_seed(seed)
    import megatron.core.tensor_parallel.random as mcore_random

    mcore_random._get_cuda_rng_state = lambda *args, **kwargs: torch.random.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda new_state, *args, **kwargs: torch.random.set_rng_state(new_state)


def replace_swiglu() -> None:
    """Replace the SwiGLU that Megatron compiles, forward and backward, by PyTorch's operations: nothing is compiled."""
    from megatron.core.fusions import fused_bias_swiglu

    fused_bias_swiglu.swiglu, fused_bias_swiglu.swiglu_back = _swiglu, _swiglu_back


def _swiglu(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


def _swiglu_back(g: Tensor, y: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return torch.cat([torch.ops.aten.silu_backward(g * up, gate), g * F.silu(gate)], -1)


class _InOrder:
    """The stream of a CPU: what was started before is done, so nobody waits."""

    def wait_event(self, event: object) -> None:
        """Nothing to wait for."""

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""


def _patch_tensor() -> None:
    plain_type: Callable = torch.Tensor.type
    plain_to: Callable = torch.Tensor.to

    def tensor_type(self, dtype=None, non_blocking=False, **kwargs):
        if dtype is not None:
            return plain_type(self, dtype, non_blocking, **kwargs)
        # the optimizer sorts parameters by this name (distrib_optimizer.py, _build_model_and_main_param_groups)
        return plain_type(self).replace("torch.", "torch.cuda.", 1)

    def tensor_to(self, *args, **kwargs):
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return plain_to(self, *args, **kwargs)

    torch.Tensor.type = tensor_type  # type: ignore[assignment]
    torch.Tensor.to = tensor_to  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment]


def device() -> torch.device:
    """The device of this process: its CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def backend() -> str:
    """torch.distributed backend: nccl with GPUs, else gloo."""
    return "nccl" if torch.cuda.is_available() else "gloo"
