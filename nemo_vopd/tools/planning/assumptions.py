"""What a plan has to assume: the GPU's data sheet, lengths of prompts and responses, and efficiencies."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_vopd.errors import OptionError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures of one GPU."""

    name: str
    memory_bytes: int
    """What the driver leaves to programs."""
    flops: dict[str, float]
    """Dense peak, operations per second, by number format."""
    bandwidth: float
    """Bytes per second of its memory."""


_H100_FLOPS = {"fp32": 67e12, "bf16": 989e12, "fp8": 1979e12}
GPUS = {
    "h100": Gpu("H100 80GB SXM", int(79.1 * GIB), _H100_FLOPS, 3.35e12),
    "h200": Gpu("H200 141GB SXM", int(139.8 * GIB), _H100_FLOPS, 4.8e12),
    "a100": Gpu("A100 80GB SXM", int(79.1 * GIB), {"fp32": 19.5e12, "bf16": 312e12}, 2.0e12),
}
"""Values of the option `gpu`."""


def gpu_named(name: str) -> Gpu:
    """The figures of `name`. Raises OptionError when it is not known."""
    if name not in GPUS:
        raise OptionError("gpu", name, f"must be one of {', '.join(GPUS)}", "set gpu=h100")
    return GPUS[name]


@dataclass
class Assumptions:
    """Everything a plan cannot know. Lengths are in tokens of the language model; images are counted apart."""

    full_image_tokens: int | None = None
    """Mean of the full image; null: the most that data.full.max_pixels allows (large photographs are scaled to it)."""
    crop_image_tokens: int = 256
    """Mean of the crop; data.crop_pixels bounds it."""
    text_tokens: int = 96
    """Mean of the prompt beside its images: template and question."""
    longest_text_tokens: int = 256
    """The longest prompt beside its images: decides the largest microbatch."""
    response_tokens: int = 256
    """Mean response; rollout.max_response_length bounds it."""
    efficiency: float = 0.35
    """Share of the peak the language model reaches in both passes, tensor-parallel communication included."""
    vision_efficiency: float = 0.25
    """Share of the peak the vision tower reaches: narrow layers, norms and activations in eager PyTorch."""
    fp8_gain: float = 1.4
    """How much faster FP8 computes the products of the language layers than bf16, casts included."""
    bandwidth_efficiency: float = 0.6
    """Share of the memory bandwidth that decoding reaches."""
    decode_layer_seconds: float = 3e-4
    """Least time of one layer for one token of a batch, whatever its size: kernel launches and small all-reduces.

    One H100 took 6e-4 without CUDA graphs (docs/benchmarks.md).
    """
    network_bytes_per_second: float = 40e9
    """Each GPU's share of the network between nodes: gradients, weights and the teacher cross it once a step."""
    context_gib: float = 1.5
    """CUDA context and loaded kernels on each GPU."""
    reserve: float = 0.06
    """Share of the GPU's memory for NCCL's buffers, workspaces and what the allocator cannot use."""
    host_process_gib: float = 6.0
    """Host memory of each process before it holds any data: libraries, CUDA's host side, loader workers."""


def check_assumptions(assume: Assumptions, gpus_per_node: int) -> None:
    """Raise OptionError for values out of range."""
    for name, value in vars(assume).items():
        positive = name not in ("reserve", "context_gib", "host_process_gib", "decode_layer_seconds", "text_tokens")
        if value is not None and (value <= 0 if positive else value < 0):
            bound = "must be positive" if positive else "must not be negative"
            raise OptionError(f"assume.{name}", value, bound, "leave it out for the default")
        if (name.endswith("efficiency") or name == "reserve") and value is not None and value > 1:
            raise OptionError(f"assume.{name}", value, "is a share of one", "set it between 0 and 1")
    if gpus_per_node < 1:
        raise OptionError("gpus_per_node", gpus_per_node, "must be at least 1", "set gpus_per_node=8")
