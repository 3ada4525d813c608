"""Saves in a process beside the worker: none of a save's Python holds up the steps.

    worker: copies into shared memory, `SaveRequest` → this process: torch.distributed.checkpoint with the other
    workers' processes, commit → its end, or its error, back to the worker

The processes of all ranks have a gloo group of their own, which meets at the store of the training's group: no port
listens that did not before. One that ends takes its worker's save with it, and ends with its worker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import Pipe, reduction
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from raylaunch.checkpoint import shared_memory
from raylaunch.checkpoint.dcp_writer import CheckpointWriter, SaveRequest
from raylaunch.errors import StateError
from raylaunch.host import processes

END_LIMIT = 5.0


@dataclass(frozen=True)
class _Group:
    """What a process needs to meet those of the other ranks."""

    store: tuple[str, int] | str
    """Host and port of the TCPStore, or the path of the FileStore, that the training's group met at."""
    prefix: str
    rank: int
    size: int
    timeout: float


class SaveProcess:
    """One worker's; it begins with the first save, so that no recovery waits for it."""

    def __init__(self, device: str, group: dist.ProcessGroup, attempt: str, timeout: float) -> None:
        """`attempt`: what tells it from others that met at the same store; `timeout`: of exchanges, in seconds."""
        self._copies = shared_memory.SharedCopies(device)
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self._group: _Group | None = _Group(_met_at(), f"raylaunch-saves-{attempt}", rank, size, timeout)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None

    def save(self, state: Mapping[str, Any], order: SaveRequest) -> Future[None]:
        """Copy the state, and have the copies saved; the future has the save's error."""
        layout = self._copies.fill(state)
        if self._process is None:
            self._start()
        over: Future[None] = Future()
        threading.Thread(target=self._hand_over, args=(order, layout, over), name="save", daemon=True).start()
        return over

    def kill(self) -> None:
        """End it at once; a save under way has failed then."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """End it; a save under way is over by then."""
        if self._process is not None and self._connection is not None:
            self._connection.close()
            try:
                self._process.wait(END_LIMIT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._copies.close()

    def _start(self) -> None:
        """By the thread that trains: the process ends when the thread does that began it (prctl(2))."""
        self._connection, theirs = Pipe()
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # whose classes a state may hold
        command = [sys.executable, "-P", "-m", "raylaunch.checkpoint.save_process"]
        self._process = subprocess.Popen(command, stdin=theirs.fileno(), env=env)
        theirs.close()

    def _hand_over(self, order: SaveRequest, layout: bytes | None, over: Future[None]) -> None:
        assert self._connection is not None and self._process is not None
        try:
            if self._group is not None:
                self._connection.send(self._group)
                self._group = None
            self._connection.send((order, layout))
            if layout is not None:
                reduction.send_handle(self._connection, self._copies.fd, self._process.pid)
            error = self._connection.recv()
        except Exception as raised:  # noqa: BLE001  whoever waits must hear of it
            error = RuntimeError(f"the process that saves beside this worker is gone ({raised!r}); see this rank's log")
        if error is not None:
            over.set_exception(error)
        else:
            over.set_result(None)


def _met_at() -> tuple[str, int] | str:
    store: Any = dist.distributed_c10d._get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if isinstance(store, TCPStore):
        return store.host, store.port
    if isinstance(store, FileStore):
        return str(store.path)  # type: ignore[attr-defined]
    raise StateError(
        f"async_checkpointer_type: process does not support a rendezvous by {type(store).__name__}",
        "Set checkpoint.async_checkpointer_type: thread, or initialize torch.distributed with env://.",
    )


def main() -> int:
    """Entry point of `python -m raylaunch.checkpoint.save_process`, whose standard input is the connection to its worker."""
    processes.die_with_parent()
    connection: Connection[Any, Any] = Connection(os.dup(0))
    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)  # warns that ours has no groups here
    with contextlib.suppress(EOFError, ConnectionResetError):  # the worker has ended
        _join(connection.recv())
        state: Any = None
        while True:
            order, layout = connection.recv()
            if layout is not None:
                fd = reduction.recv_handle(connection)
                state = shared_memory.read(fd, layout)
                os.close(fd)
            connection.send(_save(state, order))
    return 0


def _join(group: _Group) -> None:
    timeout = timedelta(seconds=group.timeout)
    if isinstance(group.store, str):
        met: Store = FileStore(group.store, group.size)
    else:
        met = TCPStore(*group.store, is_master=False, timeout=timeout)
    store = PrefixStore(group.prefix, met)
    dist.init_process_group("gloo", store=store, rank=group.rank, world_size=group.size, timeout=timeout)


def _save(state: Any, order: SaveRequest) -> BaseException | None:
    try:
        state_dict_saver.save(state, storage_writer=CheckpointWriter(order))
    except (Exception, CheckpointException) as error:  # noqa: BLE001  the worker's to judge
        return error
    return None


if __name__ == "__main__":
    sys.exit(main())
