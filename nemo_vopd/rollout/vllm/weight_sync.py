"""How vLLM servers get the student's weights after an optimizer step: through a folder, or over NCCL."""

from __future__ import annotations

import base64
import contextlib
import functools
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.cuda import nccl

from nemo_vopd.errors import OptionError, RunError
from nemo_vopd.rollout.vllm.server import Client

_PREFIX = "weights-"
_CHUNK_BYTES = 2**28
"""Size of the tensors that one request announces."""
_ROUND_SECONDS = 60.0
"""Ranks that are done wait for others so long at a time: one long wait would exceed the time limit of the groups."""


def together[AnyT](action: Callable[[], AnyT]) -> AnyT:
    """The result of `action` on this rank; every rank of the run calls it, and all raise what one of them raises.

    OptionError and RunError travel; a rank that went on alone would wait for the others without end. `action` runs in
    a thread of its own and may take any time, but no part in communication between the ranks.
    """
    pool = ThreadPoolExecutor(1)
    under_way = pool.submit(action)
    pool.shutdown(wait=False)  # not waited for when another rank has failed
    return finish_together(under_way)


def finish_together[AnyT](under_way: Future[AnyT]) -> AnyT:
    """The result of `under_way`; see `together`."""
    while True:
        done = bool(wait([under_way], _ROUND_SECONDS).done)
        if agree(under_way.exception() if done else None, done):
            return under_way.result()


def agree(failure: BaseException | None, done: bool = True) -> bool:
    """Whether all ranks are done; every rank of the run calls it, and all raise the first `failure`."""
    if failure is not None and not isinstance(failure, (OptionError, RunError)):
        raise failure  # a defect: let it be seen where it is
    ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (failure, done))
    if failure := failure or next((other for other, _ in ranks if other is not None), None):
        raise failure
    return all(rank_done for _, rank_done in ranks)


class FolderSync:
    """Weights through a folder on storage that all ranks and servers share, on any device."""

    def __init__(
        self,
        urls: list[str],
        folder: Path,
        write: Callable[[Path], None],
        timeout_seconds: float,
        key: str | None = None,
    ) -> None:
        """`write` makes the Hugging Face directory it is given, called by all ranks together.

        `folder` belongs to this run alone: other weights in it are removed. `key` is that of the servers.
        """
        self.clients = [Client(url, timeout_seconds=timeout_seconds, retries=1, key=key) for url in urls]
        self.folder, self.write = folder.resolve(), write

    def __call__(self) -> None:
        """Write the weights, have every server read them, remove them. Raises EngineLost on every rank."""
        name = [f"{_PREFIX}{time.time_ns()}"]
        dist.broadcast_object_list(name, src=0)
        new = self.folder / name[0]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write(new)
        together(lambda: self._load(new) if dist.get_rank() == 0 else None)

    def _load(self, new: Path) -> None:
        _at_all(self.clients, lambda client: client.reload(new))
        for read in self.folder.glob(f"{_PREFIX}*"):  # also what an interrupted run left
            shutil.rmtree(read, ignore_errors=True)


