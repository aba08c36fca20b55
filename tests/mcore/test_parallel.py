"""Process groups of a layout."""

import datetime

import torch
import torch.distributed as dist

from nemo_vopd.mcore import parallel
from tests.distributed import run_distributed
from tests.helpers import tiny_config


def timeouts(config):
    """How long each process group of this rank waits, and the size of the largest beside the world."""
    parallel.initialize(config.parallel, seed=1)
    groups = list(dist.distributed_c10d._world.pg_map)
    sizes = [group.size() for group in groups if group != dist.group.WORLD]
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups], max(sizes)


def test_every_group_waits_as_long_as_the_option_says(assets, tmp_path):
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.pipeline_layout=[1,2]"]
    for option, minutes in (([], 10), (["parallel.timeout_minutes=3"], 3)):
        for found, largest in run_distributed(timeouts, 4, tiny_config(assets, tmp_path, *layout, *option)):
            assert len(found) > 5 and largest == 4 and set(found) == {datetime.timedelta(minutes=minutes)}
