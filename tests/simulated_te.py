"""Transformer Engine 2.18 on a simulated GPU: its own Python, modules, recipes and optimizer, with kernels in PyTorch.

What is replaced is what its library computes: matrix products, RMSNorm, casts to FP8, scale updates, Adam. FP8 numbers
are real ones (`torch.float8_*`), rounded as on a GPU, and a product refuses operands without the copy, row-wise or
column-wise, that Hopper's kernels read. Attention is Transformer Engine's unfused one.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests import bare_te

bare_te.load()

import transformer_engine_torch as tex  # type: ignore[import-not-found]  # noqa: E402
from transformer_engine.pytorch.constants import TE_DType  # type: ignore[import-not-found]  # noqa: E402
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import (  # type: ignore[import-not-found]  # noqa: E402
    Float8BlockQuantizer,
    Float8BlockwiseQTensor,
)
from transformer_engine.pytorch.tensor.float8_tensor import (  # type: ignore[import-not-found]  # noqa: E402
    Float8Quantizer,
    Float8Tensor,
)
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (  # type: ignore[import-not-found]  # noqa: E402
    Float8BlockwiseQTensorStorage,
)
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import (  # type: ignore[import-not-found]  # noqa: E402
    Float8TensorStorage,
)

from tests import preload, simulated_gpu  # noqa: E402, F401  # preload has Megatron, which sees Transformer Engine now

_DTYPES = {code: dtype for dtype, code in TE_DType.items()}
_FLOAT8 = {
    tex.DType.kFloat8E4M3: (torch.float8_e4m3fn, 448.0),
    tex.DType.kFloat8E5M2: (torch.float8_e5m2, 57344.0),
}
_BLOCK = 128


def _encode(x: Tensor, scale: Tensor, code: Any) -> Tensor:
    dtype, most = _FLOAT8[code]
    return (x.float() * scale).clamp(-most, most).to(dtype).view(torch.uint8)


def _turned(x: Tensor) -> Tensor:
    """[..., k] to [k, ...]."""
    return x.permute(-1, *range(x.dim() - 1)).contiguous()


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.size(-1))


def create_empty_quantized_tensor(quantizer: Any, shape: Any, dtype: torch.dtype, device: Any, _pinned: Any) -> Any:
    """A tensor without values yet, for what `quantizer` makes of one of `shape` and `dtype`."""
    in_blocks = isinstance(quantizer, Float8BlockQuantizer)
    parts: dict[str, Any] = {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    for side, wanted, dims in (
        ("rowwise", quantizer.rowwise_usage, shape),
        ("columnwise", quantizer.columnwise_usage, (shape[-1], *shape[:-1])),
    ):
        data = torch.empty(dims, dtype=torch.uint8, device=device) if wanted else None
        if in_blocks:
            scales = quantizer.get_scale_shape(shape, side == "columnwise")
            parts[f"{side}_data"] = data
            parts[f"{side}_scale_inv"] = torch.empty(scales, device=device) if wanted else None
        else:
            parts["data" if side == "rowwise" else "data_transpose"] = data
    if in_blocks:
        parts["is_2D_scaled"] = quantizer.block_scaling_dim == 2
    else:
        parts["fp8_scale_inv"] = torch.empty(1, device=device)
    if quantizer.internal:
        return (Float8BlockwiseQTensorStorage if in_blocks else Float8TensorStorage)(**parts, fake_dtype=dtype)
    kind = Float8BlockwiseQTensor if in_blocks else Float8Tensor
    return kind(shape=shape, dtype=dtype, device=device, **parts)


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """Cast `tensor` as `quantizer` says, into `output` if there is one; it keeps only the copies that are wanted."""
    assert noop is None
    if output is None:
        output = create_empty_quantized_tensor(quantizer, tensor.shape, tensor.dtype, "cuda", False)
    values = (_blocks if isinstance(quantizer, Float8BlockQuantizer) else _whole)(tensor, quantizer)
    for name, new in values.items():
        old = getattr(output, name)
        if old is None and new is not None:
            simulated_gpu.marks.add(new)
        setattr(output, name, new if old is None or new is None else old.copy_(new))
    output._fp8_dtype = quantizer.dtype
    if isinstance(output, Float8TensorStorage):
        output._transpose_invalid = output._transpose is None
    return output


def _whole(tensor: Tensor, quantizer: Any) -> dict[str, Tensor | None]:
    """Data of a tensor with one scale."""
    most = _FLOAT8[quantizer.dtype][1]
    amax = tensor.detach().float().abs().amax().view(1)
    if isinstance(quantizer, Float8Quantizer):  # the scale comes from earlier steps, the largest value goes to the next
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax.view_as(quantizer.amax)))
        scale = quantizer.scale.clone().view(1)
    else:
        if quantizer.with_amax_reduction:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        scale = torch.where(amax > 0, most / amax, 1.0)
    data = _encode(tensor, scale, quantizer.dtype)
    return {
        "_data": data if quantizer.rowwise_usage else None,
        "_transpose": _turned(data) if quantizer.columnwise_usage else None,
        "_scale_inv": 1 / scale,
    }


def _block_scales(x: Tensor, height: int, quantizer: Any) -> Tensor:
    """Scales [ceil(m / height), ceil(k / 128)] of the blocks of x [m, k]."""
    padded = F.pad(x.detach().float().abs(), (0, -x.size(1) % _BLOCK, 0, -x.size(0) % height))
    blocks = padded.view(padded.size(0) // height, height, -1, _BLOCK)
    amax = blocks.amax(dim=(1, 3)).clamp(min=quantizer.amax_epsilon)
    scales = torch.where(amax > 0, _FLOAT8[quantizer.dtype][1] / amax, 1.0)
    return torch.exp2(torch.floor(torch.log2(scales))) if quantizer.force_pow_2_scales else scales


def _spread(scales: Tensor, height: int, shape: torch.Size) -> Tensor:
    """A scale for each of the numbers [m, k]."""
    whole = scales.repeat_interleave(height, dim=0).repeat_interleave(_BLOCK, dim=1)
    return whole[: shape[0], : shape[1]]


def _padded_to_4(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.size(1) % 4))


def _blocks(tensor: Tensor, quantizer: Any) -> dict[str, Tensor | None]:
    """Data of a tensor with a scale for each block, of 128 numbers or of 128 times 128."""
    x, height = _rows(tensor), _BLOCK if quantizer.block_scaling_dim == 2 else 1
    values: dict[str, Tensor | None] = {}
    for side, wanted, y, shape in (
        ("rowwise", quantizer.rowwise_usage, x, tensor.shape),
        ("columnwise", quantizer.columnwise_usage, x.t(), (x.size(1), *tensor.shape[:-1])),
    ):
        data = stored = None
        if wanted:
            scales = _block_scales(y, height, quantizer)
            data = _encode(y, _spread(scales, height, y.shape), quantizer.dtype).view(shape)
            stored = _padded_to_4((1 / scales) if height > 1 else (1 / scales).t())
        values |= {f"_{side}_data": data, f"_{side}_scale_inv": stored}
    return values


def _float(x: Any, columnwise: bool) -> Tensor:
    """[m, k] float32 of an operand; of an FP8 one from the copy that the kernel reads."""
    if isinstance(x, Float8TensorStorage):
        data = x._transpose if columnwise else x._data
        assert data is not None and not (columnwise and x._transpose_invalid), "the kernel's copy is missing"
        values = data.view(_FLOAT8[x._fp8_dtype][0]).float() * x._scale_inv
        return values.reshape(values.size(0), -1).t() if columnwise else _rows(values)
    if isinstance(x, Float8BlockwiseQTensorStorage):
        data = x._columnwise_data if columnwise else x._rowwise_data
        inverse = x._columnwise_scale_inv if columnwise else x._rowwise_scale_inv
        assert data is not None and inverse is not None, "the kernel's copy is missing"
        data = data.reshape(data.size(0), -1) if columnwise else _rows(data)
        height = _BLOCK if x._is_2D_scaled else 1
        inverse = inverse if height > 1 else inverse.t()[: data.size(0)]
        values = data.view(_FLOAT8[x._fp8_dtype][0]).float() * _spread(inverse, height, data.shape)
        return values.t() if columnwise else values
    return _rows(x).float()


def generic_gemm(
    a, a_turned, b, b_turned, out, quantizer, out_dtype, bias, _bias_dtype, gelu, _gelu_in, grad, _work, _size,
    accumulate, _exact, **_,
):  # fmt: skip
    """op(b) @ op(a), and the bias or its gradient."""
    assert quantizer is None and not gelu
    left, right = _float(b, b_turned), _float(a, not a_turned)
    if not isinstance(a, Tensor) or isinstance(a, Float8TensorStorage | Float8BlockwiseQTensorStorage):
        assert all(size % 8 == 0 for size in (*left.shape, *right.shape)), "sizes that FP8 cannot compute"
    product = (left.t() if b_turned else left) @ (right.t() if a_turned else right)
    bias_gradient = left.sum(0).to(bias.dtype) if grad and bias is not None else None
    if bias is not None and not grad:
        product = product + bias.float()
    if out is None:
        shape = product.shape if b_turned else (*b.size()[:-1], product.size(1))
        return [
            product.to(_DTYPES[out_dtype] if out_dtype is not None else a.dtype).view(shape),
            bias_gradient,
            None,
            None,
        ]
    out.copy_(product.view_as(out) + out if accumulate else product.view_as(out))
    return [out, bias_gradient, None, None]


def rmsnorm_fwd(x, weight, eps, out, quantizer, dtype, _margin, zero_centered):
    """[norm, None, 1 / root mean square]."""
    inverse = torch.rsqrt(x.float().square().mean(-1) + eps)
    y = (x.float() * inverse[..., None] * (weight.float() + zero_centered)).to(_DTYPES.get(dtype, x.dtype))
    if quantizer is not None:
        return [quantize(y, quantizer, out), None, inverse]
    return [y if out is None else out.copy_(y), None, inverse]


def rmsnorm_bwd(grad, x, inverse, weight, _margin, zero_centered):
    """Gradients of input and weight."""
    normed, through = x.float() * inverse[..., None], grad.float() * (weight.float() + zero_centered)
    to_x = (through - normed * (through * normed).mean(-1, keepdim=True)) * inverse[..., None]
    return [to_x.to(x.dtype), _rows(grad.float() * normed).sum(0).to(weight.dtype)]


def convert_thd_to_bshd(x, starts, num, longest):
    """Packed sequences to padded ones."""
    out, ends = x.new_zeros((num, longest, *x.shape[1:])), starts.tolist()
    for i, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        out[i, : end - start] = x[start:end]
    return out


def convert_bshd_to_thd(x, starts, _num_tokens):
    """Padded sequences to packed ones."""
    ends = starts.tolist()
    return torch.cat([x[i, : end - start] for i, (start, end) in enumerate(zip(ends, ends[1:], strict=False))])


def update_scales(amaxes, histories, scales, algorithm, code, margin):
    """Delayed scaling: what was largest goes to the end of each history, the scale follows; unused ones stay."""
    sizes = [scale.numel() for scale in scales]
    history, scale = torch.cat(histories, dim=1), torch.cat(scales)
    last = torch.where(amaxes != 0, amaxes, history[0])
    rolled = torch.cat([history[1:], last[None]])
    amax = rolled.amax(0) if algorithm == "max" else last
    rolled[0] = 0
    torch._foreach_copy_(histories, torch.where(last != 0, rolled, history).split(sizes, dim=1))
    torch._foreach_copy_(scales, torch.where(last != 0, _FLOAT8[code][1] / amax / 2**margin, scale).split(sizes))


def multi_tensor_adam(_chunk, _flag, lists, lr, beta1, beta2, eps, step, mode, correct, decay):
    """AdamW on float32."""
    assert mode == 1 and correct
    for gradient, parameter, average, square in zip(*lists, strict=True):
        assert gradient.dtype == parameter.dtype == torch.float32
        average.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (square / (1 - beta2**step)).sqrt()
        parameter.sub_(lr * (average / (1 - beta1**step) / (root + eps) + decay * parameter))


def multi_tensor_scale(_chunk, _flag, lists, factor):
    """Second list = first list * factor."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


