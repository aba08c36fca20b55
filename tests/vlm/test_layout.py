"""Layouts: what divides, what is refused, and how layers are balanced beside the vision tower."""

import dataclasses

import pytest

from nemo_vopd.config import ParallelConfig
from nemo_vopd.errors import OptionError
from nemo_vopd.vlm.layout import ModelShape, balanced_layout, check_layout, megatron_layout

# Qwen2.5-VL-72B, in millions of parameters
SHAPE = ModelShape(80, 64, 8, 29568, 152064, 878, 657, 1246)


def test_layouts_that_divide_pass():
    for parallel in (
        ParallelConfig(tensor=8, pipeline=4),
        ParallelConfig(pipeline=3, pipeline_layout=[20, 30, 30]),
        ParallelConfig(pipeline=4, virtual_pipeline=5),
    ):
        check_layout(SHAPE, parallel)


@pytest.mark.parametrize(
    "parallel,message",
    [
        (ParallelConfig(tensor=3), "parallel.tensor=3: must divide the 64 attention heads; use 1 or 2 or 4 or 8"),
        (ParallelConfig(tensor=16), "parallel.tensor=16: must divide the 8 key-value heads; use 1 or 2 or 4 or 8"),
        (ParallelConfig(pipeline=3), r"parallel.pipeline=3: does not divide the 80 .*pipeline_layout=\[25,28,27\]"),
        (ParallelConfig(pipeline=81), "parallel.pipeline=81: exceeds the 80 language layers"),
        (ParallelConfig(pipeline=4, virtual_pipeline=3), "times parallel.virtual_pipeline=3 does not divide the 80"),
        (ParallelConfig(pipeline=2, pipeline_layout=[40, 30]), r"pipeline_layout=\[40,30\]: must name 2 stages"),
        (ParallelConfig(pipeline=2, pipeline_layout=[80, 0]), "at least 1 layer"),
    ],
)
def test_refusals_name_a_remedy_that_works(parallel, message):
    with pytest.raises(OptionError, match=message):
        check_layout(SHAPE, parallel)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8, 16])
def test_no_stage_could_give_a_layer_away(stages):
    layers = balanced_layout(SHAPE, stages)
    cost = [float(n) for n in layers]
    cost[0] += 4 * SHAPE.vision_parameters / SHAPE.layer_parameters
    cost[-1] += SHAPE.head_parameters / SHAPE.layer_parameters
    assert sum(layers) == 80 and max(cost) <= min(cost) + 1 + 1e-9
    check_layout(SHAPE, ParallelConfig(pipeline=stages, pipeline_layout=layers))


@pytest.mark.parametrize("stages", [2, 4, 26, 78])
def test_layers_that_belong_beside_the_tower_stay_there(stages):
    shape = dataclasses.replace(SHAPE, num_first_layers=3)
    layers = balanced_layout(shape, stages)
    assert sum(layers) == 80 and layers[0] >= 3
    check_layout(shape, ParallelConfig(pipeline=stages, pipeline_layout=layers))
    with pytest.raises(OptionError, match="of which the first 3 stay together; use 78 stages and chunks"):
        check_layout(shape, ParallelConfig(pipeline=79))


def test_megatron_reads_the_layout():
    assert megatron_layout([1, 2]) == [["embedding", "decoder"], ["decoder", "decoder", "loss"]]
