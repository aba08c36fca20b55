"""Transformer Engine without its compiled library: all of its own Python, imported on any machine.

Its wheel holds every file of Python (`pip install --no-deps transformer-engine`, 1 MB), but asks for a library of C++
that only a machine with CUDA's compiler can build. `load` imports it with a stand-in for that library, which looks a
name up in `KERNELS` when it is called.

Megatron decides when it is imported whether Transformer Engine is there, and the other tests are to see what a machine
without it sees. So `make test` installs it into `FOLDER`, which is on no path, and only the processes of `run_on_te`
load it: they are forked from a server of their own. In an NGC image they load the Transformer Engine that is there,
with the stand-in too; what is compiled in it is for `tests/gpu`.
"""

from __future__ import annotations

import enum
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed

FOLDER = Path(sys.prefix, "share", "transformer_engine")
needs_te = pytest.mark.skipif(
    not FOLDER.exists() and importlib.util.find_spec("transformer_engine") is None,
    reason="Transformer Engine is not installed: make test does so",
)
KERNELS: dict[str, Callable] = {}
"""What the compiled library would compute, by name."""

_DTYPES = {"kByte": 0, "kInt32": 2, "kFloat32": 4, "kFloat16": 5, "kBFloat16": 6}
_DTYPES |= {"kFloat8E4M3": 7, "kFloat8E5M2": 8, "kFloat4E2M1": 10}
_UNUSED = (
    "onnx_extensions",
    "triton",
    *(f"triton.{name}" for name in ("cross_entropy", "grouped_dbias_dscales", "pad", "permutation")),
)
"""Modules that would need more packages, for what nothing here does: ONNX, experts, other formats than these of FP8."""


class StandIn:
    """For the compiled library or something in it: a kernel, or a value that is only compared with itself."""

    def __init__(self, path: str = "", **values: Any) -> None:
        self._path = path
        vars(self).update(values)

    def __getattr__(self, name: str) -> StandIn:
        if name.startswith("_"):
            raise AttributeError(name)
        part = StandIn(f"{self._path}.{name}".removeprefix("."))
        setattr(self, name, part)
        return part

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return KERNELS[self._path](*args, **kwargs)


def load() -> None:
    """Import `transformer_engine.pytorch`, in a process that has not imported Megatron."""
    assert not {"megatron.core", "transformer_engine"} & sys.modules.keys()
    modules: dict[str, Any] = sys.modules  # type: ignore[assignment]
    forward = [f"GEMM{i}_{role}" for i in (1, 2, 3) for role in ("INPUT", "WEIGHT", "OUTPUT")]
    backward = [f"GRAD_{role}{i}" for i in (1, 2, 3) for role in ("OUTPUT", "INPUT")]
    extension = modules["transformer_engine_torch"] = StandIn(
        DType=enum.IntEnum("DType", _DTYPES),
        FP8FwdTensors=enum.IntEnum("FP8FwdTensors", forward, start=0),
        FP8BwdTensors=enum.IntEnum("FP8BwdTensors", backward, start=0),
        NVTERoutingMapFormat=enum.IntEnum("NVTERoutingMapFormat", ["BYTEMAP", "BITMAP_U8"], start=0),
    )
    for name in _UNUSED:
        modules[f"transformer_engine.pytorch.{name}"] = StandIn(name)
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # loads no library of CUDA
    sys.path.append(str(FOLDER))
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None and spec.loader is not None
    package = modules["transformer_engine"] = importlib.util.module_from_spec(spec)
    common: Any = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    spec.loader.exec_module(package)  # imports the part for PyTorch, and hides why if it cannot
    importlib.import_module("transformer_engine.pytorch")
    # This module takes over all names of the library with `import *`, and a stand-in has no list of them.
    vars(importlib.import_module("transformer_engine.pytorch.cpp_extensions"))["__getattr__"] = extension.__getattr__


def run_on_te(function: Callable, world_size: int, *args: Any) -> list[Any]:
    """As `run_distributed`, in processes that have Transformer Engine."""
    return run_distributed(function, world_size, *args, preload="tests.simulated_te")