class NCCLSync:
    """Weights through vLLM's NCCL weight transfer, tensor by tensor: written by the interface of vLLM 0.32, NOT TESTED.

    No machine of this project's tests has a GPU for each side. Servers need --weight-transfer-config
    '{"backend": "nccl"}'. The first rank of the run collects the stages' tensors and sends them to all workers.
    """

    def __init__(
        self,
        urls: list[str],
        tensors: Callable[[], Iterator[tuple[str, Tensor]]],
        groups: ProcessGroupCollection,
        timeout_seconds: float,
        key: str | None = None,
    ) -> None:
        """`tensors` yields this stage's whole tensors by the names of the Hugging Face files on its tensor group.

        `key` is that of the servers. Raises OptionError without a GPU.
        """
        if not torch.cuda.is_available():
            remedy = "set rollout.vllm.sync=folder"
            raise OptionError("rollout.vllm.sync", "nccl", "needs NVIDIA GPUs on both sides", remedy)
        self.clients = [Client(url, timeout_seconds=timeout_seconds, retries=0, key=key) for url in urls]
        self.tensors, self.groups = tensors, groups
        self._communicator: Any = None

    def __call__(self) -> None:
        """Send the weights to every server. Raises EngineLost on every rank."""
        arriving, failure = to_first_rank(self.tensors, self.groups), None
        try:
            if dist.get_rank() == 0:
                self._send(arriving)
        except RunError as error:
            failure = error
        for _ in arriving:  # the stages wait for someone to take what is left
            pass
        agree(failure)

    def _send(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        _at_all(self.clients, Client.check)
        self._communicator = self._communicator or self._connect()
        _at_all(self.clients, lambda client: client.post("/start_weight_update"))
        for chunk in _chunks(tensors):
            info = {
                "names": [name for name, _ in chunk],
                "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in chunk],
                "shapes": [list(tensor.shape) for _, tensor in chunk],
            }
            receive = functools.partial(Client.post, path="/update_weights", body={"update_info": info})
            with _meanwhile(self.clients, receive):
                for _, tensor in chunk:
                    nccl.broadcast([tensor.cuda().contiguous()], comms=[self._communicator])
                torch.cuda.synchronize()
        _at_all(self.clients, lambda client: client.post("/finish_weight_update"))
        _at_all(self.clients, lambda client: client.reset_caches())

    def _connect(self) -> Any:
        """A communicator of this rank, number 0, and all workers of all servers."""
        sizes = [client.get("/get_world_size", read=lambda answer: answer["world_size"]) for client in self.clients]
        offsets, world = list(itertools.accumulate(sizes, initial=1)), 1 + sum(sizes)
        unique_id = nccl.unique_id()
        shared = {"world_size": world, "nccl_unique_id_b64": base64.b64encode(unique_id).decode()}

        def join(client: Client) -> None:
            offset = offsets[self.clients.index(client)]
            client.post("/init_weight_transfer_engine", {"init_info": {**shared, "rank_offset": offset}})

        with _meanwhile(self.clients, join):
            communicator = nccl.init_rank(world, unique_id, 0)
            nccl.all_reduce([torch.zeros(1, device="cuda")], comms=[communicator])  # workers begin with one
        return communicator


def to_first_rank(
    tensors: Callable[[], Iterator[tuple[str, Tensor]]], groups: ProcessGroupCollection
) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of all pipeline stages, one after the other, on the first rank of the run.

    Every rank must exhaust it; on the others it yields nothing. `tensors` is called by the ranks of the first
    data-parallel replica.
    """
    tp, pp = groups.tp, groups.pp
    if groups.dp_cp.rank() > 0:
        return
    for stage in range(pp.size()):
        if stage == pp.rank():
            for name, tensor in tensors():
                if tp.rank() > 0:  # took part in gathering it
                    continue
                if stage == 0:
                    yield name, tensor
                else:
                    dist.send_object_list([(name, tensor.shape, tensor.dtype)], group=pp, group_dst=0)
                    dist.send(_on_device(tensor), group=pp, group_dst=0)
            if stage > 0 and tp.rank() == 0:
                dist.send_object_list([None], group=pp, group_dst=0)
        elif pp.rank() == 0 and tp.rank() == 0:
            yield from _from_stage(stage, pp)


def _from_stage(stage: int, pp: dist.ProcessGroup) -> Iterator[tuple[str, Tensor]]:
    while True:
        announced: list = [None]
        dist.recv_object_list(announced, group=pp, group_src=stage)
        if announced[0] is None:
            return
        name, shape, dtype = announced[0]
        tensor = _on_device(torch.empty(shape, dtype=dtype))
        dist.recv(tensor, group=pp, group_src=stage)
        yield name, tensor


def _on_device(tensor: Tensor) -> Tensor:
    return (tensor.cuda() if torch.cuda.is_available() else tensor).contiguous()


def _chunks(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    chunk: list[tuple[str, Tensor]] = []
    for name, tensor in tensors:
        chunk.append((name, tensor))
        if sum(t.numel() * t.element_size() for _, t in chunk) >= _CHUNK_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _at_all(clients: list[Client], request: Callable[[Client], Any]) -> None:
    with ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(request, clients))


@contextlib.contextmanager
def _meanwhile(clients: list[Client], request: Callable[[Client], Any]) -> Iterator[None]:
    """Have `request` under way at all servers while the body runs."""
    pool = ThreadPoolExecutor(len(clients))
    sent = [pool.submit(request, client) for client in clients]
    try:
        yield
        for answer in sent:
            answer.result()
    finally:
        pool.shutdown(wait=False)  # a worker that waits for a broadcast which failed never answers
