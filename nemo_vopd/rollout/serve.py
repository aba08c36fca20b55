"""vLLM's OpenAI API server, as a script inside vLLM's own environment: `python serve.py MODEL_DIR [vllm options]`.

The only file that imports vllm, and it imports nothing of this package: the two environments share no library.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import sys
from pathlib import Path

# started as a script, Python puts this folder first, whose vllm.py would be taken for vLLM
_HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != _HERE]

_BOX, _POOL = "Tensor input, Tensor rois, float spatial_scale", "int pooled_height, int pooled_width"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
