"""One tiny model and one small prepared data set for the whole folder."""

import pytest

from nemo_vopd.config import DataConfig, PixelConfig
from nemo_vopd.data.processor import Processor
from nemo_vopd.tools.prepare.prepare import prepare
from nemo_vopd.tools.prepare.synthetic import write_digits
from nemo_vopd.tools.prepare.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_model(path, seed=5)
    return path


@pytest.fixture(scope="session")
def processor(tiny_model):
    return Processor.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits") / "raw"
    write_digits(path, num_samples=96, seed=11, close_up_fraction=0.25)
    return path


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, digits):
    path = tmp_path_factory.mktemp("energon") / "digits"
    prepare(digits / "data.jsonl", path, shard_size=20, workers=1, progress=False)
    return path


@pytest.fixture
def data_config(dataset):
    return DataConfig(
        path=str(dataset),
        batch_size=8,
        max_prompt_length=128,
        full=PixelConfig(3136, 12544),
        crop_pixels=PixelConfig(3136, 3136),
        num_workers=0,
    )
