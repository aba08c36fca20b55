"""Shared by all tests: one thread for each process, a tiny model and data set made once."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def assets(tmp_path_factory) -> Path:
    """A folder with tiny-vlm and tiny-digits, as `--config-name tiny` makes them."""
    from nemo_vopd.tools.prepare.tiny_model import ensure_tiny_assets

    folder = tmp_path_factory.mktemp("assets")
    ensure_tiny_assets(folder / "tiny-vlm", folder / "tiny-digits")
    return folder


@pytest.fixture
def groups():
    """Process groups of a single-process run, taken down afterwards."""
    from nemo_vopd.config import ParallelConfig
    from nemo_vopd.mcore import parallel

    yield parallel.initialize(ParallelConfig(), seed=1)
    parallel.destroy()
