"""Options of a plan and what it has to assume: the GPU's data sheet, lengths of prompts and responses, efficiencies."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_vopd.bounds import bounded
from nemo_vopd.config import Config

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


@dataclass
class Assumptions:
    """Everything a plan cannot know. Lengths are in tokens of the language model; images are counted apart."""

    full_image_tokens: int | None = bounded(None, at_least=1)
    """Mean of the full image; null: the most that data.full.max_pixels allows (large photographs are scaled to it)."""
    crop_image_tokens: int = bounded(256, at_least=1)
    """Mean of the crop; data.crop_pixels bounds it."""
    text_tokens: int = bounded(96, at_least=0)
    """Mean of the prompt beside its images: template and question."""
    longest_text_tokens: int = bounded(256, at_least=1)
    """The longest prompt beside its images: decides the largest microbatch."""
    response_tokens: int = bounded(256, at_least=1)
    """Mean response; rollout.max_response_length bounds it."""
    efficiency: float = bounded(0.35, above=0, at_most=1)
    """Share of the peak the language model reaches in both passes, tensor-parallel communication included."""
    vision_efficiency: float = bounded(0.25, above=0, at_most=1)
    """Share of the peak the vision tower reaches: narrow layers, norms and activations in eager PyTorch."""
    fp8_gain: float = bounded(1.4, above=0)
    """How much faster FP8 computes the products of the language layers than bf16, casts included."""
    bandwidth_efficiency: float = bounded(0.6, above=0, at_most=1)
    """Share of the memory bandwidth that decoding reaches."""
    decode_layer_seconds: float = bounded(3e-4, at_least=0)
    """Least time of one layer for one token of a batch, whatever its size: kernel launches and small all-reduces.

    One H100 took 6e-4 without CUDA graphs (docs/benchmarks.md).
    """
    network_bytes_per_second: float = bounded(40e9, above=0)
    """Each GPU's share of the network between nodes: gradients, weights and the teacher cross it once a step."""
    context_gib: float = bounded(1.5, at_least=0)
    """CUDA context and loaded kernels on each GPU."""
    reserve: float = bounded(0.06, at_least=0, at_most=1)
    """Share of the GPU's memory for NCCL's buffers, workspaces and what the allocator cannot use."""
    host_process_gib: float = bounded(6.0, at_least=0)
    """Host memory of each process before it holds any data: libraries, CUDA's host side, loader workers."""


@dataclass
class PlanConfig(Config):
    """A run's configuration and the machine it is planned for."""

    gpu: str = bounded("h100", one_of=tuple(GPUS))
    """h100 | h200 | a100, with 80, 141 and 80 GB"""
    gpus_per_node: int = bounded(8, at_least=1, suggest=8)
    assume: Assumptions = field(default_factory=Assumptions)

    @property
    def world_size(self) -> int:
        """Number of GPUs of the run."""
        return self.num_nodes * self.gpus_per_node
