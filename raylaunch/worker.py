"""What runs inside each Ray Train worker: build the session, then call the trainer.

The worker's standard output and error go to a file of its own in the run directory, below Python,
so that a C++ abort or a library's print is found there too. The trainer is named by the config
(`package.module:function`) and imported here: raylaunch itself does not know it.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
from pathlib import Path
from typing import Any

from raylaunch import configfile, layout, runs, state
from raylaunch.errors import RunError
from raylaunch.session import Session


def main(spec: dict[str, Any]) -> None:
    """The `train_loop_per_worker` of every attempt."""
    import ray
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    run, attempt = Path(spec["run_dir"]), int(spec["attempt"])
    rank = context.get_world_rank()
    _log_to(state.attempt_dir(run, attempt) / f"rank-{rank}.log")
    config = configfile.load_resolved(run / layout.CONFIG_FILE)
    device = ray.train.torch.get_device()
    node = _node_name(ray.get_runtime_context().get_node_id())
    print(
        f"raylaunch worker run={run.name} attempt={attempt} rank={rank} world={context.get_world_size()} "
        f"node={node} host={socket.gethostname()} pid={os.getpid()} device={device}",
        flush=True,
    )
    if device.type == "cuda":
        check_distinct_gpus(rank)
    session = Session(
        run=run.name, run_dir=run, checkpoint_dir=runs.checkpoint_dir(run, config), attempt=attempt,
        rank=rank, world_size=context.get_world_size(), local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(), node=node, device=str(device),
        global_batch_size=int(spec["global_batch_size"]), cpus=int(os.environ.get("OMP_NUM_THREADS", "1")),
    )  # fmt: skip
    module, function = config.trainer.split(":")
    session.start()
    session.event("connected", workers=session.world_size)  # all are there, and know each other
    try:
        getattr(importlib.import_module(module), function)(config, session)
    finally:
        session.close()


def _node_name(node_id: str) -> str:
    """Slurm's name of this node, as the agent gave it to Ray."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return next((str(n["NodeName"]) for n in nodes if n["NodeID"] == node_id), socket.gethostname())


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
