"""Somebody's own script on the cluster, unmodified, as `torchrun` would start it: one process a worker.

The script finds torchrun's variables (env:// rendezvous at a port of rank 0's node, found anew in each attempt).
The workers keep in step beside it, once a second, over gloo: whether all scripts have ended, and whether the run
is to stop. To stop, every script gets `trainer.stop_signal` at the same time, and SIGKILL after `stop_timeout`.
A script that ends by a signal takes its worker with it (a fault of the machines, for all we know); one that crashes
soon after its start, or ends with an exit code, is an error, with the last words of its traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from raylaunch.config.schema import Config, TrainerConfig
from raylaunch.errors import RunError
from raylaunch.host.processes import become_subreaper, die_with_parent, end_tree, running
from raylaunch.state import files
from raylaunch.training.worker.session import AT_COMMIT, NOW, Session

EVERY = 1.0
_ERROR = re.compile(r"^(?:\[rank\d+\]: )?([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)\b.*)", re.MULTILINE)
"""A traceback's last line; torch writes the rank before it once there is a process group."""
_TAIL = 1 << 16
_CRASHES = {"SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE"}
"""Of a program's own making. (Not SIGABRT: NCCL's watchdog ends with it those whose peer is gone.)"""
SOON = 600.0
"""Seconds: a crash after more than that may be anything's."""


@dataclass(frozen=True)
class TorchrunGroup:
    """Where a worker is among all, in torchrun's terms."""

    group_rank: int
    group_world_size: int
    master_port: int


def run(config: Config, session: Session) -> None:
    """Start the script, and wait until all ranks' have ended."""
    trainer = config.trainer
    assert trainer.script is not None
    errors = files.attempt_dir(session.run_dir, session.attempt) / f"rank-{session.rank}.error.json"
    log = errors.with_name(f"rank-{session.rank}.log")
    began_at = log.stat().st_size if log.exists() else 0
    become_subreaper()
    began = time.monotonic()
    child = subprocess.Popen(
        command(trainer), cwd=trainer.chdir, env=environment(session, find_place(session), errors),
        preexec_fn=die_with_parent,
    )  # fmt: skip
    try:
        stopped = _wait_for_all(child, trainer, session)
    finally:
        end_tree(os.getpid(), keep_root=True)  # also what a script that has ended has left behind
        child.wait()
    if child.returncode < 0 and not stopped:
        name = signal.Signals(-child.returncode).name
        print(f"the script ended by {name}", file=sys.stderr, flush=True)
        if name in _CRASHES and time.monotonic() - began < SOON:
            raise RunError(f"{trainer.script} crashed with {name}")
        os.kill(os.getpid(), -child.returncode)
    if child.returncode and not stopped:
        raise RunError(f"{trainer.script} exited with code {child.returncode}: {last_words(errors, log, began_at)}")
    session.finish("stopped" if stopped else "finished", 0)


def command(trainer: TrainerConfig) -> list[str]:
    """The script by this Python, or as it is where it is no Python file."""
    script = str(trainer.script)
    return [*([sys.executable, "-u"] if script.endswith(".py") else []), script, *trainer.args]


def find_place(session: Session) -> TorchrunGroup:
    """Exchange who is where; rank 0 finds a free port on its node."""
    port = 0
    if session.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
    everyone: list[Any] = [None] * session.world_size
    dist.all_gather_object(everyone, (session.node, port))
    nodes = list(dict.fromkeys(node for node, _ in everyone))
    return TorchrunGroup(nodes.index(session.node), len(nodes), everyone[0][1])


def environment(session: Session, place: TorchrunGroup, errors: Path) -> dict[str, str]:
    """torchrun's variables, as torch.distributed.elastic sets them, and where this run's files lie.

    Source: torch/distributed/elastic/agent/server/local_elastic_agent.py (2.13). MASTER_ADDR stays as Ray Train
    has set it: the address of rank 0's node.
    """
    rank, world = str(session.rank), str(session.world_size)
    ours = {
        "RANK": rank, "ROLE_RANK": rank, "LOCAL_RANK": str(session.local_rank), "GROUP_RANK": str(place.group_rank),
        "WORLD_SIZE": world, "ROLE_WORLD_SIZE": world, "LOCAL_WORLD_SIZE": str(session.local_world_size),
        "GROUP_WORLD_SIZE": str(place.group_world_size), "ROLE_NAME": "default",
        "MASTER_PORT": str(place.master_port), "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCHELASTIC_RUN_ID": session.run, "TORCHELASTIC_RESTART_COUNT": str(session.attempt - 1),
        "TORCHELASTIC_MAX_RESTARTS": "1000000", "TORCHELASTIC_ERROR_FILE": str(errors),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        "RAYLAUNCH_RUN": session.run, "RAYLAUNCH_RUN_DIR": str(session.run_dir),
        "RAYLAUNCH_CHECKPOINT_DIR": str(session.checkpoint_dir), "RAYLAUNCH_ATTEMPT": str(session.attempt),
    }  # fmt: skip
    return os.environ | ours


def last_words(errors: Path, log: Path, start: int) -> str:
    """The error as torch's @record wrote it, else the last line of the log that looks like one, else the last line."""
    try:
        message = json.loads(errors.read_text())["message"]
        return str(message["message"] if isinstance(message, dict) else message).splitlines()[0]
    except (OSError, ValueError, KeyError, IndexError):
        pass  # only scripts with @record write it
    with log.open("rb") as source:
        source.seek(max(start, source.seek(0, os.SEEK_END) - _TAIL))
        text = source.read().decode(errors="replace")
    if found := _ERROR.findall(text):
        return str(found[-1])
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else f"it said nothing; see {log}"


def _wait_for_all(child: subprocess.Popen[bytes], trainer: TrainerConfig, session: Session) -> bool:
    """Until all ranks' scripts have ended, or this one has failed; whether they were stopped."""
    asked, killed = 0.0, False
    least = AT_COMMIT if trainer.grow else NOW
    while True:
        began, status = time.monotonic(), child.poll()
        if status and not asked:
            return False
        if asked and not killed and _shell_left_some(trainer):  # they save still
            status = None
        wish = session.stop_requested() >= least
        heard = torch.tensor([int(wish), int(status is not None)])
        dist.all_reduce(heard)
        if heard[1] == session.world_size:
            return bool(asked)
        if heard[0] and not asked:
            asked = time.monotonic()
            print(f"raylaunch: {trainer.stop_signal} to the script: the run is to stop", flush=True)
            _tell(child, trainer)
        if asked and not killed and time.monotonic() - asked > trainer.stop_timeout:
            killed = True
            end_tree(os.getpid(), keep_root=True)
        try:
            child.wait(max(0.0, EVERY - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            continue
        time.sleep(max(0.0, 0.05 - (time.monotonic() - began)))  # the others wait for this rank's next look


def _shell_left_some(trainer: TrainerConfig) -> bool:
    """Whether something that a script which is no Python file has started lives on; a signal ends a shell at once."""
    return not str(trainer.script).endswith(".py") and any(map(running, psutil.Process().children(recursive=True)))


def _tell(child: subprocess.Popen[bytes], trainer: TrainerConfig) -> None:
    """The signal to the script; and where it is no Python file, to what it has started, for a shell does not pass signals on.
    The children of a Python script, such as its data loaders, are its own business."""
    number = signal.Signals[trainer.stop_signal]
    others = [] if str(trainer.script).endswith(".py") else psutil.Process().children(recursive=True)
    for process in others:
        if process.pid != child.pid:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
    child.send_signal(number)
