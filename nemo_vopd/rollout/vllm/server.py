"""One vLLM server: started and ended with the run, and asked over HTTP."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import hmac
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_vopd.errors import EngineLost, OptionError, RunError, printable
from nemo_vopd.http import JSONClient, RequestFailed

_SCRIPT = Path(__file__).with_name("serve.py")
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "NCCL_ASYNC", "PYTHONPATH")
"""Beginnings of the variables that tell a rank of the run its place; vLLM would take them for its own."""
_AGAIN = "look into the server's log, start it again if this run did not, and resume the run"


class Stranger(EngineLost):
    """What answers at the address does not have the server's key."""


class Client:
    """Asks the server at one address; what may be a passing fault is tried again."""

    def __init__(
        self, url: str, *, timeout_seconds: float, retries: int, pause_seconds: float = 1.0, key: str | None = None
    ) -> None:
        """`url` as in http://host:8000, reached without a proxy; the other arguments are those of `JSONClient`."""
        self.timeout_seconds, self._key = timeout_seconds, key
        # servers of a cluster are not reached through its way to the outside
        self._with_key, self._without_key = (
            JSONClient(url, timeout_seconds=timeout_seconds, retries=retries, pause_seconds=pause_seconds, key=sent)
            for sent in (key, None)
        )
        self.url = self._with_key.url

    def get(self, path: str, read: Callable[[Any], Any] = lambda answer: answer, **options: Any) -> Any:
        """What `read` makes of the server's JSON answer; see `post`."""
        return self._call(path, None, read, **options)

    def post(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        read: Callable[[Any], Any] = lambda answer: answer,
        **options: Any,
    ) -> Any:
        """What `read` makes of the server's JSON answer to `body`, None if it is empty.

        `options` are those of `JSONClient.call`. Raises EngineLost when it fails `retries` + 1 times or when `read`
        raises what an unexpected answer makes it raise, RunError when the server refuses the request.
        """
        return self._call(path, body or {}, read, **options)

    def check(self) -> None:
        """Raise EngineLost unless the server is well, Stranger unless it proves that it has the key, if there is one.

        The key itself goes only to a server that has it.
        """
        seconds = min(self.timeout_seconds, 30.0)
        if self._key:
            challenge = secrets.token_hex(16)
            try:
                proof = self._without_key.call(f"/prove_key?{challenge}", timeout=seconds)
            except RequestFailed as failed:
                if failed.status is None:
                    raise self._lost("/prove_key", failed) from None
                proof = None
            if proof != hmac.new(self._key.encode(), challenge.encode(), hashlib.sha256).hexdigest():
                raise Stranger(
                    f"what answers at {self.url} does not prove that it has the key VLLM_API_KEY: it has another one, "
                    "or was not started with nemo_vopd/rollout/vllm/serve.py, or is no server of this run"
                )
        self.get("/health", timeout=seconds)

    def reset_caches(self) -> None:
        """Forget everything that was computed with weights before: prompts, image features, preprocessed images."""
        for path in ("/reset_mm_cache", "/reset_encoder_cache"):
            self.post(path)
        for attempt in range(10):  # blocks may be held for a moment after the last response
            path = "/reset_prefix_cache?reset_running_requests=true"
            if self.post(path, read=lambda answer: answer["success"] is True):
                return
            time.sleep(0.1 * attempt)
        raise RunError(f"vLLM at {self.url} does not forget the prompts of the weights before: other clients use it")

    def reload(self, folder: Path) -> None:
        """Take the weights of the Hugging Face directory `folder`, and forget what came of those before."""
        self.check()
        self.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        self.reset_caches()

    def require_log_probs(self, mode: str) -> None:
        """Raise OptionError unless the server's log-probs are of the kind `mode`."""
        self.check()
        path = "/server_info?config_format=json"
        found = self.get(path, read=lambda answer: answer["vllm_config"]["model_config"]["logprobs_mode"])
        if found != mode:
            rule = f"the server's log-probs are {found}, rollout.temperature asks for {mode}"
            raise OptionError("rollout.vllm.urls", self.url, rule, f"start it with --logprobs-mode {mode}")

    def _call(self, path: str, body: dict[str, Any] | None, read: Callable[[Any], Any], **options: Any) -> Any:
        try:
            return read(self._with_key.call(path, body, **options))
        except RequestFailed as failed:
            code = failed.status
            if code is not None and not failed.may_pass:
                raise RunError(f"vLLM at {self.url} refuses {path} ({_reason(failed)}); {_remedy(code)}") from None
            raise self._lost(path, failed) from None
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            what = f"sent a wrong answer to {path} ({printable(reason)[:300]})"
            raise EngineLost(f"vLLM at {self.url} is lost: it {what}; {_AGAIN}") from None

    def _lost(self, path: str, failed: RequestFailed) -> EngineLost:
        what = f"{path} failed {failed.attempts} times ({_reason(failed)})"
        return EngineLost(f"vLLM at {self.url} is lost: {what}; {_AGAIN}")


