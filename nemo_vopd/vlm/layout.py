"""How a model is divided over tensor- and pipeline-parallel ranks, and whether it can be."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_vopd.config import ParallelConfig
from nemo_vopd.errors import OptionError


@dataclass(frozen=True)
class ModelShape:
    """What a layout has to divide."""

    num_layers: int
    num_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    vocab_size: int
    layer_parameters: int
    vision_parameters: int
    head_parameters: int
    num_first_layers: int = 1
    """Layers that stay beside the vision tower, in the first chunk of the first pipeline stage."""


def check_layout(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Raise OptionError when `parallel` cannot divide a model of this `shape`."""
    for what, size in (
        ("attention heads", shape.num_heads),
        ("key-value heads", shape.num_query_groups),
        ("feed-forward columns", shape.ffn_hidden_size),
    ):
        if size % parallel.tensor:
            fits = [k for k in range(1, shape.num_query_groups + 1) if size % k == 0 and shape.num_heads % k == 0]
            raise OptionError("parallel.tensor", parallel.tensor, f"must divide the {size} {what}", _use(fits))
    layers, given = shape.num_layers, parallel.pipeline_layout
    stages = parallel.pipeline * parallel.virtual_pipeline
    times = f"times parallel.virtual_pipeline={parallel.virtual_pipeline} " if parallel.virtual_pipeline > 1 else ""
    first = shape.num_first_layers
    together = f", of which the first {first} stay together" if first > 1 else ""
    most = layers - first + 1
    if stages > most:
        rule = f"{times}exceeds the {layers} language layers{together}"
        raise OptionError("parallel.pipeline", parallel.pipeline, rule, f"use {most} stages and chunks or less")
    suggestion = f"parallel.pipeline_layout={balanced_layout(shape, stages, parallel.tensor)}".replace(" ", "")
    if given is None:
        if layers % stages:
            rule = f"{times}does not divide the {layers} language layers"
            remedy = f"say how many each stage gets, {suggestion}"
            raise OptionError("parallel.pipeline", parallel.pipeline, rule, remedy)
        if layers // stages < first:
            rule = f"{times}gives the first chunk {layers // stages} of the {layers} language layers{together}"
            remedy = f"say how many each stage gets, {suggestion}"
            raise OptionError("parallel.pipeline", parallel.pipeline, rule, remedy)
    elif len(given) != stages or sum(given) != layers or min(given) < 1 or given[0] < first:
        rule = f"must name {stages} stages of at least 1 layer that add up to {layers}{together}"
        raise OptionError("parallel.pipeline_layout", str(given).replace(" ", ""), rule, f"use {suggestion}")


def balanced_layout(shape: ModelShape, num_stages: int, tensor: int = 1) -> list[int]:
    """Language layers of each stage so that the heaviest stage is as light as possible.

    Cost is parameters times the positions they see: the tower sees four patches for each image token that reaches
    the language model, and each of `tensor` ranks runs all of it; the head is charged once (it sees response rows
    only, but of student and teacher).
    """
    cost = [0.0] * num_stages
    cost[0] += 4 * tensor * shape.vision_parameters / shape.layer_parameters
    cost[-1] += shape.head_parameters / shape.layer_parameters
    layers = [shape.num_first_layers] + [1] * (num_stages - 1)
    for _ in range(shape.num_layers - sum(layers)):
        lightest = min(range(num_stages), key=lambda stage: cost[stage] + layers[stage])
        layers[lightest] += 1
    return layers


def megatron_layout(layers: list[int]) -> list[list[str]]:
    """`TransformerConfig.pipeline_model_parallel_layout` of `layers` for each stage."""
    stages = [["decoder"] * num for num in layers]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding and the head that `tensor` ranks share evenly: `vocab_size` where it divides, else more."""
    if vocab_size % tensor == 0:
        return vocab_size
    multiple = 16 * tensor  # and whole tiles of tensor cores on every rank
    return -(-vocab_size // multiple) * multiple


def _use(fits: list[int]) -> str:
    return f"use {' or '.join(map(str, fits))}"
