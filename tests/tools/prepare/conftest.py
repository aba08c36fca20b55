"""The model and data set of tests/data."""

from tests.data.conftest import data_config, dataset, digits, processor, tiny_model  # noqa: F401
