"""What `--config-name tiny` runs on, made on first use."""

from __future__ import annotations

import tempfile
from pathlib import Path

from nemo_vopd.errors import OptionError
from nemo_vopd.tools.prepare.prepare import prepare
from nemo_vopd.tools.prepare.synthetic import write_digits
from nemo_vopd.tools.prepare.tiny_model import write_tiny_model

TINY_MODEL, TINY_DATA = "tiny-vlm", "tiny-digits"
"""Last part of the paths in conf/model/tiny.yaml and conf/data/tiny.yaml; other paths are the user's own."""
NUM_SAMPLES = 256
_SEED = 1


def ensure_tiny_assets(hf_path: Path, data_path: Path) -> None:
    """Make the tiny model and the tiny data set where they are missing and the paths bear the tiny run's names.

    Deterministic, and safe for concurrent processes: each writes under a temporary name, the first rename wins and
    the others use its result. What exists is left as it is. Raises OptionError when a place cannot be written.
    """
    hf_path, data_path = Path(hf_path), Path(data_path)
    if hf_path.name == TINY_MODEL and not hf_path.exists():
        try:
            write_tiny_model(hf_path, seed=_SEED)
        except OptionError:
            if not hf_path.exists():
                raise
    if data_path.name == TINY_DATA and not data_path.exists():
        _write_data(data_path)


def _write_data(data_path: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        digits = Path(scratch) / "digits"
        write_digits(digits, num_samples=NUM_SAMPLES, seed=_SEED)
        try:
            prepare(digits / "data.jsonl", data_path, workers=1, progress=False)
        except OptionError:
            if not data_path.exists():
                raise
