"""A GPU that keeps its numbers in host memory: every rule about devices holds, every value is the CPU's.

CI has no GPU, and the commonest fault of code that has never seen one is a tensor on the wrong side: an index made on
the CPU, a CPU tensor handed to NCCL, `.numpy()` of a CUDA tensor. `activate` makes this process believe in CUDA
devices. Storages that belong to it are marked; each operation is looked at (`TorchDispatchMode`) and refused where CUDA
would refuse it; results belong where their operands do. Waits of the host for the device are noted with the line that
caused them; copies to the device are among them, since what is copied is not in pinned memory. Kernels, streams and
memory of a GPU are not simulated: that takes one.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_device_index = 0
_ANYWHERE = {"copy_", "_to_copy", "set_", "_foreach_copy_"}
"""Operations whose operands may lie on two devices."""
_INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}
_GPU_ONLY = {
    torch.ops.aten.mm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
    torch.ops.aten.addmm.dtype_out: lambda c, a, b, dtype, *, out: out.copy_(c + a.to(dtype) @ b.to(dtype)),
}
"""Operations that PyTorch has for GPUs only."""
_plain = {name: getattr(torch.Tensor, name) for name in ("device", "to", "numpy", "tolist", "type", "untyped_storage")}


class WrongDevice(RuntimeError):
    """What CUDA or NCCL would have refused."""


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    """Its own: Transformer Engine's tensors answer with an empty one."""
    return _plain["untyped_storage"](tensor)