def _reason(failed: RequestFailed) -> str:
    code = failed.status
    return failed.message if code is None or code < 300 else f"HTTP {code}, {failed.message}"


def _remedy(code: int) -> str:
    if code < 400:
        return "it is no server of vLLM; correct rollout.vllm.urls"
    if code == 401:
        return "give this run the server's key in the environment variable VLLM_API_KEY"
    if code in (403, 404):
        return "start it with nemo_vopd/rollout/vllm/serve.py, or with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out"
    return "change its arguments (rollout.vllm.arguments if this run starts it) or the rollout options"


class Server:
    """A server that this process started, and that ends with it."""

    def __init__(self, process: subprocess.Popen, url: str, key: str, log_file: Path) -> None:
        """Use `start_server`."""
        self.process, self.url, self.key, self.log_file = process, url, key, log_file
        atexit.register(self.stop)

    def stop(self, seconds: float = 10.0) -> None:
        """End the server and what it started; it has `seconds` to do so by itself."""
        atexit.unregister(self.stop)
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)  # its own group, by its own id
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)

    def last_lines(self, count: int = 3) -> str:
        """The end of the log, on one line."""
        lines = [line.strip() for line in self.log_file.read_text(errors="replace").splitlines() if line.strip()]
        return printable(" | ".join(lines[-count:]))


def start_server(
    python: str | Path,
    model_dir: str | Path,
    arguments: list[str],
    log_file: Path,
    *,
    port: int = 0,
    start_seconds: float = 600.0,
    environment: dict[str, str] | None = None,
) -> Server:
    """Serve `model_dir` with the interpreter `python` of vLLM's environment, and wait until it answers.

    The server ends when this process does, however that ends. It listens on this machine only, at `port` or at a free
    one, and has a key of its own, which stands in its environment because everyone can read its command line.
    `arguments` are options of `vllm serve`, `environment` adds variables. Raises OptionError when there is no such
    interpreter or the port is taken, RunError when the server ends, another program takes the port meanwhile, or
    nothing answers within `start_seconds`.
    """
    if not Path(python).is_file():
        raise OptionError("rollout.vllm.python", python, "is not a file", "give the interpreter of vLLM's environment")
    port = _free_port(port)
    url, key = f"http://127.0.0.1:{port}", secrets.token_hex(32)
    command = [str(python), str(_SCRIPT), "--model", str(model_dir), "--host", "127.0.0.1", "--port", str(port)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER)}
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    parent = str(os.getpid())
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--enable-scale-out", *arguments],
            env={**inherited, **settings, **(environment or {}), "NEMO_VOPD_PARENT": parent, "VLLM_API_KEY": key},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(process, url, key, log_file)
    print(f"starting vLLM at {url}, its log is {log_file}", flush=True)
    begin = time.monotonic()
    client = Client(url, timeout_seconds=5.0, retries=0, key=key)
    while True:
        if process.poll() is not None:
            server.stop()  # what it started may still be there
            raise RunError(f"vLLM ended with code {process.returncode} while it started: {server.last_lines()}")
        try:
            client.check()
            break
        except Stranger:
            server.stop()
            remedy = "give the command again, with another rollout.vllm.port if this one is named"
            raise RunError(f"another program answers at {url}, where vLLM was to listen; {remedy}") from None
        except EngineLost:
            pass
        if time.monotonic() - begin > start_seconds:
            server.stop()
            raise RunError(
                f"vLLM did not answer within {start_seconds:.0f} s: {server.last_lines()}; "
                f"look into {log_file} or raise rollout.vllm.start_seconds"
            )
        time.sleep(0.5)
    print(f"vLLM answers after {time.monotonic() - begin:.0f} s", flush=True)
    return server


def _free_port(port: int) -> int:
    """`port`, or any when it is 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            remedy = "name another, or 0 for any"
            raise OptionError("rollout.vllm.port", port, f"cannot be used ({error.strerror})", remedy) from None
        return probe.getsockname()[1]