_KERNELS: dict[str, Any] = {
    "create_empty_quantized_tensor": create_empty_quantized_tensor,
    "quantize": quantize,
    "bgrad_quantize": lambda x, quantizer: [_rows(x.float()).sum(0).to(x.dtype), quantize(x, quantizer)],
    "fp8_transpose": lambda data, code, *, out=None: _turned(data) if out is None else out.copy_(_turned(data)),
    "fused_amax_and_scale_update_after_reduction": update_scales,
    "generic_gemm": generic_gemm,
    "rmsnorm_fwd": rmsnorm_fwd,
    "rmsnorm_bwd": rmsnorm_bwd,
    "convert_thd_to_bshd": convert_thd_to_bshd,
    "convert_bshd_to_thd": convert_bshd_to_thd,
    "multi_tensor_adam": multi_tensor_adam,
    "multi_tensor_scale": multi_tensor_scale,
    "multi_tensor_l2norm": lambda _, __, lists, each=False: (
        torch.stack([x.float().norm() for x in lists[0]]).norm()[None],
        None,
    ),
    "get_cudnn_version": lambda: 92000,
}
bare_te.KERNELS |= {name: simulated_gpu.kernel(name, function) for name, function in _KERNELS.items()}


def activate() -> None:
    """A simulated GPU, and Transformer Engine on it. There is no way back."""
    from megatron.core.models.common.language_module.language_module import LanguageModule

    for name in ("FUSED_ATTN", "FLASH_ATTN", "MASKED_SOFTMAX_FUSION", "TORCH_COMPILE"):
        os.environ[f"NVTE_{name}"] = "0"
    LanguageModule._set_attention_backend = lambda self: None  # it insists on the fused ones
    torch.version.cuda = torch.version.cuda or "13.0"  # PyTorch's build for CPUs names none
    simulated_gpu.activate()


if __name__ == "__main__":  # python -m tests.simulated_te recipes/quickstart.py precision=fp8_tensorwise
    activate()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