class _Marks:
    """Which storages lie on the device."""

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}
        self._limit = 10_000

    def __contains__(self, tensor: Tensor) -> bool:
        return _storage(tensor)._cdata in self._storages

    def add(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        if storage._cdata not in self._storages:
            # the reference keeps the address from being used again
            self._storages[storage._cdata] = StorageWeakRef(storage)
        if len(self._storages) > self._limit:
            self._storages = {key: ref for key, ref in self._storages.items() if not ref.expired()}
            self._limit = 10_000 + 2 * len(self._storages)

    def remove(self, tensor: Tensor) -> None:
        self._storages.pop(_storage(tensor)._cdata, None)


marks = _Marks()
waits: collections.Counter[str] = collections.Counter()
"""Times the host waited for the device, by the line that made it wait."""


def _is_cuda(device: Any) -> bool:
    return isinstance(device, int) or str(device).startswith("cuda")


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among the arguments or results of an operation; `torch.utils._pytree` takes several times as long."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _line() -> str:
    """The innermost line outside torch that led here."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if f"{os.sep}torch{os.sep}" not in name and name != __file__:
            ours = name.startswith(_ROOT) and "site-packages" not in name  # .venv may lie in the project
            return f"{name.removeprefix(_ROOT) if ours else os.sep.join(name.split(os.sep)[-3:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class _Generator(torch.Generator):
    """One of the device."""


def _check_generator(name: str, kwargs: dict[str, Any]) -> None:
    if not isinstance(kwargs.get("generator"), _Generator | None):
        raise WrongDevice(f"{name}: a CPU generator for a CUDA tensor, at {_line()}")


class _Operations(TorchDispatchMode):
    """Looks at every operation."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        there = [tensor in marks for tensor in tensors]
        name = func._schema.name.partition("::")[2]
        if func.namespace == "c10d":
            self._check_collective(name, tensors, there)
        elif any(there) and not all(there):
            self._check(name, args, tensors, there)
        if any(there):
            _check_generator(name, kwargs)
        if any(there) and name in ("_local_scalar_dense", "nonzero", "_unique2", "equal", "masked_select"):
            waits[f"{_line()} {name}"] += 1
        if name in _INDEXING and there[0]:
            indices = [index for index in args[1] if index is not None]
            masks, value = [index for index in indices if index.dtype == torch.bool], args[2:3]
            # where a mask is set is looked up, but PyTorch makes a masked_fill_ of a scalar that is put there
            if masks and not (value and value[0] not in marks and len(masks) == len(indices)):
                waits[f"{_line()} nonzero"] += 1
            if any(index not in marks for index in indices):
                waits[f"{_line()} from the CPU"] += 1
        if name in _ANYWHERE and there[0] and any(t.dim() for t, on in zip(tensors, there, strict=True) if not on):
            waits[f"{_line()} from the CPU"] += 1
        result = _GPU_ONLY.get(func, func)(*args, **kwargs)
        if any(there) and not (name in _ANYWHERE and not there[0]):
            own = {_storage(tensor)._cdata for tensor, on in zip(tensors, there, strict=True) if not on}
            for tensor in _tensors((result,)):
                if _storage(tensor)._cdata not in own:
                    marks.add(tensor)
        return result

    @staticmethod
    def _check(name: str, args: tuple, tensors: list[Tensor], there: list[bool]) -> None:
        strangers = [tensor for tensor, on in zip(tensors, there, strict=True) if not on and tensor.dim() > 0]
        if not strangers or name in _ANYWHERE:
            return
        if name in _INDEXING and args[0] in marks:
            values = [a for a in args[2:3] if isinstance(a, Tensor)]
            if all(v in marks or v.dim() == 0 for v in values):
                return  # indices may stay on the CPU
        shapes = [(tuple(t.shape), "cuda" if on else "cpu") for t, on in zip(tensors, there, strict=True)]
        raise WrongDevice(f"{name}: tensors on two devices {shapes}, at {_line()}")

    @staticmethod
    def _check_collective(name: str, tensors: list[Tensor], there: list[bool]) -> None:
        if name == "barrier" or all(there):
            return
        frame: Any = sys._getframe(2)
        while frame is not None:
            if "object" in frame.f_code.co_name:  # torch moves pickled objects to the device by itself
                return
            frame = frame.f_back
        raise WrongDevice(f"{name}: NCCL was given a CPU tensor {[tuple(t.shape) for t in tensors]}, at {_line()}")


def kernel(name: str, function: Callable) -> Callable:
    """`function` as one operation of the device: its operands must lie there, and so does what it returns.

    Its own steps are not looked at, which would take most of the time of a run.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        strangers = [tuple(tensor.shape) for tensor in _tensors((*args, *kwargs.values())) if tensor not in marks]
        if strangers:
            raise WrongDevice(f"{name}: CPU tensors {strangers}, at {_line()}")
        with torch.no_grad(), torch._C._DisableTorchDispatch():
            result = function(*args, **kwargs)
        for tensor in _tensors((result,)):
            marks.add(tensor)
        return result

    return run


_FACTORIES = (
    *("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "randperm", "eye"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "linspace", "scalar_tensor"),
)


def _make(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call `function` with `device="cuda"` sent to host memory, and mark what comes of it."""
    device = kwargs.get("device")
    if device is None:
        return function(*args, **kwargs)
    if _is_cuda(device):
        _check_generator(function.__name__, kwargs)
        kwargs = {**kwargs, "device": "cpu"}
        if function.__name__ in ("tensor", "as_tensor"):
            waits[f"{_line()} from the CPU"] += 1
    result = function(*args, **kwargs)
    for tensor in _tensors((result,)):
        if not tensor.is_meta:
            (marks.add if _is_cuda(device) else marks.remove)(tensor)
    return result


class _Functions(TorchFunctionMode):
    """`with torch.device("cuda")` calls PyTorch's own factories, which it knows, instead of those in their places."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _make(func, args, kwargs or {})


def _device(self: Tensor) -> torch.device:
    plain = _plain["device"].__get__(self)
    return torch.device("cuda", _device_index) if plain.type == "cpu" and self in marks else plain


def _moved(tensor: Tensor, there: bool) -> Tensor:
    """`tensor` if it is there already, else a copy."""
    if tensor.is_meta or (tensor in marks) == there:
        return tensor
    waits[f"{_line()} {'from' if there else 'to'} the CPU"] += 1
    copy = tensor.clone()
    (marks.add if there else marks.remove)(copy)
    return copy


def _to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    device = kwargs.pop("device", None)
    args = tuple(args)
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    if args and (args[0] is None or isinstance(args[0], str | int | torch.device)):
        device, args = args[0], args[1:]
    device = None if device is None else torch.device("cuda" if isinstance(device, int) else device)
    if device is not None and device.type == "meta":
        return _plain["to"](self, device, *args, **kwargs)
    if device is not None:
        if self.is_meta:
            raise NotImplementedError("a meta tensor has no data to move")
        self = _moved(self, device.type == "cuda")
    args = tuple(a for a in args if not isinstance(a, bool))
    kwargs.pop("non_blocking", None)
    return _plain["to"](self, *args, **kwargs) if args or kwargs else self


def _numpy(self: Tensor, **kwargs: Any):
    if self in marks and not kwargs.get("force"):
        raise WrongDevice(f"numpy() of a CUDA tensor, at {_line()}")
    return _plain["numpy"](self, **kwargs)


def _tolist(self: Tensor) -> Any:
    if self in marks:
        waits[f"{_line()} tolist"] += 1
    with torch._C.DisableTorchFunction():  # which would find this function under the same name
        return _plain["tolist"](self)


def _type(self: Tensor, dtype: Any = None, *args: Any, **kwargs: Any):
    if dtype is not None:
        return _plain["type"](self, dtype, *args, **kwargs)
    name = _plain["type"](self)
    return name.replace("torch.", "torch.cuda.", 1) if self in marks and ".cuda." not in name else name


class _Stream:
    """Everything is done at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device, self.cuda_stream = torch.device("cuda", _device_index), 0

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: True

    def elapsed_time(self, other: Any) -> float:
        return 1.0


def _patch_cuda() -> None:
    import megatron.core.tensor_parallel.random as mcore_random

    cuda: Any = torch.cuda
    nothing = lambda *args, **kwargs: None  # noqa: E731
    properties = SimpleNamespace(
        name="simulated", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132, uuid="0"
    )
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 8,
        "is_bf16_supported": True,
        "get_device_name": "simulated",
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "mem_get_info": (80 * 2**30, 80 * 2**30),
        "is_current_stream_capturing": False,
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *args, _answer=answer, **kwargs: _answer)
    for name in ("empty_cache", "reset_peak_memory_stats", "_lazy_init", "init", "ipc_collect"):
        setattr(cuda, name, nothing)

    def set_device(device: Any) -> None:
        global _device_index
        _device_index = device if isinstance(device, int) else torch.device(device).index or 0

    cuda.set_device, cuda.current_device = set_device, lambda: _device_index
    torch.accelerator.is_available = lambda: False  # else the loader of a PyTorch for CUDA pins memory in a thread

    def synchronize(device: Any = None) -> None:
        waits[f"{_line()} synchronize"] += 1

    cuda.synchronize = synchronize
    cuda.current_stream = cuda.default_stream = _Stream
    cuda.Stream = cuda.Event = _Stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.device = lambda device: contextlib.nullcontext()
    cuda.nvtx.range_push, cuda.nvtx.range_pop = (lambda msg: 0), (lambda: 0)
    cuda.default_generators = (torch.default_generator,) * 8
    cuda.get_rng_state = lambda device="cuda": torch.random.get_rng_state()
    cuda.set_rng_state = lambda new_state, device="cuda": torch.random.set_rng_state(new_state)
    cuda.manual_seed = cuda.manual_seed_all = lambda seed: None
    mcore_random._get_cuda_rng_state = lambda *args, **kwargs: torch.random.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda new_state, *args, **kwargs: torch.random.set_rng_state(new_state)


