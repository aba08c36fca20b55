"""What the fork server of `tests.distributed` imports once."""

import gc
import warnings

warnings.simplefilter("ignore")

import torch  # noqa: E402

torch.set_num_threads(1)

import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: E402, F401
import transformers.models.qwen3_vl.modeling_qwen3_vl  # noqa: E402, F401

import nemo_vopd.training.run  # noqa: E402, F401

gc.freeze()  # collections in the forked processes pass over all that, and do not write to the pages they share
