"""What runs inside each Ray Train worker: build the session, then call the trainer.

The worker's standard output and error go to a file of its own in the run directory, below Python,
so that a C++ abort or a library's print is found there too. The trainer is named by the config
(`package.module:function`) and imported here: raylaunch itself does not know it.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylaunch.config import loader, user_code
from raylaunch.errors import RunError, StateError
from raylaunch.state import files, records, runs, thread_deaths
from raylaunch.state.run_events import WorkersConnected
from raylaunch.training.worker.heartbeat import DriverAddress, HeartbeatClient
from raylaunch.training.worker.session import Session


@dataclass(frozen=True)
class WorkerSpec:
    """What the driver tells every worker of an attempt."""

    run_dir: Path
    attempt: int
    run_incarnation: int
    global_batch_size: int
    pulse: DriverAddress

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Drivers that live longer than an upgrade call `run_incarnation` by its former name."""
        vars(self).update({"run_incarnation" if key == "incarnation" else key: value for key, value in state.items()})


Spec = WorkerSpec
"""Its former name (see `heartbeat.Place`)."""


@dataclass(frozen=True)
class Seat:
    """Which worker this is."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: str
    device: str


def main(given: dict[str, WorkerSpec]) -> None:
    """The `train_loop_per_worker` of every attempt."""
    import ray
    import ray.train
    import ray.train.torch

    context, spec = ray.train.get_context(), given["spec"]
    _log_to(files.attempt_dir(spec.run_dir, spec.attempt) / f"rank-{context.get_world_rank()}.log")
    device = ray.train.torch.get_device()
    seat = Seat(
        context.get_world_rank(), context.get_world_size(), context.get_local_rank(), context.get_local_world_size(),
        _node_name(ray.get_runtime_context().get_node_id()), str(device),
    )  # fmt: skip
    print(
        f"raylaunch worker run={spec.run_dir.name} attempt={spec.attempt} rank={seat.rank} world={seat.world_size} "
        f"node={seat.node} host={socket.gethostname()} pid={os.getpid()} device={device}",
        flush=True,
    )
    if device.type == "cuda":
        check_distinct_gpus(seat.rank)
    thread_deaths.record(spec.run_dir, attempt=spec.attempt, rank=seat.rank)
    work(spec, seat)


def work(spec: WorkerSpec, seat: Seat) -> None:
    """Call the trainer, with a session of its own."""
    run, attempt, rank = spec.run_dir, spec.attempt, seat.rank
    config = loader.load_resolved(run / records.CONFIG_FILE)
    stacks = files.attempt_dir(run, attempt) / f"rank-{rank}.stack.txt"
    session = Session(
        run=run.name, run_dir=run, checkpoint_dir=runs.checkpoint_dir(run, config), attempt=attempt,
        rank=rank, world_size=seat.world_size, local_rank=seat.local_rank, local_world_size=seat.local_world_size,
        node=seat.node, device=seat.device, global_batch_size=spec.global_batch_size,
        cpus=int(os.environ.get("OMP_NUM_THREADS", "1")), run_incarnation=spec.run_incarnation,
        pulse=HeartbeatClient(spec.pulse, rank, seat.node, stacks),
    )  # fmt: skip
    session.start()
    session.record(WorkersConnected(session.world_size))  # all are there, and know each other
    try:
        user_code.function(config.trainer)(config, session)
        session.returned()
    except BaseException as error:
        _write_error_file(session, error)
        raise
    finally:
        session.close()


def _node_name(node_id: str) -> str:
    """Slurm's name of this node, as the agent gave it to Ray."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return next((str(n["NodeName"]) for n in nodes if n["NodeID"] == node_id), socket.gethostname())


def _write_error_file(session: Session, error: BaseException) -> None:
    """What ended this rank: its traceback into its log, and as a file for `raylaunch why`."""
    text = "".join(traceback.format_exception(error))
    print(text, file=sys.stderr, flush=True)
    record = {
        "exception": type(error).__name__, "message": str(error)[:4000], "traceback": text[-16000:], "rank": session.rank,
        "node": session.node, "host": socket.gethostname(), "step": session.step, "time": time.time(),
    }  # fmt: skip
    try:
        files.write_json(
            files.attempt_dir(session.run_dir, session.attempt) / f"rank-{session.rank}.error.json", record
        )
    except StateError as failure:  # a full disk may be what it is about
        print(f"raylaunch: no error file: {failure.message}", file=sys.stderr, flush=True)


def _log_to(path: Path) -> None:
    """Send file descriptors 1 and 2 to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(fd, number)
    os.close(fd)
    # Ray replaces these objects by its own writers; give them back the plain descriptors.
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def check_distinct_gpus(rank: int) -> None:
    """All workers gather (host, GPU UUID): two on one GPU is a set-up error, found before it costs a day."""
    import torch
    import torch.distributed as dist

    mine = (socket.gethostname(), str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    twins = [other for other, theirs in enumerate(everyone) if theirs == mine and other != rank]
    if twins:
        raise RunError(
            f"ranks {sorted([rank, *twins])} share one GPU ({mine[1]} on {mine[0]})",
            "Set slurm.ntasks_per_node to the number of GPUs per node.",
        )