def activate() -> None:
    """From now on this process has a CUDA device; gloo answers in NCCL's name. There is no way back."""
    from nemo_vopd.distill import logit_passes
    from nemo_vopd.mcore import cpu

    assert not torch.cuda.is_available() and not cpu._active
    logit_passes._kernels = lambda logits: None  # Triton's kernels have a test of their own
    torch._dynamo.config.disable = True  # nothing is compiled for a GPU that is not there
    cpu.replace_swiglu()
    _patch_cuda()
    cpu.backend = lambda: "gloo"
    tensor: Any = torch.Tensor
    tensor.device = property(_device)
    tensor.is_cuda = property(lambda self: self in marks)
    tensor.is_cpu = property(lambda self: self.device.type == "cpu")
    tensor.to, tensor.numpy, tensor.tolist, tensor.type = _to, _numpy, _tolist, _type
    tensor.cpu = lambda self, *args, **kwargs: _moved(self, there=False)
    tensor.cuda = lambda self, *args, **kwargs: _moved(self, there=True)
    tensor.pin_memory = lambda self, *args: self
    # a class of tensors that another library brings: autograd would ask the device that it names for its stream
    wrapper = tensor._make_wrapper_subclass
    tensor._make_wrapper_subclass = staticmethod(lambda *args, **kwargs: _make(wrapper, args, kwargs))
    plain_generator = torch.Generator
    torch.Generator = lambda device="cpu": _Generator() if _is_cuda(device) else plain_generator(device)  # type: ignore
    logging.disable(logging.WARNING)  # Megatron's: the GPU's generator is the CPU's
    torch.utils._device._device_constructors()  # made of the originals
    for name in _FACTORIES:
        # modes are off while a function of Python that they have seen runs, backward passes among them
        plain = getattr(torch, name)
        setattr(torch, name, functools.wraps(plain)(lambda *args, _plain=plain, **kwargs: _make(_plain, args, kwargs)))
    _Functions().__enter__()
    _Operations().__enter__()
